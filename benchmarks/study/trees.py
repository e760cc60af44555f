"""Exact best-first replay from every start of a text at once, for all node budgets at once.

A best-first tree of B nodes keeps the B most probable prefixes, so the greedy token at depth k is in the tree
of a start iff fewer than B prefixes are more probable than the greedy path to depth k. Two things follow. One
count per (start, depth) answers every budget. And prefixes that leave the text at the same place have the
same distributions for every start before it, so each is read once per text instead of once per round.

`pop_orders` does this counting; `tests/study` holds it against `certdraft.decoding.replay`, round by round.
Axes: T tokens of the text, one start before each · D draft depth · M nodes read in one pass · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

_NODES_PER_PASS = 256


@torch.inference_mode()
def pop_orders(
    drafter: Any, prompt: Sequence[int], text: Sequence[int], budget: int = 64, max_depth: int = 8
) -> Int[ndarray, "T D"]:
    """How many prefixes come before the greedy one, for every start and depth; saturates at `budget`.

    Args:
        drafter: conditional, in eval mode, with `start` and `draft`.
        prompt: at least one token.
        text: the target's greedy continuation, T tokens.
        budget: largest node budget of interest.
        max_depth: D, as in `BestFirst`.
    """
    state = drafter.start(prompt[:-1])
    roots = [prompt[-1], *text[:-1]]
    logq = drafter.draft(state, roots, range(-1, len(roots) - 1)).log_softmax(-1)
    steps, read = len(text), len(text)
    own = logq.gather(-1, torch.tensor(text)[:, None])[:, 0].double().numpy()
    reached = np.concatenate([[0.0], own.cumsum()])  # log-probability of the text up to each place
    start = np.arange(steps)
    cap = np.minimum(max_depth, steps - start - 1)  # the loop drafts no deeper than its text is long
    depth = np.arange(1, max_depth + 1)
    ends = np.minimum(start[:, None] + depth, steps)
    path = np.where(depth <= cap[:, None], reached[ends] - reached[:-1, None], np.inf)  # [T, D]
    before = np.where(depth <= cap[:, None], depth - 1, budget)  # its own ancestors come first

    # Prefixes that leave the text: place they leave at, log-probability from there, length from there.
    values, ids = logq.scatter(-1, torch.tensor(text)[:, None], -torch.inf).topk(budget, dim=-1)
    place = np.repeat(start, budget)
    mass, token = values.double().numpy().ravel(), ids.numpy().ravel()
    length, parent = np.ones_like(place), place

    def shared(place: ndarray, length: ndarray):  # per depth of the leaving place: start, offset, allowed
        for back in range(max_depth):
            t = np.maximum(place - back, 0)
            yield t, reached[place] - reached[t], (place >= back) & (back + length <= cap[t])

    def count(place: ndarray, mass: ndarray, length: ndarray) -> None:
        for t, offset, allowed in shared(place, length):
            ahead = ((offset + mass)[:, None] > path[t]) & allowed[:, None]
            flat = (t[:, None] * max_depth + depth - 1)[ahead]
            before.ravel()[:] += np.bincount(flat, minlength=before.size)

    count(place, mass, length)
    while True:
        open_depth = (before < budget).sum(-1)  # monotone along the path
        threshold = np.where(open_depth > 0, path[start, np.maximum(open_depth, 1) - 1], np.inf)
        reach = np.full(len(place), -np.inf)  # by how much a prefix clears the threshold of its best start
        for t, offset, allowed in shared(place, length + 1):  # a child must still be allowed
            np.maximum(reach, np.where(allowed, offset - threshold[t], -np.inf), out=reach)
        gain = mass + reach
        kept = np.flatnonzero(gain > 0)
        if not len(kept):
            return np.minimum(before, budget)
        best = kept[np.argsort(-gain[kept], kind="stable")]
        now, later = best[:_NODES_PER_PASS], best[_NODES_PER_PASS:]
        rows = drafter.draft(state, token[now].tolist(), parent[now].tolist()).log_softmax(-1)
        # Slightly too many children are found: `count` decides in float64.
        least = torch.from_numpy(-gain[now] - 1e-4).float()
        row, child = (rows > least[:, None]).nonzero().numpy().T
        child_mass = mass[now][row] + rows.numpy()[row, child].astype(np.float64)
        found = (place[now][row], child_mass, length[now][row] + 1)
        count(*found)
        numbers = read + np.arange(len(now))
        read += len(now)
        place = np.concatenate([place[later], found[0]])
        mass = np.concatenate([mass[later], found[1]])
        length = np.concatenate([length[later], found[2]])
        token = np.concatenate([token[later], child])
        parent = np.concatenate([parent[later], numbers[row]])


def accepted_by_rank(ranks: Sequence[int], widths: Sequence[int]) -> Int[ndarray, " T"]:
    """Accepted draft tokens of a chain or static tree from every start, uncapped by the end of the text."""
    ranks = np.asarray(ranks)
    alive, accepted = np.ones(len(ranks), bool), np.zeros(len(ranks), np.int64)
    for depth, width in enumerate(widths):
        inside = np.zeros(len(ranks), bool)
        inside[: max(len(ranks) - depth, 0)] = ranks[depth:] < width
        alive &= inside
        accepted += alive
    return accepted


def target_passes(accepted: Int[ndarray, " T"]) -> int:
    """Target passes of the rounds that commit a text, given the accepted draft tokens from every start."""
    done = passes = 0
    while done < len(accepted):
        done += int(accepted[done]) + 1
        passes += 1
    return passes
