"""Measures a cost model on this machine: what a drafter pass and a verified tree cost, context by context.

What is timed is the loop's own work. A verify sample selects a tree of n nodes, runs the target over its 1 +
n slots, walks it with `Strict` and compacts both caches; a draft sample is one drafter pass and the reading
of its most probable tokens. Samples of all sizes are interleaved, so that a slow minute of the machine
touches them all, and the median of each is kept. A marginal drafter reads one chain a round whatever the
tree, so its pass has one cost; the pass of a conditional one over a round's root is timed beside the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import islice

import torch
import transformers
from transformers import PreTrainedModel

from certdraft.decoding.acceptors import Strict
from certdraft.decoding.cost.cost_model import Clock, CostModel, RealClock, fit_convex
from certdraft.decoding.draft_session import DraftSession, narrow_draft
from certdraft.decoding.loop import as_target
from certdraft.decoding.target_runner import Target, device_name, fingerprint, verifier
from certdraft.decoding.trees.ranking import top_rows
from certdraft.decoding.trees.tree import NodeStream, tree_from_nodes
from certdraft.drafters import Drafter

_DEPTH = 8  # of the synthetic trees
_GROWTH = 64  # committed tokens a state may gather before it is started afresh


@torch.inference_mode()
def profile(
    target: Target | PreTrainedModel,
    drafter: Drafter,
    contexts: Sequence[int] = (16, 128, 512),
    nodes: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 64),
    draft_nodes: Sequence[int] = (1, 4, 16),
    repeats: int = 20,
    warm_up: int = 3,
    clock: Clock | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CostModel:
    """The cost model of a target and a drafter on this machine.

    Args:
        target: a causal LM or a `TargetRunner`.
        drafter: the drafter.
        contexts: committed tokens at which to measure, ascending.
        nodes: tree sizes to measure, ascending from 0.
        draft_nodes: nodes of one drafter pass to measure, ascending from 1.
        repeats: samples per point; the median is kept.
        warm_up: samples per point before the first that counts.
        clock: source of the seconds; None is the wall clock.
        seed: of the random token ids.
        progress: called with what was measured, steps done and steps in all.

    Raises:
        ValueError: contexts or sizes that do not ascend, no repeats, or a context plus the samples' own
            tokens that does not fit the target or the drafter.
    """
    target = as_target(target, drafter.taps)
    if drafter.kind == "marginal":
        draft_nodes = draft_nodes[:1]
    _check(target, drafter, contexts, nodes, draft_nodes, repeats)
    clock = clock or RealClock(getattr(target, "device", "cpu"))
    verify, draft, opening = [], [], []
    for done, context in enumerate(contexts):
        progress(f"context {context}", 2 * done, 2 * len(contexts))
        verify.append(_verify_samples(target, drafter, context, nodes, repeats, warm_up, clock, seed))
        progress(f"context {context}", 2 * done + 1, 2 * len(contexts))
        rows = _draft_samples(target, drafter, context, draft_nodes, repeats, warm_up, clock, seed)
        draft.append(rows[0])
        opening.append(max(rows[1] - _affine(draft_nodes, rows[0])[0], 0.0))
    progress("profile", 2 * len(contexts), 2 * len(contexts))
    return CostModel(
        contexts=tuple(contexts),
        nodes=tuple(nodes),
        verify=tuple(_curve(nodes, row) for row in verify),
        draft=tuple(_affine(draft_nodes, row) for row in draft),
        opening=tuple(opening),
        device=device_name(getattr(target, "device", "cpu")),
        target=getattr(target, "fingerprint", type(target).__name__),
        drafter=fingerprint(drafter),
        measured={
            "verify_s": verify,
            "draft_nodes": list(draft_nodes),
            "draft_s": draft,
            "repeats": repeats,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def room_needed(context: int) -> int:
    """Positions that profiling at a context takes in both models."""
    return context + _GROWTH + _DEPTH


def _check(
    target: Target,
    drafter: Drafter,
    contexts: Sequence[int],
    nodes: Sequence[int],
    draft_nodes: Sequence[int],
    repeats: int,
) -> None:
    for name, values, first in (
        ("contexts", contexts, 1),
        ("nodes", nodes, 0),
        ("draft_nodes", draft_nodes, 1),
    ):
        if not values or list(values) != sorted(set(values)) or values[0] < first:
            raise ValueError(f"profile: {name} must ascend from {first} or more, got {list(values)}")
    if nodes[0] != 0:
        raise ValueError(f"profile: nodes must start at 0, a plain decoding step, not at {nodes[0]}")
    if repeats < 1:
        raise ValueError(f"profile: repeats is {repeats}; a median needs at least one sample")
    limits = {"target": target.max_context, "drafter": getattr(drafter, "max_context", None)}
    room = room_needed(max(contexts))
    for name, limit in limits.items():
        if limit is not None and room > limit:
            raise ValueError(
                f"profiling at context {max(contexts)} needs {room} positions, the {name} reads {limit}; "
                "pass smaller contexts"
            )


def _curve(nodes: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """The plain step as measured, then the convex fit; noise may not make a tree cheaper than it."""
    if len(nodes) == 1:
        return tuple(seconds)
    fitted = fit_convex(nodes[1:], seconds[1:]).tolist()
    return (min(seconds[0], fitted[0]), *fitted)


def _verify_samples(
    target: Target,
    drafter: Drafter,
    context: int,
    nodes: Sequence[int],
    repeats: int,
    warm_up: int,
    clock: Clock,
    seed: int,
) -> list[float]:
    """Median seconds of a round with n draft tokens, its drafter passes left out; one per n."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(target.vocab_size, (context,), generator=generator).tolist()
    levels = top_rows(torch.randn(_DEPTH, target.vocab_size, generator=generator), max(*nodes, 1))
    accept, state, session, gathered = Strict(), None, None, _GROWTH
    verify = verifier(target, Strict.needed)
    samples: list[list[float]] = [[] for _ in nodes]
    for repeat in range(-warm_up, repeats):
        for column, num_nodes in enumerate(nodes):
            if session is None or gathered + _DEPTH > _GROWTH:
                state, gathered = target.start(ids), 0
                session = DraftSession(drafter, ids, clock, target.features(state) if drafter.taps else None)
            session.begin()
            session([0], [-1])
            clock.lap("host")
            stream = NodeStream(lambda ranks: levels[len(ranks)] if len(ranks) < _DEPTH else None)
            nodes_of = list(islice(stream, num_nodes))
            tree = tree_from_nodes(0, nodes_of, lambda ranks: -1 if ranks else 0)
            accept.walk(tree, verify(state, tree))
            path = tree.path_to(tree.num_nodes)  # any path: its length is not what takes time
            features = target.features(state) if drafter.taps else None
            target.keep(state, path)
            session.commit(tree, path, None if features is None else features[path])
            seconds = clock.lap("verify", num_nodes, context)
            gathered += len(path)
            if repeat >= 0:
                samples[column].append(seconds)
    return [statistics.median(column) for column in samples]


