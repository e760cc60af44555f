"""Exact replay: the rounds a drafter would have, from the target's greedy text alone.

Under `Strict` every accepted path is a prefix of the target's own greedy text, so the target need not run
again, and the drafter's context at every verified slot is a prefix of that text. For a conditional drafter
that reads tokens only:

* chains and static trees: whether the draft token at depth d is accepted depends only on the rank of the true
  next token in the drafter's distribution there. One teacher-forced pass gives all ranks; the rounds follow
  by counting;
* best-first trees: those of all places of the text are grown together (`parallel_replay`).

Everything else (cost-aware trees, which depend on the rounds before; marginal drafters; drafters that read
target features) goes through the live loop with the target replaced by its text: exact by construction, only
drafter passes. Features along the text come from one pass of the target over it.

The ranks come from one long pass, the live loop's from short cached ones: they can differ where two drafter
logits agree to rounding, never in float64 or where margins exceed it. Letters: T tokens of the text, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.decoding.acceptors import Verdict
from certdraft.decoding.builders import BestFirst, Chain, StaticTree, TreeBuilder
from certdraft.decoding.clock import TableClock
from certdraft.decoding.cost import CostModel
from certdraft.decoding.loop import cut, decode, eos_set
from certdraft.decoding.parallel_replay import best_first_rounds
from certdraft.decoding.ranking import rank_of
from certdraft.decoding.results import DecodeResult, Round
from certdraft.decoding.tree import Tree
from certdraft.drafters import Drafter

_CHUNK = 512  # rows of logits held at a time


def replay(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    builder: TreeBuilder | None = None,
    max_new_tokens: int | None = None,
    eos: int | Collection[int] | None = None,
    features: Float[Tensor, "T L H"] | None = None,
) -> DecodeResult:
    """The rounds of `decode(..., acceptor=Strict())` on a prompt whose greedy continuation is known.

    Args:
        drafter: the drafter; chains and static trees also need its `hidden` and `head`.
        prompt_ids: at least one token.
        tokens: the target's greedy continuation, an end-of-sequence token included.
        builder: as in `decode`; None is `Chain(4)`.
        max_new_tokens: what the live loop would be given; None is `len(tokens)`.
        eos: as in `decode`.
        features: tapped target layers along prompt and tokens, the last token excepted; for drafters that
            read them. `TargetRunner(model, drafter.taps)` gives them: `runner.features(runner.start(ids))`.

    Returns:
        Rounds without seconds; chains and static trees of conditional drafters also without `expected`.

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
    ended: Literal["eos", "length"] = "eos" if stopped else "length"
    in_parallel = drafter.kind == "conditional" and not drafter.taps
    if in_parallel and type(builder) is BestFirst:
        return DecodeResult(
            list(tokens), best_first_rounds(drafter, prompt_ids, tokens, builder, limit), ended
        )
    if not (in_parallel and type(builder) in (Chain, StaticTree)):
        return _through_the_loop(drafter, prompt_ids, tokens, builder, limit, eos, features)
    assert isinstance(builder, Chain | StaticTree)
    widths = (1,) * builder.depth if isinstance(builder, Chain) else builder.widths
    rounds = _count(greedy_ranks(drafter, prompt_ids, tokens), widths, len(prompt_ids), limit)
    return DecodeResult(list(tokens), rounds, ended)


def _through_the_loop(
    drafter: Drafter,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    builder: TreeBuilder,
    limit: int,
    eos: int | Collection[int] | None,
    features: Float[Tensor, "T L H"] | None,
) -> DecodeResult:
    """The live loop, its target a text."""
    text = _Text(tokens, drafter, features)
    free = TableClock(CostModel.table([1.0], 0.0))
    seen = _Overheard(drafter, text) if drafter.kind == "marginal" else drafter
    result = decode(text, cast(Drafter, seen), prompt_ids, builder, text, limit, eos, clock=free)
    rounds = [
        replace(r, draft_s=0.0, verify_s=0.0, host_s=0.0, bonus_rank=rank)
        for r, rank in zip(result.rounds, text.ranks, strict=True)
    ]
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
        drafter: needs `hidden(input_ids, position_ids, document_ids)` [1, T, H] and `head(hidden)` [..., V].
        prompt_ids: at least one token.
        tokens: the text after it, [T].
        features: as in `replay`.
    """
    device = next(drafter.parameters()).device
    ids = torch.tensor([*prompt_ids, *tokens[:-1]], device=device)[None]
    positions = torch.arange(ids.shape[1], device=device)[None]
    given = () if features is None else (features[None, : ids.shape[1]],)
    hidden = drafter.hidden(ids, positions, torch.zeros_like(ids), *given)[0, len(prompt_ids) - 1 :]
    wanted: Int[Tensor, " T"] = torch.tensor(tokens, device=device)
    ranks: list[int] = []
    for start in range(0, len(tokens), _CHUNK):
        rows = slice(start, start + _CHUNK)
        ranks += rank_of(drafter.head(hidden[rows]).float(), wanted[rows]).tolist()
    return ranks


def _count(ranks: Sequence[int], widths: Sequence[int], prompt: int, limit: int) -> list[Round]:
    """Rounds of a tree whose depth d holds the `widths[d - 1]` best children of every node above."""
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
        accepted = next((d for d in range(reach) if ranks[done + d] >= widths[d]), reach)
        committed = min(accepted + 1, len(ranks) - done)  # an accepted stop token is followed by nothing
        rounds.append(Round(prompt - 1 + done, sizes[depth], depth, None, accepted, committed))
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
        self.drafted: Float[Tensor, "D V"] | None = None  # what a marginal drafter said in this round
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
        """Follows the text; past its end the bonus does not matter, the loop has stopped."""
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


class _Overheard:
    """A marginal drafter whose answers the text sees too."""

    def __init__(self, drafter: Drafter, text: _Text) -> None:
        self._drafter, self._text = drafter, text

    def draft(self, state: Any, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "D V"]:
        self._text.drafted = self._drafter.draft(state, tokens, parents)
        return self._text.drafted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)
