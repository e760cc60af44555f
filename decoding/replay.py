"""Exact replay: the rounds a drafter would have, from the target's greedy text alone.

Under `Strict` every accepted path is a prefix of the target's own greedy text, so the target need not run
again, and the drafter's context at every verified slot is a prefix of that text. Two consequences:

* chains and static trees: whether the draft token at depth d is accepted depends only on the rank of the true
  next token in the drafter's distribution there. One teacher-forced pass gives all ranks; the rounds follow
  by counting;
* any other builder: the live loop with the target replaced by its text; exact by construction, only drafter
  passes.

The ranks come from one long pass, the live loop's from short cached ones: they can differ where two drafter
logits agree to rounding, never in float64 or where margins exceed it. Letters: T tokens of the text, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from certdraft.decoding.acceptors import Verdict
from certdraft.decoding.builders import Chain, StaticTree, TreeBuilder
from certdraft.decoding.clock import TableClock
from certdraft.decoding.cost import CostModel
from certdraft.decoding.loop import cut, decode, eos_set
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
) -> DecodeResult:
    """The rounds of `decode(..., acceptor=Strict())` on a prompt whose greedy continuation is known.

    Args:
        drafter: the drafter; chains and static trees also need its `hidden` and `head`.
        prompt_ids: at least one token.
        tokens: the target's greedy continuation, an end-of-sequence token included.
        builder: as in `decode`; None is `Chain(4)`.
        max_new_tokens: what the live loop would be given; None is `len(tokens)`.
        eos: as in `decode`.

    Returns:
        Rounds without seconds; chains and static trees also without `expected`.

    Raises:
        ValueError: the drafter reads target features; `tokens` ends neither with a stop token nor after
            `max_new_tokens` tokens, or stops twice.
        NonFiniteLogits: chains and static trees: the drafter's logits are not finite.
    """
    if drafter.taps:
        raise ValueError(
            f"replay: the drafter reads target layers {tuple(drafter.taps)}, which a text lacks; decode live"
        )
    builder, limit, stops = builder or Chain(), max_new_tokens or len(tokens), eos_set(eos)
    cut_short, _, stopped = cut(list(tokens), stops)
    if len(cut_short) != len(tokens) or not (stopped or len(tokens) == limit):
        raise ValueError(
            f"replay: {len(tokens)} tokens, the text ends after {len(cut_short)}, max_new_tokens is {limit}; "
            "pass the whole greedy continuation up to its stop token or its limit"
        )
    if not isinstance(builder, Chain | StaticTree) or drafter.kind != "conditional":
        text = _Text(tokens, drafter.vocab_size)
        free = TableClock(CostModel.table([1.0], 0.0))
        result = decode(text, drafter, prompt_ids, builder, text, limit, eos, clock=free)
        rounds = [
            Round(r.context, r.nodes, r.depth, r.expected, r.accepted, r.committed) for r in result.rounds
        ]
        return DecodeResult(result.tokens, rounds, result.stopped, fallbacks=result.fallbacks)
    widths = (1,) * builder.depth if isinstance(builder, Chain) else builder.widths
    rounds = _count(greedy_ranks(drafter, prompt_ids, tokens), widths, len(prompt_ids), limit)
    return DecodeResult(list(tokens), rounds, "eos" if stopped else "length")


@torch.inference_mode()
def greedy_ranks(drafter: Drafter, prompt_ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Rank of each token of a text under the drafter, given the true tokens before it; 0 = its greedy token.

    Args:
        drafter: needs `hidden(input_ids, position_ids, document_ids)` [1, T, H] and `head(hidden)` [..., V].
        prompt_ids: at least one token.
        tokens: the text after it, [T].
    """
    device = next(drafter.parameters()).device
    ids = torch.tensor([*prompt_ids, *tokens[:-1]], device=device)[None]
    positions = torch.arange(ids.shape[1], device=device)[None]
    hidden = drafter.hidden(ids, positions, torch.zeros_like(ids))[0, len(prompt_ids) - 1 :]
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

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._tokens, self._done, self.vocab_size = tokens, 0, vocab_size

    def start(self, ids: Sequence[int]) -> None:
        return None

    def verify(self, state: None, tree: Tree) -> Tensor:
        return torch.empty(0)

    def features(self, state: None) -> None:
        return None

    def keep(self, state: None, path: Sequence[int]) -> None:
        return None

    def walk(self, tree: Tree, logits: Tensor) -> Verdict:
        """Follows the text; past its end the bonus does not matter, the loop has stopped."""
        slot, path = 0, [0]
        while self._done < len(self._tokens):
            token = self._tokens[self._done]
            self._done += 1
            child = tree.children[slot].get(token)
            if child is None:
                return Verdict(path, token)
            path.append(child)
            slot = child
        return Verdict(path, self._tokens[-1])
