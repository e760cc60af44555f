"""Documents of a trace for evaluation, their greedy continuations, and target hidden states along them.

Axis letters: R documents of a batch · T tokens · L aux hidden-state layers · H hidden · V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates import Head
from certdraft.decoding import TargetRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEATURE_BYTES = 4 << 30  # most host memory that a target's kept features take


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
        """Return the document at `index`."""
        ...


class Selection:
    """Some documents of a trace, in the order of `indices`."""

    def __init__(self, trace: TraceLike, indices: Sequence[int]) -> None:
        self.trace, self.indices = trace, list(indices)
        self.meta = getattr(trace, "meta", None)

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> TraceRowLike:
        """Return the document at `index` of the selection."""
        return self.trace.row(self.indices[index])


def select_documents(
    trace: TraceLike, max_documents: int | None = None, min_prompt_tokens: int = 0
) -> TraceLike:
    """Return the first documents whose prompt (tokens up to the first one in the loss mask) is long enough.

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


def batches(
    trace: TraceLike, documents: int, tokens_per_batch: int
) -> Iterator[tuple[int, list[TraceRowLike]]]:
    """Yield the first index and the rows of batches of at most `tokens_per_batch` padded tokens."""
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


def concatenate(heads: Sequence[Head]) -> Head:
    """Concatenate heads over steps [N_i, K] into one over ΣN_i steps, in float32."""
    entropies = [h.entropy for h in heads]
    known = [e.float() for e in entropies if e is not None]
    return Head(
        torch.cat([h.ids for h in heads]),
        torch.cat([h.gap.float() for h in heads]),
        torch.cat([h.lse_gap.float() for h in heads]),
        heads[0].vocab_size,
        torch.cat(known) if len(known) == len(heads) else None,
    )


@dataclass(frozen=True)
class Document:
    """A prompt and the target's greedy continuation, as recorded.

    Attributes:
        prompt: token ids, at least one.
        text: the continuation, at least one token.
        lead: nats between the target's greedy token and its runner-up, at each token of `text`.
        groups: what else its numbers are pooled by: prompts file, category.
        index: its row in the trace.
    """

    prompt: list[int]
    text: list[int]
    lead: list[float]
    groups: tuple[str, ...] = ()
    index: int | None = None


def greedy_documents(
    trace: TraceLike, limit: int | None = None, max_new_tokens: int | None = None
) -> list[Document]:
    """Return prompts and greedy continuations of a trace, evenly spread over it.

    Documents whose learned text is not the target's greedy text (recorded from a corpus) are skipped.

    Args:
        trace: rows with token ids.
        limit: at most this many documents.
        max_new_tokens: cut continuations to this many tokens.

    Raises:
        ValueError: no document has a greedy continuation.
    """
    found = []
    for index in evenly_spaced(len(trace), limit):
        row = trace.row(index)
        where = greedy_tail(row)
        if where is None:
            continue
        start, stop = where
        stop = stop if max_new_tokens is None else min(stop, start + max_new_tokens)
        ids, lead = row.input_ids.tolist(), [float("inf")] * (stop - start)
        if row.head.num_kept > 1:
            lead = row.head.gap[start:stop, 1].tolist()
        groups = getattr(row, "groups", ())
        found.append(Document(ids[: start + 1], ids[start + 1 : stop + 1], lead, groups, index))
    if not found:
        raise ValueError(
            f"none of {len(trace)} documents holds a greedy continuation of the target, so no acceptance "
            "length can be read off them; record the trace with max_new_tokens > 0"
        )
    return found


def tie_gap_of(trace: TraceLike) -> float:
    """Lead of the greedy token, nats, that rounding alone can turn: by the dtype the target was recorded in.

    Logits are projected in fp32, but hidden states in half precision move them by hundredths of a nat.
    """
    meta = getattr(trace, "meta", None)
    return 1e-3 if getattr(meta, "dtype", "float32") == "float32" else 0.1


def greedy_tail(row: TraceRowLike) -> tuple[int, int] | None:
    """Return the last stretch [start, stop) of counted steps whose text is the target's own greedy choice.

    The tokens up to and including index `start` are the prompt of that continuation, those from `start + 1`
    to `stop` its text. None when the document has no such step.
    """
    ids, greedy = np.asarray(row.input_ids), np.asarray(row.head.greedy)
    # nothing follows the last token
    good = np.asarray(row.loss_mask, dtype=bool)[:-1] & (ids[1:] == greedy[:-1])
    if not good.any():
        return None
    stop = int(np.flatnonzero(good)[-1]) + 1
    broken = np.flatnonzero(~good[:stop])
    return (int(broken[-1]) + 1 if len(broken) else 0), stop


