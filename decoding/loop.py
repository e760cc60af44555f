"""The loop: draft -> tree -> verify -> accept -> commit, batch 1, caches on both sides.

A round starts with its root, the last committed token, which no model has read. The builder hangs a tree from
it, the target reads root and tree in one pass, the acceptor picks a path and the bonus token, both caches
keep the path. With a lossless acceptor the text is the target's own (greedy, or in distribution), whatever
the drafter proposes.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from certdraft.certificates import Rule
from certdraft.decoding.acceptors import Acceptor, Strict, as_acceptor
from certdraft.decoding.cost.cost_model import Clock, RealClock
from certdraft.decoding.draft_session import DraftSession
from certdraft.decoding.target_runner import Target, TargetRunner, context_limit, verifier
from certdraft.decoding.trees.builders import Chain, TreeBuilder
from certdraft.decoding.trees.ranking import NonFiniteLogits, greedy_ids
from certdraft.decoding.trees.tree import Tree
from certdraft.drafters import Drafter


@dataclass(frozen=True, slots=True)
class Round:
    """One target pass.

    Attributes:
        context: committed tokens before the round's root.
        nodes: draft tokens verified.
        depth: longest path of the tree.
        expected: accepted draft tokens the drafter expected (sum of its path probabilities); None where a
            replay does not know.
        accepted: draft tokens committed.
        committed: tokens committed, the bonus token included.
        draft_s: seconds inside the drafter.
        verify_s: seconds of the target pass and of reading its verdict.
        host_s: every other second of the round.
        bonus_rank: rank of the bonus token at its depth under a marginal drafter, 0 = its first choice; known
            only to replays.
        candidates: by draft depth from 1, how many tokens the tree offers after the accepted ones before.
    """

    context: int
    nodes: int
    depth: int
    expected: float | None
    accepted: int
    committed: int
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0
    bonus_rank: int | None = None
    candidates: tuple[int, ...] = ()

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return self.draft_s + self.verify_s + self.host_s


@dataclass(frozen=True)
class DecodeResult:
    """A decoded text.

    Attributes:
        tokens: the new tokens, an end-of-sequence token included.
        rounds: one record per target pass, in order.
        stopped: why decoding ended.
        prefill_s: seconds of both prefills.
        fallbacks: rounds decoded plainly because the drafter's logits were not finite.
    """

    tokens: list[int]
    rounds: list[Round]
    stopped: Literal["eos", "length"]
    prefill_s: float = 0.0
    fallbacks: int = 0

    @property
    def acceptance_length(self) -> float:
        """tau of this text, >= 1."""
        return acceptance_length([self])

    @property
    def seconds(self) -> float:
        """Of all rounds; the prefill is not counted."""
        return sum(r.seconds for r in self.rounds)


def acceptance_length(results: Iterable[DecodeResult]) -> float:
    """Pooled acceptance length tau: tokens committed / target passes over all texts, bonus tokens included.

    Raises:
        ValueError: no rounds.
    """
    tokens = passes = 0
    for result in results:
        tokens += sum(r.committed for r in result.rounds)
        passes += len(result.rounds)
    if not passes:
        raise ValueError("acceptance length of no rounds; decode at least one text")
    return tokens / passes


@torch.inference_mode()
def decode(
    target: Target | PreTrainedModel,
    drafter: Drafter,
    prompt_ids: Sequence[int] | Tensor,
    builder: TreeBuilder | None = None,
    acceptor: Acceptor | Rule | None = None,
    max_new_tokens: int = 128,
    eos: int | Collection[int] | None = None,
    clock: Clock | None = None,
) -> DecodeResult:
    """Continue a prompt with a target and a drafter.

    Args:
        target: a causal LM, or a `TargetRunner` around it (make one for many prompts).
        drafter: start/draft/commit as in `certdraft.drafters`.
        prompt_ids: at least one token.
        builder: the shape of the draft; None is `Chain(4)`.
        acceptor: what is committed; None is `Strict()`, a certificate rule is wrapped in `Relaxed`.
        max_new_tokens: tokens to add, >= 1.
        eos: token or tokens that end the text; they are committed. None: only the length ends it.
        clock: source of the recorded seconds; None is the wall clock.

    Returns:
        The new tokens and one record per round.

    Raises:
        ValueError: empty prompt, token ids outside the vocabulary, text longer than either model's context,
            vocabularies that differ, target logits that are not finite, trees for a target with linear
            attention.

    Warns:
        RuntimeWarning: once, when drafter logits are not finite; such rounds are decoded without a draft.
    """
    target = as_target(target, drafter.taps)
    builder, accept = builder or Chain(), as_acceptor(acceptor or Strict())
    if getattr(target, "chains_only", False) and not isinstance(builder, Chain):
        raise ValueError(
            f"{type(builder).__name__} makes token trees, and the target has linear_attention layers, which "
            "read tokens in order: it decodes only chains. Use Chain."
        )
    prompt, stops = checked_prompt(target, drafter, prompt_ids, max_new_tokens), eos_set(eos)
    if listen := getattr(accept, "listen", None):  # an acceptor that also reads the drafter's logits
        builder = listen(builder)
    if prepare := getattr(builder, "prepare", None):
        prepare(target, drafter)
    clock = clock or RealClock(getattr(target, "device", "cpu"))
    verify = verifier(target, getattr(accept, "needed", "all"))
    clock.lap("host")
    state, tapped = target.start(prompt[:-1]), bool(drafter.taps)
    features = target.features(state) if tapped else None
    session = DraftSession(drafter, prompt[:-1], clock, features, whole=listen is not None)
    prefill_s = clock.lap("host")
    tokens: list[int] = []
    rounds: list[Round] = []
    root, stopped, guard = prompt[-1], False, _NonFiniteGuard()
    while not stopped and len(tokens) < max_new_tokens:
        context = len(prompt) - 1 + len(tokens)
        tree = guard.build(builder, session, root, session.longest(max_new_tokens - len(tokens) - 1), context)
        host_s = session.host_s + clock.lap("host")
        path, bonus = accept.walk(tree, verify(state, tree))
        verify_s = clock.lap("verify", tree.num_nodes, context)
        new, accepted, stopped = cut([*(tree.tokens[slot] for slot in path[1:]), bonus], stops)
        tokens += new
        if not stopped and len(tokens) < max_new_tokens:
            features = target.features(state)
            target.keep(state, path)
            session.commit(tree, path, features[path] if tapped and features is not None else None)
            root = bonus
        if observe := getattr(builder, "observe", None):
            observe(tree, len(new), context)
        host_s += clock.lap("host")
        rounds.append(
            Round(
                context,
                tree.num_nodes,
                max(tree.depths),
                tree.expected_accepted,
                accepted,
                len(new),
                session.draft_s,
                verify_s,
                host_s,
                candidates=candidates_along(tree, path[: len(new)]),
            )
        )
    return DecodeResult(tokens, rounds, "eos" if stopped else "length", prefill_s, guard.fallbacks)


@torch.inference_mode()
def greedy(
    target: Target | PreTrainedModel,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int = 128,
    eos: int | Collection[int] | None = None,
) -> list[int]:
    """The target's own greedy text, one token per pass: the reference every lossless decoder must reproduce.

    Args:
        target: as in `decode`.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add, >= 1.
        eos: as in `decode`.

    Returns:
        The new tokens, an end-of-sequence token included.

    Raises:
        ValueError: as `decode`.
    """
    target = as_target(target)
    prompt, stops = checked_prompt(target, None, prompt_ids, max_new_tokens), eos_set(eos)
    state, tokens = target.start(prompt[:-1]), prompt[-1:]
    verify = verifier(target, "greedy")
    while True:
        tokens += greedy_ids(verify(state, Tree.root_only(tokens[-1])))
        if len(tokens) > max_new_tokens or tokens[-1] in stops:
            return tokens[1:]
        target.keep(state, [0])


class Backoff:
    """When a drafter whose logits were not finite is asked again: after 1, 2, 4, ... rounds while it keeps
    failing, so that a broken drafter costs little.

    Attributes:
        fallbacks: rounds without a draft so far.
    """

    def __init__(self) -> None:
        self.fallbacks = 0
        self._failures = self._wait = 0

    def resting(self) -> bool:
        """Whether this round goes undrafted."""
        if not self._wait:
            return False
        self._wait -= 1
        self.fallbacks += 1
        return True

    def failed(self) -> None:
        """Logits of this round were not finite."""
        self.fallbacks += 1
        self._failures += 1
        self._wait = min(2 ** (self._failures - 1) - 1, 63)

    def worked(self) -> None:
        """All logits of this round were finite."""
        self._failures = 0


def warn_non_finite(error: NonFiniteLogits, stacklevel: int) -> None:
    """Warn that the drafter produced non-finite logits; the output text is unaffected."""
    warnings.warn(
        f"{error}; this round is decoded without a draft, the text is unaffected. Check the drafter's "
        "weights and dtype.",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )


class _NonFiniteGuard(Backoff):
    """Build trees; a drafter whose logits are not finite costs the draft of that round, never the text."""

    def build(
        self, builder: TreeBuilder, session: DraftSession, root: int, max_depth: int, context: int
    ) -> Tree:
        session.begin()
        if max_depth and self.resting():
            return Tree.root_only(root)
        try:
            tree = builder.build(session, root, max_depth=max_depth, context=context)
        except NonFiniteLogits as error:
            session.abandon()
            if not self.fallbacks:
                warn_non_finite(error, stacklevel=3)
            self.failed()
            return Tree.root_only(root)
        self.worked()
        return tree


def as_target(target: Target | PreTrainedModel, taps: Sequence[int] = ()) -> Target:
    """A model as a target; a target as it is.

    Raises:
        ValueError: the target does not keep the layers that the drafter reads.
    """
    if isinstance(target, PreTrainedModel):
        return TargetRunner(target, taps)
    if taps and getattr(target, "taps", ()) != tuple(taps):
        raise ValueError(
            f"the drafter reads target layers {tuple(taps)}, this target {getattr(target, 'taps', ())}; "
            "make it with TargetRunner(model, drafter.taps)"
        )
    return target


def eos_set(eos: int | Collection[int] | None) -> frozenset[int]:
    """Tokens that end a text."""
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def candidates_along(tree: Tree, path: Sequence[int]) -> tuple[int, ...]:
    """Children of every slot of a path, as deep as the tree goes."""
    return tuple(len(tree.children[slot]) for slot in path)[: max(tree.depths)]


def cut(new: list[int], stops: Collection[int]) -> tuple[list[int], int, bool]:
    """A round's tokens up to its first stop token, how many are draft tokens, whether it stopped."""
    for count, token in enumerate(new, start=1):
        if token in stops:
            return new[:count], min(count, len(new) - 1), True
    return new, len(new) - 1, False


