"""Reading a trace for evaluation: documents in batches, and both models at the same steps.

Hidden states of a batch are held; logits only for a chunk of counted steps at a time.

Axis letters: R documents of a batch · T tokens · H hidden · N steps · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates import Head
from certdraft.data import LogitHead
from certdraft.evaluation.measure.document_features import TargetFeatures
from certdraft.evaluation.measure.joined_steps import JoinedSteps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENTRIES_PER_CHUNK = 1 << 23  # float64 log-probabilities held at once: 64 MiB a model


class TraceRowLike(Protocol):
    """One document: `certdraft.data.TraceRow`."""

    @property
    def input_ids(self) -> Int[Tensor, " T"]: ...
    @property
    def loss_mask(self) -> Bool[Tensor, " T"]: ...
    @property
    def head(self) -> Head: ...


class TraceLike(Protocol):
    """`certdraft.data.Trace`, or rows in memory."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> TraceRowLike:
        """The document at `index`."""
        ...


class DrafterLike(Protocol):
    """A drafter that reads whole documents: a `CausalDrafter`, or anything with these two."""

    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """Last hidden states; tokens attend within equal document ids, -1 is padding. Drafters that read
        nothing but tokens need not take features."""
        ...

    def head(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Next-token logits."""
        ...


def concatenate(heads: Sequence[Head]) -> Head:
    """Heads over steps [N_i, K] as one over ΣN_i steps, in float32."""
    entropies = [h.entropy for h in heads]
    known = [e.float() for e in entropies if e is not None]
    return Head(
        torch.cat([h.ids for h in heads]),
        torch.cat([h.gap.float() for h in heads]),
        torch.cat([h.lse_gap.float() for h in heads]),
        heads[0].vocab_size,
        torch.cat(known) if len(known) == len(heads) else None,
    )


def greedy_tail(row: TraceRowLike) -> tuple[int, int] | None:
    """The last stretch of counted steps whose text is the target's own greedy choice: steps [start, stop).

    The tokens up to and including index `start` are the prompt of that continuation, those from `start + 1`
    to `stop` its text. None when the document has no such step.
    """
    ids, greedy = np.asarray(row.input_ids), np.asarray(row.head.greedy)
    good = np.asarray(row.loss_mask, dtype=bool)[:-1] & (
        ids[1:] == greedy[:-1]
    )  # nothing follows the last token
    if not good.any():
        return None
    stop = int(np.flatnonzero(good)[-1]) + 1
    broken = np.flatnonzero(~good[:stop])
    return (int(broken[-1]) + 1 if len(broken) else 0), stop


class OnlineTarget:
    """The target recomputed: fp32 logits of chosen positions only."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.body, self.head = model.base_model, LogitHead(model)

    def hidden(self, ids: Int[Tensor, "R T"], real: Bool[Tensor, "R T"]) -> Float[Tensor, "R T H"]:
        return self.body(input_ids=ids, attention_mask=real.long(), use_cache=False).last_hidden_state


def joined_steps(
    drafter: DrafterLike,
    target: OnlineTarget | None,
    rows: list[TraceRowLike],
    features: TargetFeatures | None = None,
) -> Iterator[tuple[JoinedSteps, Int[Tensor, "N 2"], int]]:
    """Both models at the counted steps of some documents, in chunks of bounded memory.

    Args:
        drafter: reads whole documents.
        target: recomputes the target's distributions; None uses the recorded heads.
        rows: the documents.
        features: what a drafter that reads the target's layers is given.

    Yields:
        The steps, their (row, position), and at how many the recomputed greedy token is not the recorded one.
    """
    length = max(len(r.input_ids) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    document = torch.full_like(ids, -1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], document[i, :n], mask[i, :n] = row.input_ids, i, row.loss_mask
    device = _device_of(drafter)
    ids, document = ids.to(device), document.to(device)
    position = torch.arange(length, device=device).expand_as(ids).contiguous()
    given = () if features is None else (features.padded(rows, length).to(device),)
    ours = drafter.hidden(ids, position, document, *given)
    theirs = None if target is None else target.hidden(ids, document >= 0)
    recorded = concatenate([r.head[torch.as_tensor(r.loss_mask, dtype=torch.bool)] for r in rows]).to(device)
    where = mask.nonzero()  # [N, 2]: row, position
    size = max(1, _ENTRIES_PER_CHUNK // recorded.vocab_size)
    for begin in range(0, len(where), size):
        part = where[begin : begin + size]
        at = (part[:, 0].to(device), part[:, 1].to(device))
        head = recorded[begin : begin + size]
        logits = drafter.head(ours[at])
        if target is None or theirs is None:
            yield JoinedSteps.from_logits(logits, head), part, 0
        else:
            seen = JoinedSteps.from_logits(logits, target.head(theirs[at]))
            yield seen, part, int((seen.head.greedy != head.greedy).sum())


def batches(
    trace: TraceLike, documents: int, tokens_per_batch: int
) -> Iterator[tuple[int, list[TraceRowLike]]]:
    """Runs of documents of at most `tokens_per_batch` padded tokens, at least one each."""
    rows: list[TraceRowLike] = []
    longest = first = 0
    for index in range(documents):
        row = trace.row(index)
        longest = max(longest, len(row.input_ids))
        if rows and longest * (len(rows) + 1) > tokens_per_batch:
            yield first, rows
            rows, longest, first = [], len(row.input_ids), index
        rows.append(row)
    if rows:
        yield first, rows


def _device_of(drafter: object) -> torch.device:
    parameters = getattr(drafter, "parameters", None)
    found = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if found is None else found.device


class Selection:
    """Some documents of a trace, in order: what `certify` and `evaluate` read when not all of it.

    Args:
        trace: the whole.
        indices: which documents.
    """

    def __init__(self, trace: TraceLike, indices: Sequence[int]) -> None:
        self.trace, self.indices = trace, list(indices)
        self.meta = getattr(trace, "meta", None)

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> TraceRowLike:
        """The document at `index` of the selection."""
        return self.trace.row(self.indices[index])


def select(trace: TraceLike, max_documents: int | None = None, min_prompt_tokens: int = 0) -> TraceLike:
    """The first documents whose prompt, the tokens up to the first counted step, is long enough.

    Raises:
        ValueError: no document is left.
    """
    if max_documents is None and min_prompt_tokens <= 1:
        return trace
    kept: list[int] = []
    for index in range(len(trace)):
        if max_documents is not None and len(kept) >= max_documents:
            break
        mask = np.asarray(trace.row(index).loss_mask, dtype=bool)
        if mask.any() and int(mask.argmax()) + 1 >= min_prompt_tokens:
            kept.append(index)
    if not kept:
        raise ValueError(
            f"none of the trace's {len(trace)} documents has a prompt of {min_prompt_tokens} tokens or more "
            "followed by counted steps; lower min_prompt_tokens, or record longer prompts"
        )
    return Selection(trace, kept)


@dataclass(frozen=True)
class Document:
    """A prompt and the target's greedy continuation, as recorded.

    Attributes:
        prompt: token ids, at least one.
        text: the continuation, at least one token.
        lead: nats between the target's greedy token and its runner-up, at each token of `text`.
        groups: what else its numbers are pooled by: prompts file, category.
    """

    prompt: list[int]
    text: list[int]
    lead: list[float]
    groups: tuple[str, ...] = ()


def greedy_documents(
    trace: TraceLike, limit: int | None = None, max_new_tokens: int | None = None
) -> list[Document]:
    """Prompts and greedy continuations of a trace, evenly spread over it.

    Documents whose counted text is not the target's greedy text (recorded from a corpus) are passed over.

    Args:
        trace: rows with token ids.
        limit: at most this many documents.
        max_new_tokens: cut continuations to this many tokens.

    Raises:
        ValueError: no document has a greedy continuation.
    """
    found = []
    for index in spread(len(trace), limit):
        row = trace.row(index)
        where = greedy_tail(row)
        if where is None:
            continue
        start, stop = where
        stop = stop if max_new_tokens is None else min(stop, start + max_new_tokens)
        ids = row.input_ids.tolist()
        lead = (
            row.head.gap[start:stop, 1].tolist() if row.head.num_kept > 1 else [float("inf")] * (stop - start)
        )
        groups = getattr(row, "groups", ())
        found.append(Document(ids[: start + 1], ids[start + 1 : stop + 1], lead, groups))
    if not found:
        raise ValueError(
            f"none of {len(trace)} documents holds a greedy continuation of the target, so no acceptance "
            "length can be read off them; record the trace with max_new_tokens > 0"
        )
    return found


def spread(total: int, limit: int | None) -> list[int]:
    """`limit` indices spread evenly over `total`, all of them when there are fewer.

    Examples:
        >>> spread(10, 3)
        [0, 3, 6]
    """
    if limit is None or limit >= total:
        return list(range(total))
    return [i * total // limit for i in range(limit)]
