"""What drafters that read target features have in common: the target's two ends, its layers, `build`.

They embed tokens with the target's own embeddings, and those without a head of their own decode with the
target's. These ends are the target's frozen weights: held by reference, moved along, never trained, never in
a state dict.

Letters: L tapped layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from certdraft.drafters.features.transformer_layer import LayerSizes, RMSNorm
from certdraft.drafters.formats.format_files import Weights, check_names
from certdraft.drafters.lm.cached_lm import split_causal_lm
from certdraft.drafters.protocol import Drafter

Config = TypeVar("Config", bound=LayerSizes)
_SHORT_UNTIL = 0.5  # benchmarks/families.py


@dataclass(frozen=True)
class TargetEnds:
    """The parts of a target that a drafter uses as they are: its own parameters, so that moving the target
    moves them.

    Attributes:
        embeddings: [V, H].
        head: [V, H], the same tensor where the target ties them.
        norm: [H], weight of the norm before the head; None where it has none to copy.
    """

    embeddings: Tensor
    head: Tensor
    norm: Tensor | None

    @classmethod
    def of(cls, target: PreTrainedModel) -> TargetEnds:
        """The ends of a causal LM."""
        body, head = split_causal_lm(target)  # refuses a target whose logits are not head(hidden)
        parts: list[Any] = [target.get_input_embeddings(), head]
        norm = getattr(getattr(body, "norm", None), "weight", None)
        return cls(parts[0].weight, parts[1].weight, norm)

    def moved(self, move: Callable[[Tensor], Tensor]) -> TargetEnds:
        """The same weights elsewhere; tied ones stay tied."""
        embeddings = move(self.embeddings)
        head = embeddings if self.head is self.embeddings else move(self.head)
        return TargetEnds(embeddings, head, None if self.norm is None else move(self.norm))


class FeatureDrafter(Drafter):
    """Base of `EagleDrafter` and `BlockDrafter`.

    Args:
        config: sizes of a fresh network; not with `pretrained`.
        pretrained: folder or hub id of a published drafter to start from.
        init_from_target: what a fresh network takes from its target; each kind says.
        short_until: share of the training in which rounds of a single draft token are trained, full ones
            after it; None: half for a fresh network, nothing for a published one.
        dtype: of the parameters.
        gradient_checkpointing: recompute parts of the forward pass in the backward pass, for memory.

    Raises:
        ValueError: `config` given with `pretrained`; `short_until` outside [0, 1).

    Attributes:
        ends: of the target; None until `build`.
        num_target_layers: of the target; 0 until `build`.
    """

    config: LayerSizes
    ends: TargetEnds | None = None
    num_target_layers: int = 0

    def __init__(
        self,
        config: LayerSizes | None,
        pretrained: str | None,
        init_from_target: bool,
        short_until: float | None,
        dtype: Literal["float32", "bfloat16"],
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        if config is not None and pretrained is not None:
            raise ValueError("give config for a fresh drafter or pretrained for a published one, not both.")
        if short_until is None:
            short_until = _SHORT_UNTIL if pretrained is None else 0.0
        if not 0.0 <= short_until < 1.0:
            raise ValueError(f"short_until is {short_until}; it is a share of the training, in [0, 1).")
        self.short_until, self._short = short_until, False
        self.pretrained, self.init_from_target = pretrained, init_from_target
        self.parameter_dtype: torch.dtype = getattr(torch, dtype)
        self.gradient_checkpointing = gradient_checkpointing

    @abstractmethod
    def build(self, vocab_size: int, target: PreTrainedModel | None = None) -> Self:
        """Makes the network for a target, or checks a pretrained one against it; called once."""

    def at(self, progress: float) -> None:
        """See `Drafter.at`: one draft token a round until `short_until`.

        What a round's first draft token learns serves all later ones, and costs a fraction of a full round.
        """
        self._short = progress < self.short_until

    @abstractmethod
    def adopt(self, weights: Weights, where: str) -> None:
        """Makes the network of `config` with these weights; `ends` and `num_target_layers` are known.

        Args:
            weights: every tensor of the network, and no other.
            where: they come from, for messages.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """

    @property
    def vocab_size(self) -> int:
        """Entries of the target's vocabulary."""
        return len(self._ends.embeddings)

    @property
    def max_context(self) -> int | None:
        """`max_position_embeddings` of the config."""
        return self.config.max_position_embeddings

    @property
    def _ends(self) -> TargetEnds:
        if self.ends is None:
            raise ValueError(
                f"{type(self).__name__} has no target yet: call build(vocab_size, target) with the model it "
                "drafts for; it reads that model's embeddings."
            )
        return self.ends

    def embed(self, ids: Int[Tensor, "*step"]) -> Float[Tensor, "*step H"]:
        """The target's embeddings of tokens, in the dtype of the drafter."""
        return functional.embedding(ids, self._ends.embeddings.detach()).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.ends is not None:
            self.ends = self.ends.moved(fn)
        return self

    def _settle(self) -> None:
        """Moves a network just made to the target's device, its parameters to their dtype."""
        self.to(device=self._ends.embeddings.device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.parameter_dtype)

    def _load(self, weights: Weights, where: str) -> None:
        check_names(weights, self.state_dict(), where)
        self.load_state_dict(weights)

    def _check_target(self, vocab_size: int, target: PreTrainedModel | None) -> PreTrainedModel:
        name = type(self).__name__
        if target is None:
            raise ValueError(
                f"{name} reads its target's layers and embeddings: build needs the target itself."
            )
        embeddings: Any = target.get_input_embeddings()
        if len(embeddings.weight) != vocab_size:
            raise ValueError(
                f"{name}: the target embeds {len(embeddings.weight)} tokens, its vocabulary is said to have "
                f"{vocab_size}; pass the size of its logits, padding included."
            )
        return target

    def _features(self, features: Tensor | None, num: int | None = None) -> Tensor:
        """Features, checked: [..., L, H]."""
        if features is None:
            raise ValueError(
                f"{type(self).__name__} reads target layers {self.taps} and got no features; give the "
                "outputs of these layers, from a trace recorded with them or from the target run beside it."
            )
        expected = (len(self.taps), self._ends.embeddings.shape[1])
        if tuple(features.shape[-2:]) != expected or (num is not None and len(features) != num):
            raise ValueError(
                f"{type(self).__name__}: features have shape {list(features.shape)}, expected "
                f"[{'…' if num is None else num}, {expected[0]}, {expected[1]}]: the target's layers "
                f"{self.taps}."
            )
        return features.to(self._dtype)


