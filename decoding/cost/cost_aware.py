"""CostAware: a tree as large as pays on this machine, and no tree where drafting does not pay at all.

The stop rules take the nodes of a stream in order of mass, delta_1 >= delta_2 >= ..., the seconds spent on
drafting, and the curve verify[n], n = 0..cap. Phi(n) is the sum of the first n masses and C(n) is
spent + verify[n].

* `ratio`, the paper's rule, stops at the first node that does not raise theta(n) = (1 + Phi(n)) / C(n): the
  global maximum for convex curves (theorem 3), possibly far from it on a staircase.
* `safe` finds the global maximum of theta for every non-decreasing curve: it continues while a bound that no
  later n can beat exceeds the best theta so far.
* `lambda` takes a node while delta > rate * (verify[n + 1] - verify[n]), rate = tokens per second in the long
  run. It maximises sum(1 + Phi) / sum(C) over rounds, which is throughput; the best ratio per round spends
  too much on hard rounds and too little on easy ones.

`verify` is convex from n = 1 on, but a pass over one slot is a product with a vector, cheaper than its
neighbours by more than a slot. So the first node is taken on trial, and no node is kept in the end if none is
worth verifying.

Source: CaDDTree, arXiv 2606.01813, theorem 3 and corollary 5 (marginal drafters, one pass, `ratio`). The
other rules, plain rounds and autoregressive drafters are ours; see `docs/decoding.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from certdraft.decoding.cost.cost_model import CostModel
from certdraft.decoding.target_runner import device_name, fingerprint
from certdraft.decoding.trees.builders import (
    Growth,
    Propose,
    TreeBuilder,
    grow_exactly,
    positive,
    positive_temperature,
)
from certdraft.decoding.trees.tree import Node, Tree

Stop = Literal["ratio", "lambda", "safe", "fixed"]
_WARM_UP = 8  # drafted rounds before "drafting does not pay" may be concluded
_LEARNING_RATE = 0.05  # of the log temperature, per relative error of one round; ten times that at first
_TRIAL = 4  # draft tokens of a trial


class Throughput:
    """Discounted tokens per second over rounds.

    Args:
        decay: weight of a round relative to the next one, in (0, 1].
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.tokens, self.seconds, self.rounds = decay, 0.0, 0.0, 0

    def add(self, tokens: float, seconds: float) -> None:
        """One round."""
        self.tokens = self.decay * self.tokens + tokens
        self.seconds = self.decay * self.seconds + seconds
        self.rounds += 1

    @property
    def rate(self) -> float:
        """Tokens per second; 0 before the first round."""
        return self.tokens / self.seconds if self.seconds else 0.0


