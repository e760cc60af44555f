"""Stop rules: how many nodes of a stream are worth verifying, given what they cost.

All take the nodes in order of mass, delta_1 >= delta_2 >= ..., the seconds already spent on drafting, and the
curve verify[n], n = 0..cap. Phi(n) is the sum of the first n masses, C(n) = spent + verify[n].

* `ratio`: the paper's rule. Stops at the first node that does not raise theta(n) = (1 + Phi(n)) / C(n). The
  global maximum for convex curves (theorem 3), possibly far from it on a staircase.
* `safe`: the global maximum of theta for every non-decreasing curve. Goes on while a bound that no later n
  can beat exceeds the best theta so far.
* `lambda`: takes a node while delta > rate * (verify[n + 1] - verify[n]), rate = tokens per second achieved
  in the long run. Maximises sum(1 + Phi) / sum(C) over rounds, which is throughput; the best *per-round*
  ratio does not: it overspends on hard rounds and underspends on easy ones.

`verify` is convex from n = 1 on. The step from 0 to 1 is another matter: a pass over one slot is a product
with a vector, cheaper than its neighbours by more than a slot. So the first node is taken on trial, and the
whole run is given up in the end if no draft token is worth verifying.

Source: CaDDTree, arXiv 2606.01813, theorem 3 and corollary 5 (`ratio`); SYSTEMS 6.4 items 3 and 4 (the
others).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from certdraft.decoding.trees.tree import Node

Stop = Literal["ratio", "lambda", "safe", "fixed"]


def take_ratio(stream: Iterable[Node], spent: float, verify: Sequence[float]) -> list[Node]:
    """The longest run of nodes each of which, from the second on, raises tokens per second of this round."""
    nodes: list[Node] = []
    phi, plain, best = 0.0, 1.0 / (spent + verify[0]), 0.0
    for node in stream:
        if len(nodes) + 1 == len(verify):
            break
        phi += math.exp(node.logmass)
        theta = (1.0 + phi) / (spent + verify[len(nodes) + 1])
        if theta <= best:
            break
        best = theta
        nodes.append(node)
    return nodes if best > plain else []


def take_safe(stream: Iterable[Node], spent: float, verify: Sequence[float], max_depth: int) -> list[Node]:
    """The run of nodes with the most tokens per second of this round; `max_depth` bounds what is accepted."""
    nodes: list[Node] = []
    phi, best, keep = 0.0, 1.0 / (spent + verify[0]), 0
    for node in stream:
        size = len(nodes) + 1
        if size == len(verify) or (1.0 + max_depth) / (spent + verify[size]) <= best:
            break
        nodes.append(node)
        phi += math.exp(node.logmass)
        theta = (1.0 + phi) / (spent + verify[size])
        if theta > best:
            best, keep = theta, size
    return nodes[:keep]


def take_lambda(stream: Iterable[Node], rate: float, verify: Sequence[float]) -> list[Node]:
    """The run of nodes each of which, from the second on, earns more than its seconds are worth at `rate`."""
    nodes: list[Node] = []
    phi = 0.0
    for node in stream:
        size, mass = len(nodes) + 1, math.exp(node.logmass)
        if size == len(verify) or (nodes and mass <= rate * (verify[size] - verify[size - 1])):
            break
        phi += mass
        nodes.append(node)
    return nodes if phi > rate * (verify[len(nodes)] - verify[0]) else []
