"""Exact replay: the rounds a drafter would have, from the target's greedy text only.

Under `Strict` every accepted path is a prefix of the target's own greedy text, so the target need not run
again, and the drafter's context at every verified slot is a prefix of that text. Three ways, the cheapest
first:

* one teacher-forced pass (`one_pass`): chains and static trees, where whether the draft token at depth d is
  accepted depends only on the rank of the true token there; and best-first trees of marginal drafters;
* the trees of all places grown together (`parallel_replay`): best-first trees of conditional drafters that
  read tokens only;
* the live loop with its target replaced by the text: the rest, such as cost-aware trees, which depend on the
  rounds before. Exact by construction, only drafter passes.

Drafters that read target features are given those of one target pass over the text.

The ranks come from one long pass, the live loop's from short cached ones: they can differ where two drafter
logits agree to rounding, never in float64 or where margins exceed it. Letters: T tokens of the text, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.decoding.acceptors import Verdict
from certdraft.decoding.cost.cost_model import Clock, CostModel, TableClock
from certdraft.decoding.loop import DecodeResult, Round, cut, decode, eos_set
from certdraft.decoding.replay.parallel_replay import OnePass, grow_everywhere, marginal_tree, walk_text
from certdraft.decoding.trees.builders import BestFirst, Chain, StaticTree, TreeBuilder
from certdraft.decoding.trees.ranking import rank_of
from certdraft.decoding.trees.tree import Tree
from certdraft.drafters import Drafter


def replay(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    builder: TreeBuilder | None = None,
    max_new_tokens: int | None = None,
    eos: int | Collection[int] | None = None,
    features: Float[Tensor, "T L H"] | None = None,
    clock: Clock | None = None,
) -> DecodeResult:
    """The rounds of `decode(..., acceptor=Strict())` on a prompt whose greedy continuation is known.

    Args:
        drafter: the drafter; needs `hidden` and `head` too, or goes through the loop.
        prompt_ids: at least one token.
        tokens: the target's greedy continuation, an end-of-sequence token included.
        builder: as in `decode`; None is `Chain(4)`.
        max_new_tokens: what the live loop would be given; None is `len(tokens)`.
        eos: as in `decode`.
        features: tapped target layers along prompt and tokens, the last token excepted; for drafters that
            read them. `TargetRunner(model, drafter.taps)` gives them: `runner.features(runner.start(ids))`.
        clock: prices the rounds, as a `TableClock` does with costs of another machine; they then come from
            the loop, whatever the tree.

    Returns:
        Rounds, without seconds unless a clock is given; chains and static trees of conditional drafters
        also without `expected`, unless a clock is given.

    Raises:
        ValueError: features missing or of another length; `tokens` ends neither with a stop token nor after
            `max_new_tokens` tokens, or stops twice.
        NonFiniteLogits: where the text is not decoded round by round: the drafter's logits are not finite.
    """
    needed = len(prompt_ids) + len(tokens) - 1
    if drafter.taps and (features is None or len(features) < needed):
        raise ValueError(
            f"replay: the drafter reads target layers {tuple(drafter.taps)}; pass their outputs at the first "
            f"{needed} tokens of prompt and text as `features`"
            + ("" if features is None else f", these are of {len(features)}")
        )
    builder, limit, stops = builder or Chain(), max_new_tokens or len(tokens), eos_set(eos)
    cut_short, _, stopped = cut(list(tokens), stops)
    if len(cut_short) != len(tokens) or not (stopped or len(tokens) == limit):
        raise ValueError(
            f"replay: {len(tokens)} tokens, the text ends after {len(cut_short)}, max_new_tokens is {limit}; "
            "pass the whole greedy continuation up to its stop token or its limit"
        )
    rounds = None
    if clock is None:
        with torch.inference_mode():
            rounds = _at_once(drafter, prompt_ids, tokens, builder, limit, features)
    if rounds is None:
        return _through_the_loop(drafter, prompt_ids, tokens, builder, limit, eos, features, clock)
    return DecodeResult(list(tokens), rounds, "eos" if stopped else "length")


def _at_once(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    builder: TreeBuilder,
    limit: int,
    features: Float[Tensor, "T L H"] | None,
) -> list[Round] | None:
    """Rounds without a sequential loop; None where only the loop can give them."""
    plain, marginal = drafter.kind == "conditional" and not drafter.taps, drafter.kind == "marginal"
    if not (plain or hasattr(drafter, "paths")):
        return None
    if type(builder) in (Chain, StaticTree):
        assert isinstance(builder, Chain | StaticTree)
        widths = (1,) * builder.depth if isinstance(builder, Chain) else builder.widths
        known = OnePass(drafter, prompt_ids, tokens, len(widths), features)
        return _count(known, widths[: known.depth], len(prompt_ids), limit) if known.whole else None
    if type(builder) is not BestFirst:
        return None
    if plain:
        trees = grow_everywhere(drafter, prompt_ids, tokens, builder, limit)
        return walk_text(trees.__getitem__, tokens, len(prompt_ids))
    if not marginal:
        return None
    known = OnePass(drafter, prompt_ids, tokens, builder.max_depth, features)
    if not known.whole:
        return None
    rows, roots = known.rows(builder.budget, builder.temperature), [*prompt_ids[-1:], *tokens]

    def tree(place: int) -> Tree:
        depth = min(builder.max_depth, limit - place - 1)
        return marginal_tree(roots[place], rows[place], builder, depth)

    ranks, first = known.ranks(), len(prompt_ids) - 1
    return [
        replace(r, bonus_rank=ranks[r.context - first][r.accepted]) if r.accepted < r.depth else r
        for r in walk_text(tree, tokens, len(prompt_ids))
    ]


def _through_the_loop(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    builder: TreeBuilder,
    limit: int,
    eos: int | Collection[int] | None,
    features: Float[Tensor, "T L H"] | None,
    clock: Clock | None = None,
) -> DecodeResult:
    """The live loop, its target a text."""
    text = _Text(tokens, drafter, features)
    seen = _Observed(drafter, text) if drafter.kind == "marginal" else drafter
    timed = clock or TableClock(CostModel.table([1.0], 0.0))
    result = decode(text, cast(Drafter, seen), prompt_ids, builder, text, limit, eos, clock=timed)
    rounds = [replace(r, bonus_rank=rank) for r, rank in zip(result.rounds, text.ranks, strict=True)]
    if clock is None:
        rounds = [replace(r, draft_s=0.0, verify_s=0.0) for r in rounds]
    return DecodeResult(result.tokens, rounds, result.stopped, fallbacks=result.fallbacks)


@torch.inference_mode()
def greedy_ranks(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    features: Float[Tensor, "T L H"] | None = None,
) -> list[int]:
    """Rank of each token of a text under the drafter, given the true tokens before it; 0 = its greedy token.

    Args:
        drafter: needs `hidden(input_ids, position_ids, document_ids)` [1, T, H] and `head(hidden)` [..., V];
            one that reads features or is marginal needs `paths`. Asked for its first draft at every place.
        prompt_ids: at least one token.
        tokens: the text after it, [T].
        features: as in `replay`.

    Returns:
        One rank per token; none at all where the drafter cannot start at every token.
    """
    known = OnePass(drafter, prompt_ids, tokens, 1, features)
    return [first for first, *_ in known.ranks()] if known.whole else []


def _count(known: OnePass, widths: Sequence[int], prompt: int, limit: int) -> list[Round]:
    """Rounds of a tree whose depth d holds the `widths[d - 1]` best children of every node above."""
    ranks = known.ranks()

    def rank(place: int, depth: int) -> int:
        return ranks[place][depth] if known.by_depth else ranks[place + depth][0]

    sizes = [0]
    product = 1
    for width in widths:
        product *= width
        sizes.append(sizes[-1] + product)
    rounds: list[Round] = []
    done = 0
    while done < len(ranks):
        depth = min(len(widths), limit - done - 1)
        reach = min(depth, len(ranks) - done)
        accepted = next((d for d in range(reach) if rank(done, d) >= widths[d]), reach)
        committed = min(accepted + 1, len(ranks) - done)  # an accepted stop token is followed by nothing
        bonus = rank(done, accepted) if accepted < reach else None
        offered = tuple(widths[: min(committed, depth)])
        size, context = sizes[depth], prompt - 1 + done
        rounds.append(
            Round(context, size, depth, None, accepted, committed, bonus_rank=bonus, candidates=offered)
        )
        done += committed
    return rounds


class _Text:
    """A target and its acceptor in one, which know the greedy text and compute nothing."""

    lossless = True
    max_context = None

    def __init__(
        self, tokens: Sequence[int], drafter: Drafter, features: Float[Tensor, "T L H"] | None
    ) -> None:
        self.taps, self.vocab_size = drafter.taps, drafter.vocab_size
        self.ranks: list[int | None] = []
        self.drafted: Float[Tensor, "D V"] | None = None  # logits of a marginal drafter in this round
        self._tokens, self._features = tokens, features
        self._done = self._context = 0
        self._tree: Tree | None = None
        self._path = [0]

    def start(self, ids: Sequence[int]) -> None:
        self._context = len(ids)

    def verify(self, state: None, tree: Tree) -> Tensor:
        self._tree = tree
        return torch.empty(0)

    def features(self, state: None) -> Float[Tensor, "S L H"] | None:
        """Of the prompt, then of the text at the slots of the path; the other slots are not read."""
        if self._features is None or self._tree is None:
            return None if self._features is None else self._features[: self._context]
        found = self._features.new_zeros(len(self._tree.tokens), *self._features.shape[1:])
        found[self._path] = self._features[self._context : self._context + len(self._path)]
        return found

    def keep(self, state: None, path: Sequence[int]) -> None:
        self._context += len(path)

    def walk(self, tree: Tree, logits: Tensor) -> Verdict:
        """Follow the text; past its end the bonus does not matter, the loop has stopped."""
        slot, path = 0, [0]
        bonus = self._tokens[-1]
        while self._done < len(self._tokens):
            token = self._tokens[self._done]
            self._done += 1
            child = tree.children[slot].get(token)
            if child is None:
                bonus = token
                break
            path.append(child)
            slot = child
        self._path = path
        self.ranks.append(self._rank(len(path) - 1, bonus))
        return Verdict(path, bonus)

    def _rank(self, accepted: int, bonus: int) -> int | None:
        drafted, self.drafted = self.drafted, None
        if drafted is None or accepted >= len(drafted):
            return None
        return int(rank_of(drafted[accepted : accepted + 1], torch.tensor([bonus], device=drafted.device)))


class _Observed:
    """A marginal drafter whose logits are kept for the ranks of the text."""

    def __init__(self, drafter: Drafter, text: _Text) -> None:
        self.wrapped, self._text = drafter, text

    def draft_narrow(self, state: Any, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "D V"]:
        self._text.drafted = self.wrapped.draft(state, tokens, parents)
        return self._text.drafted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)