def complete_sizes(sizes: LayerSizes, target: PreTrainedModel) -> dict[str, Any]:
    """Every size of a layer, those left open taken from the target's config.

    Raises:
        ValueError: a hidden size that is not the target's, heads that do not divide.
    """
    config = target.config
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    rope = getattr(config, "rope_parameters", None) or {}
    theirs: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 4096,
    }
    mine = {key: getattr(sizes, key) for key in theirs if getattr(sizes, key) is not None}
    found = theirs | mine
    if found["hidden_size"] != hidden:
        raise ValueError(
            f"the drafter's hidden_size is {found['hidden_size']}, the target's {hidden}: it reads the "
            "target's embeddings, so they must be equal. Leave hidden_size out, or use the target it "
            "was made for."
        )
    if found["num_attention_heads"] % found["num_key_value_heads"]:
        raise ValueError(
            f"{found['num_attention_heads']} query heads do not share "
            f"{found['num_key_value_heads']} key-value heads evenly."
        )
    return found


def initialise(module: nn.Module) -> None:
    """Fresh weights: matrices normal with variance one over their inputs, norms one."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)


def completed(config: Config, target: PreTrainedModel, **more: Any) -> Config:
    """A config with nothing left open."""
    return replace(config, **complete_sizes(config, target), **more)