def _draft_samples(
    target: Target,
    drafter: Drafter,
    context: int,
    widths: Sequence[int],
    repeats: int,
    warm_up: int,
    clock: Clock,
    seed: int,
) -> tuple[list[float], float]:
    """Median seconds of a drafter pass that reads k nodes, one per k, and of the pass over a round's root."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(target.vocab_size, (context,), generator=generator).tolist()
    state = drafter.start(ids, target.features(target.start(ids))) if drafter.taps else drafter.start(ids)
    draft, draft_ids = narrow_draft(drafter)
    samples: list[list[float]] = [[] for _ in widths]
    roots: list[float] = []
    for repeat in range(-warm_up, repeats):
        for column, width in enumerate(widths):
            clock.lap("host")
            tokens, parents = [i % target.vocab_size for i in range(width)], [-1] * width
            if drafter.kind == "conditional":  # a level of a tree: children of the root, read before them
                top_rows(draft(state, [0], [-1]), 8, draft_ids=draft_ids)
                seconds, parents = clock.lap("open", 1, context), [0] * width
                if repeat >= 0:
                    roots.append(seconds)
            top_rows(draft(state, tokens, parents), 8, draft_ids=draft_ids)
            seconds = clock.lap("draft", width, context)
            drafter.commit(state, [])
            if repeat >= 0:
                samples[column].append(seconds)
    found = [statistics.median(column) for column in samples]
    return found, statistics.median(roots or [found[0]])


def _affine(widths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of the first node and of each further one: least squares with both >= 0."""
    first = seconds[0]
    steps = [w - widths[0] for w in widths]
    weight = math.fsum(step * step for step in steps)
    slope = (
        math.fsum(step * (s - first) for step, s in zip(steps, seconds, strict=True)) / weight
        if weight
        else 0.0
    )
    return first, max(slope, 0.0)