def evenly_spaced(total: int, limit: int | None) -> list[int]:
    """Return `limit` indices spread evenly over `total`, all of them when there are fewer.

    Examples:
        >>> evenly_spaced(10, 3)
        [0, 3, 6]
    """
    if limit is None or limit >= total:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


class DrafterFeatures(ABC):
    """Hidden states of the target's layers that a drafter reads, along documents of a trace."""

    @abstractmethod
    def along(self, ids: Sequence[int], document: int | None = None) -> Float[Tensor, "T L H"]:
        """Return the features at every token of a text; `document` is its row in the trace, if it has one."""

    def padded(self, rows: Sequence[TraceRowLike], first: int, length: int) -> Float[Tensor, "R T L H"]:
        """Return the features of the documents from row `first` on, with zeros after their ends."""
        each = [self.along(row.input_ids.tolist(), first + i) for i, row in enumerate(rows)]
        batch = each[0].new_zeros(len(each), length, *each[0].shape[1:])
        for index, found in enumerate(each):
            batch[index, : len(found)] = found
        return batch


class RecordedFeatures(DrafterFeatures):
    """The features that a trace holds, of its documents and their prefixes; the target does not run.

    Args:
        trace: recorded with these layers among its `feature_layers`.
        layers: the layers, see `certdraft.drafters.Drafter.taps`.
    """

    def __init__(self, trace: TraceLike, layers: Sequence[int]) -> None:
        self._trace = trace
        self._columns = [_recorded_layers(trace).index(layer) for layer in layers]

    def along(self, ids: Sequence[int], document: int | None = None) -> Float[Tensor, "T L H"]:
        """See `DrafterFeatures.along`; raise ValueError for a text that the trace does not hold."""
        row: Any = None if document is None else self._trace.row(document)
        if row is None or row.input_ids[: len(ids)].tolist() != list(ids):
            raise ValueError("a text that is not in the trace has no recorded features; give the target")
        features: Tensor = row.features[: len(ids), self._columns]
        return features


class TargetFeatures(DrafterFeatures):
    """Hidden states of the target's layers that a drafter reads, one target pass per document.

    Args:
        model: the target.
        layers: the layers, see `certdraft.drafters.Drafter.taps`.
        keep: documents whose features several measurements need; they are kept in host memory (4 GiB at
            most) and serve every prefix of the document.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], keep: Collection[int] = ()) -> None:
        self.runner = TargetRunner(model, layers)
        self.passes = 0
        self._keep, self._bytes = frozenset(keep), 0
        self._kept: dict[int, tuple[list[int], Tensor]] = {}

    @torch.inference_mode()
    def along(self, ids: Sequence[int], document: int | None = None) -> Float[Tensor, "T L H"]:
        ids = list(ids)
        if document in self._kept:
            known, kept = self._kept[document]
            if known[: len(ids)] == ids:
                return kept[: len(ids)].to(self.runner.device)
        found = self.runner.features(self.runner.start(ids))
        assert found is not None
        self.passes += 1
        if document in self._keep and self._bytes + found.nbytes <= _FEATURE_BYTES:
            self._kept[document] = ids, found.cpu()
            self._bytes += found.nbytes
        return found


def features_for(
    drafters: Mapping[str, Any],
    model: PreTrainedModel | None,
    keep: Collection[int] = (),
    trace: TraceLike | None = None,
) -> dict[str, DrafterFeatures | None]:
    """Return what each drafter reads of the target: None, or features shared by drafters of equal layers.

    They are computed by the target where it is given, else read from the trace.

    Raises:
        ValueError: a drafter reads layers that the trace does not hold, and there is no target.
    """
    shared: dict[tuple[int, ...], DrafterFeatures] = {}
    found: dict[str, DrafterFeatures | None] = {}
    recorded = _recorded_layers(trace)
    for name, drafter in drafters.items():
        layers = tuple(getattr(drafter, "taps", ()))
        if layers and model is None and not set(layers) <= set(recorded):
            held = f"holds those of layers {list(recorded)}" if recorded else "holds none"
            raise ValueError(
                f"the drafter {name} reads the target's layers {list(layers)}, and the trace {held}. "
                f"Record a trace with --feature_layers '{list(layers)}', or use `certdraft evaluate "
                "--target`, which computes them along the texts."
            )
        if layers and layers not in shared:
            if model is not None:
                shared[layers] = TargetFeatures(model, layers, keep)
            elif trace is not None:
                shared[layers] = RecordedFeatures(trace, layers)
        found[name] = shared.get(layers)
    return found


def _recorded_layers(trace: TraceLike | None) -> tuple[int, ...]:
    return tuple(getattr(getattr(trace, "meta", None), "feature_layers", ()))