class CostAware(TreeBuilder):
    """The best-first tree cut where the next node costs more than it is expected to earn.

    Seconds come from the cost model, never from the wall clock, so the trees of a run can be reproduced. The
    builder remembers throughput and temperature from round to round and from prompt to prompt; `reset`
    forgets them.

    A marginal drafter's tree is one cut of the stream. For a conditional one each further drafter pass is a
    decision of its own: the unread nodes of the current cut are read, best first, as long as their expected
    best child (mass times the mean top probability seen this round) raises the rule's objective by more than
    the pass and the extra nodes cost. That estimate is a heuristic; the cut of what is known is exact.

    Trials: where no token seems worth verifying, the temperature could never be corrected. So while it is
    learned, a drafted round in which nothing pays verifies the best few tokens all the same: every time after
    a trial that was accepted, more and more rarely after trials that were not.

    Plain rounds: when the drafted rounds of late earned fewer tokens per second than plain decoding would,
    rounds go undrafted, and one in `probe` drafts again to see whether that has changed.

    Args:
        cost_model: curves measured on this machine for this target and drafter, or the path of their JSON.
        stop: "lambda" (long-run throughput), "ratio" (the paper's), "safe" (best ratio for any non-decreasing
            curve) or "fixed" (always `budget` nodes and every round drafted).
        budget: most draft tokens in one tree, >= 1.
        max_depth: longest path, >= 1.
        temperature: of the drafter's softmax, > 0; None learns the one at which the expected accepted length
            is the realised one, starting at 1. A drafter's q(token) need not be its chance of being the
            target's greedy token, and masses that are too small stop trees too early.
        rate: tokens per second for "lambda"; None learns it, starting at the speed of plain decoding.
        probe: rounds from one attempt to draft to the next while drafting does not pay, >= 1; 1 always
            drafts.
        decay: forgetting of the throughput per round, in (0, 1].
    """

    def __init__(
        self,
        cost_model: CostModel | str | Path,
        stop: Stop = "lambda",
        budget: int = 64,
        max_depth: int = 8,
        temperature: float | None = None,
        rate: float | None = None,
        probe: int = 16,
        decay: float = 0.98,
    ) -> None:
        if stop not in get_args(Stop):
            raise ValueError(f"CostAware.stop is '{stop}'; choose one of {', '.join(get_args(Stop))}")
        if rate is not None and not rate > 0:
            raise ValueError(
                f"CostAware.rate is {rate}; it is a speed in tokens per second and must be above 0"
            )
        if not 0 < decay <= 1:
            raise ValueError(f"CostAware.decay is {decay}; it must be in (0, 1]")
        self.cost_model = cost_model if isinstance(cost_model, CostModel) else CostModel.load(cost_model)
        self.stop: Stop = stop
        self.budget = positive("CostAware.budget", budget)
        self.max_depth = positive("CostAware.max_depth", max_depth)
        self.temperature = (
            None if temperature is None else positive_temperature("CostAware.temperature", temperature)
        )
        self.rate, self.probe, self.decay = rate, positive("CostAware.probe", probe), decay
        self.reset()

    def __repr__(self) -> str:
        return f"cost_aware(stop={self.stop}, budget={self.budget})"

    def reset(self) -> None:
        """Forget throughput and temperature."""
        self._all, self._drafted = Throughput(self.decay), Throughput(0.9)
        self._learned, self._lessons = 1.0, 0  # temperature, and the rounds it was learned from
        self._idle, self._patience, self._trying = (
            0,
            1,
            False,
        )  # drafted rounds without a node, before a trial
        self._waited = 0  # rounds since the last drafted one
        self._spent: float | None = None  # seconds of drafting in the round under way

    def prepare(self, target: object, drafter: object) -> None:
        """Raise if the cost model is of other hardware or models; called by the loop before each text."""
        self.cost_model.require(
            device=device_name(target.device) if hasattr(target, "device") else "*",
            target=getattr(target, "fingerprint", "*"),
            drafter=fingerprint(drafter),
        )

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`."""
        self._spent = None
        depth = min(self.max_depth, max_depth)
        verify = self.cost_model.verify_curve(context, self.budget)
        if depth == 0 or not self._drafting_pays(verify[0]):
            return Tree.root_only(root)
        growth = Growth(propose, root, self.budget, depth, self.temperature or self._learned)
        if self.stop == "fixed":
            nodes = grow_exactly(growth, self.budget, None)
        else:
            nodes = self._cut(growth, context, verify)
            while batch := self._worth_reading(growth, nodes, context, verify):
                growth.read(batch)
                nodes = self._cut(growth, context, verify)
        self._trying = not nodes and self.temperature is None and self._idle >= self._patience
        if self._trying:
            nodes = list(islice(growth.stream(), min(_TRIAL, self.budget)))
        self._spent = self._draft_s(growth, context)
        return growth.tree(nodes)

    def observe(self, tree: Tree, committed: int, context: int) -> None:
        """Record the outcome of a round; called by the loop."""
        seconds = self.cost_model.verify_s(tree.num_nodes, context) + (self._spent or 0.0)
        self._all.add(committed, seconds)
        if self._spent is None:
            self._waited += 1
        else:
            self._drafted.add(committed, seconds)
            self._waited = 0
            self._learn(tree, committed - 1)

    def _learn(self, tree: Tree, accepted: int) -> None:
        """Move the temperature to where the expected length would have been the accepted one."""
        if not tree.num_nodes:
            self._idle += 1
            return
        error = (accepted - tree.expected_accepted) / (1 + tree.expected_accepted)
        speed = max(_LEARNING_RATE, 10 * _LEARNING_RATE / (1 + self._lessons))
        step = speed * min(max(error, -1.0), 1.0) if speed > _LEARNING_RATE else speed * error
        self._learned = min(max(self._learned * math.exp(-step), 0.05), 4.0)
        self._lessons, self._idle = self._lessons + 1, 0
        if self._trying:
            self._patience = 0 if accepted else min(max(1, 2 * self._patience), self.probe)

    def _drafting_pays(self, plain_s: float) -> bool:
        if self.stop == "fixed" or self._drafted.rounds < _WARM_UP or self._drafted.rate * plain_s >= 1.0:
            return True
        return self._waited + 1 >= self.probe

    def _draft_s(self, growth: Growth, context: int) -> float:
        passes = sum(self.cost_model.draft_s(read, context) for read in growth.passes)
        return self.cost_model.opening_s(context) + passes

    def _rate(self, plain_s: float) -> float:
        """Plain decoding is always possible, so the best long-run throughput is never below it."""
        return self.rate if self.rate is not None else max(self._all.rate, 1.0 / plain_s)

    def _cut(self, growth: Growth, context: int, verify: list[float]) -> list[Node]:
        stream = growth.stream()
        if self.stop == "lambda":
            return take_lambda(stream, self._rate(verify[0]), verify)
        if self.stop == "safe":
            return take_safe(stream, self._draft_s(growth, context), verify, growth.max_depth)
        return take_ratio(stream, self._draft_s(growth, context), verify)

    def _worth_reading(
        self, growth: Growth, nodes: list[Node], context: int, verify: list[float]
    ) -> list[Node]:
        """The unread nodes to give one more drafter pass to; none when the pass would not pay.

        The best child of each is one more node to verify, or takes the place of the least probable one where
        the budget is full.
        """
        unread = growth.unread(nodes)
        if not unread:
            return []
        top, size, room = growth.mean_top_probability(), len(nodes), self.budget - len(nodes)
        spent, phi = self._draft_s(growth, context), math.fsum(math.exp(node.logmass) for node in nodes)
        rate = self._rate(verify[0])
        gain, best, count = 0.0, 0.0, 0
        now = (1.0 + phi) / (spent + verify[size])
        for number, node in enumerate(unread, start=1):
            earned, added = math.exp(node.logmass) * top, min(number, room)
            if number > room:
                earned -= math.exp(nodes[room - number].logmass)
            if earned <= 0.0:
                break
            gain += earned
            cost = self.cost_model.draft_s(number, context) + verify[size + added] - verify[size]
            if self.stop == "lambda":
                value = gain - rate * cost
            else:
                value = (1.0 + phi + gain) / (spent + verify[size] + cost) - now
            if value > best:
                best, count = value, number
        return unread[:count]


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