def checked_prompt(
    target: Target, drafter: Drafter | None, prompt_ids: Sequence[int] | Tensor, max_new_tokens: int
) -> list[int]:
    """The prompt as a list, once everything that can be refused before the first pass has been looked at."""
    prompt = [
        int(i) for i in (prompt_ids.flatten().tolist() if isinstance(prompt_ids, Tensor) else prompt_ids)
    ]
    if not prompt:
        raise ValueError("prompt_ids is empty; decoding needs at least one token to start from")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")
    if not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
        raise ValueError(
            f"prompt token ids reach from {min(prompt)} to {max(prompt)}, the target's vocabulary has "
            f"{target.vocab_size} tokens; was the prompt encoded with another tokenizer?"
        )
    total = len(prompt) + max_new_tokens
    limits = {"target": target.max_context}
    if drafter is not None:
        vocab_size = getattr(drafter, "vocab_size", target.vocab_size)
        if vocab_size != target.vocab_size:
            raise ValueError(
                f"the drafter's vocabulary has {vocab_size} tokens, the target's {target.vocab_size}; they "
                "must share one tokenizer. Train or export the drafter for this target."
            )
        limits["drafter"] = getattr(drafter, "max_context", None) or context_limit(drafter)
    for name, limit in limits.items():
        if limit is not None and total > limit:
            raise ValueError(
                f"context overflow: {len(prompt)} prompt tokens + {max_new_tokens} new ones = {total}, the "
                f"{name} reads at most {limit} positions. Shorten the prompt or lower max_new_tokens to "
                f"{max(limit - len(prompt), 0)}."
            )
    return prompt
