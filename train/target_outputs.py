"""Target logits and hidden states for a batch, from a trace or from a model run beside the drafter.

Axis letters: R rows · T tokens · L aux layers · H hidden · N token positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from certdraft.data import Batch, load_target
from certdraft.drafters import CachedLM
from certdraft.losses import OnlineTarget, TargetBatch, next_tokens
from certdraft.support import HiddenStates, facts_of, text_body


@dataclass(frozen=True)
class TargetSettings:
    """Which model is the target, and how much of its distribution the loss gets.

    Args:
        name: "embedded", a local folder, or a hub name such as "Qwen/Qwen3-8B".
        revision: hub revision.
        dtype: dtype of its weights; logits are fp32 whatever it is.
        num_kept: most probable tokens kept per token position.
        full: also give the loss the full distribution.
        logits: false takes only hidden states from the running target, for drafters that read them; its
            distributions then come from the trace, and its lm_head is not run.
    """

    name: str = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_kept: int = 32
    full: bool = True
    logits: bool = True


class Online:
    """The frozen target. Not an nn.Module, so that it stays out of checkpoints, wrappers and train mode.

    Args:
        settings: which model.
    """

    def __init__(self, settings: TargetSettings) -> None:
        self.settings = settings

    @cached_property
    def model(self) -> PreTrainedModel:
        """The target, loaded when it is first needed: after the settings were checked and traces recorded."""
        settings = self.settings
        return load_target(settings.name, revision=settings.revision, dtype=getattr(torch, settings.dtype))

    @property
    def vocab_size(self) -> int:
        """V, padding rows included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def to(self, device: torch.device) -> None:
        """Move the target to where the drafter trains, and check there that its logits are lm_head(hidden).

        Raises:
            ValueError: a target that decoding would refuse too: soft-capped logits, layers of unknown kinds;
                names its class.
        """
        torch.nn.Module.to(self.model, device)
        CachedLM(self.model)

    @torch.no_grad()
    def read(self, batch: Batch, taps: Sequence[int] = ()) -> TargetOutputs:
        """Run the target over a batch, up to its last hidden states.

        Without a cache, transformers keeps packed documents apart where positions restart; a target with
        linear attention would not, and reads them one after the other.

        Args:
            batch: packed rows.
            taps: aux layers whose outputs are wanted, 0-based.
        """
        body = text_body(self.model)
        one = _documents if facts_of(self.model).recurrent else _rows
        parts: list[tuple[Tensor, Tensor | None]] = []
        with HiddenStates(body, taps).recorded() as states:
            for ids, positions in one(batch):
                output = body(input_ids=ids, position_ids=positions, use_cache=False)
                parts.append((output.last_hidden_state, states.take() if taps else None))
        last, features = (_joined([part[i] for part in parts], batch.input_ids.shape) for i in (0, 1))
        if not self.settings.logits:
            return TargetOutputs(batch, features)
        assert last is not None
        hidden = last.flatten(0, 1)
        head: Any = self.model.get_output_embeddings()
        target = OnlineTarget(
            hidden, head.weight, self.settings.num_kept, self.settings.full, bias=getattr(head, "bias", None)
        )
        return TargetOutputs(batch, features, target)


def _rows(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and positions of the batch as it is, in one pass."""
    yield batch.input_ids, batch.position_ids


def _documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and positions of one document after the other, in the order of the packed rows."""
    for ids, positions, documents in zip(
        batch.input_ids, batch.position_ids, batch.document_ids, strict=True
    ):
        _, counts = documents.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        for own, places in zip(ids.split(sizes), positions.split(sizes), strict=True):
            yield own[None], places[None]


def _joined(parts: Sequence[Tensor | None], shape: torch.Size) -> Tensor | None:
    """Outputs of passes as rows of a batch again."""
    found = [part.flatten(0, 1) for part in parts if part is not None]
    return torch.cat(found).unflatten(0, shape) if found else None


@dataclass(frozen=True)
class TargetOutputs:
    """Target distributions and hidden states for a batch.

    Args:
        batch: packed rows.
        features: outputs of the aux layers, for drafters that read them.
        online: the running target at all token positions, flattened; None: the batch's recorded top-k logits.
    """

    batch: Batch
    features: Float[Tensor, "R T L H"] | None
    online: OnlineTarget | None = None

    def at(
        self, steps: Int[Tensor, " N"], depths: Int[Tensor, " N"] | None = None
    ) -> TargetBatch | OnlineTarget:
        """The target at some of the flattened token positions.

        Args:
            steps: which positions.
            depths: draft depth of each, from 1, for losses that depend on it.

        Raises:
            ValueError: the batch holds no recorded logits, and no target was run.
        """
        batch = self.batch
        labels = next_tokens(batch.input_ids, batch.document_ids).flatten()[steps]
        if self.online is not None:
            return replace(self.online, hidden=self.online.hidden[steps], next_ids=labels, depths=depths)
        if batch.head is None:
            raise ValueError(
                "the batches hold no target logits; give model.target, or data with recorded traces"
            )
        num = batch.input_ids.shape[1]
        return TargetBatch(batch.head[steps // num, steps % num], next_ids=labels, depths=depths)


def recorded(batch: Batch, taps: Sequence[int], layers: Sequence[int]) -> TargetOutputs:
    """Target outputs for a batch as a trace holds them."""
    if not taps or batch.features is None:
        return TargetOutputs(batch, None)
    index = [list(layers).index(tap) for tap in taps]
    return TargetOutputs(batch, batch.features[:, :, index] if list(taps) != list(layers) else batch.features)
