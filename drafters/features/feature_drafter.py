"""Base of drafters that read the target's hidden states: its embeddings, lm_head and layers; folders.

They embed tokens with the target's embeddings, and those without an lm_head use the target's. These are the
target's frozen weights: held by reference, moved along, never trained, never in a state dict.

Letters: L aux hidden-state layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from certdraft.drafters.features import feature_folder
from certdraft.drafters.features.layer_files import Json, Weights, check_names
from certdraft.drafters.features.rotary import checked_scaling
from certdraft.drafters.features.target_layers import check_layers
from certdraft.drafters.features.transformer_layer import DecoderLayer, LayerSizes, RMSNorm, known
from certdraft.drafters.lm.cached_lm import split_causal_lm
from certdraft.drafters.protocol import Drafter, TargetSource
from certdraft.support import OutputLayer, facts_of, text_config

if TYPE_CHECKING:
    from certdraft.drafters.formats.export_metadata import ExportRequest

Config = TypeVar("Config", bound=LayerSizes)
_SHORT_UNTIL = 0.5  # benchmarks/families.py


@dataclass(frozen=True)
class TargetEnds:
    """The target's own parameters that a drafter uses as they are; moving the target moves them.

    Attributes:
        embeddings: [V, H].
        head: [V, H], weight of the lm_head; the same tensor where the target ties them.
        norm: [H], what the norm before the lm_head multiplies by; None where it has none to copy.
    """

    embeddings: Tensor
    head: Tensor
    norm: Tensor | None

    @classmethod
    def of(cls, target: PreTrainedModel) -> TargetEnds:
        """Those of a causal LM whose logits are lm_head(hidden)."""
        body, head = split_causal_lm(target)
        parts: list[Any] = [target.get_input_embeddings(), head]
        return cls(parts[0].weight, parts[1].weight, _gain(getattr(body, "norm", None)))

    def moved(self, move: Callable[[Tensor], Tensor]) -> TargetEnds:
        """The same weights elsewhere; tied ones stay tied."""
        embeddings = move(self.embeddings)
        head = embeddings if self.head is self.embeddings else move(self.head)
        return TargetEnds(embeddings, head, None if self.norm is None else move(self.norm))


class FeatureDrafter(Drafter):
    """Base of the kinds that read aux hidden-state layers: `EagleDrafter`, `BlockDrafter`, `DSparkDrafter`.

    Its arguments are those of the kinds.

    Attributes:
        ends: embeddings and lm_head of the target; None until `build`.
        num_target_layers: of the target; 0 until `build`.
        target_head: drafts through the target's lm_head, so that a copy of it in a folder is not its own.
    """

    write = feature_folder.write
    reads_target: ClassVar[bool] = True
    target_head: ClassVar[bool] = False
    config: Any
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
        self.parameter_dtype: torch.dtype | None = getattr(torch, dtype)  # None: that of the weights read
        self.gradient_checkpointing = gradient_checkpointing
        self._project = OutputLayer()  # of the lm_head

    # ---- what a kind defines

    @abstractmethod
    def make(self, weights: Weights | None = None) -> None:
        """Create the modules of `config`, whose sizes are all known, without moving or filling them.

        Args:
            weights: to be loaded; those of a draft vocabulary decide which tables there are.
        """

    @staticmethod
    @abstractmethod
    def read(folder: Path) -> tuple[Any, int | None, Weights]:
        """Config, the target's vocabulary size where the folder names it, and tensors, from any layout."""

    @abstractmethod
    def layout(self, weights: Weights, request: ExportRequest) -> tuple[Json, Weights]:
        """config.json and the tensors under the names of an export format."""

    @abstractmethod
    def default_layers(self, config: Any) -> tuple[int, ...]:
        """Aux hidden-state layers where a config names none."""

    @abstractmethod
    def first_drafts(
        self, ids: Tensor, positions: Tensor, documents: Tensor, features: Tensor
    ) -> Float[Tensor, "R T H"]:
        """Hidden states of the first draft token after every position; arguments as in `hidden`."""

    # ---- made for a target, and again from a folder

    def attach(self, ends: TargetEnds, num_target_layers: int) -> None:
        """Set the target's parts; `make` and `load_folder` need them."""
        self.ends, self.num_target_layers = ends, num_target_layers

    def load_folder(self, folder: Path) -> None:
        """Make the network of a folder from any trainer and load its weights."""
        config, vocab_size, weights = self.read(folder)
        layers = config.target_layer_ids or self.default_layers(config)
        self.config = replace(config, target_layer_ids=check_layers(layers, self.num_target_layers))
        feature_folder.check_target(self, folder, (vocab_size, config.hidden_size, len(layers)), weights)
        self.adopt(weights, str(folder))

    def adopt(self, weights: Weights, where: str) -> None:
        """Make the network of `config` with these weights, every tensor of it and no other.

        Args:
            weights: copied, because those of a file may lie where arithmetic is slower and rounds otherwise.
            where: they come from, for messages.
        """
        with torch.device("meta"):  # no random weights to overwrite
            self.make(weights)
        check_names(weights, self.state_dict(), where)
        self.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        self.settle()

    def settle(self) -> None:
        """Move a network just made to the target's device, its parameters to their dtype."""
        self.taps = self.config.target_layer_ids or ()
        self.to(device=self.target_ends.embeddings.device)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.parameter_dtype or parameter.dtype)

    @classmethod
    def on_meta(cls, target: TargetSource, read_config: Callable[[str], Any], **arguments: Any) -> Self:
        """See `Drafter.on_meta`; the network is made where its target is."""
        return cls(**arguments).build_from_target(target)

    @classmethod
    def from_folder(cls, folder: Path, *, target: Any, dtype: Any, **_: Any) -> Self:
        if target is None:
            raise ValueError(
                f"{folder} holds a drafter that reads its target's embeddings and layers; give target= the "
                f"model {feature_folder.target_name(folder)}."
            )
        loaded: Any = cls(pretrained=str(folder))  # type: ignore[call-arg]
        loaded.parameter_dtype = getattr(torch, dtype) if dtype else None
        loaded.attach(TargetEnds.of(target), facts_of(target).num_layers)
        loaded.load_folder(folder)
        return loaded.eval()

    def twin(self, weights: Weights | None = None, folder: Path | None = None) -> Self:
        """The same network for the same target, in eval mode, with these weights or those of a folder."""
        made: Any = type(self)(None if folder else self.config)  # type: ignore[call-arg]
        made.parameter_dtype = None
        made.attach(self.target_ends, self.num_target_layers)
        if folder is not None:
            made.load_folder(folder)
        else:
            made.adopt(weights, "the drafter")
        return made.eval()

    # ---- what others need to know about it

    def at(self, progress: float) -> None:
        """See `Drafter.at`: one draft token a round until `short_until`.

        What a round's first draft token learns serves all later ones, and costs a fraction of a full round.
        """
        self._short = progress < self.short_until

    @property
    def vocab_size(self) -> int:
        """Entries of the target's vocabulary."""
        return len(self.target_ends.embeddings)

    @property
    def max_context(self) -> int | None:
        """`max_position_embeddings` of the config."""
        return self.config.max_position_embeddings

    @property
    def network_config(self) -> Any:
        return self.config

    @property
    def target_config(self) -> dict[str, int | None]:
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.config.hidden_size,
            "num_hidden_layers": self.num_target_layers,
        }

    @property
    def target_ends(self) -> TargetEnds:
        """`ends`, once there is a target."""
        if self.ends is None:
            raise ValueError(
                f"{type(self).__name__} has no target yet: call build(vocab_size, target) with the model it "
                "drafts for; it reads that model's embeddings."
            )
        return self.ends

    # ---- training

    @property
    def own_layers(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, DecoderLayer)]

    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """See `Drafter.hidden`: those of the first draft token."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        return self.first_drafts(input_ids, position_ids, document_ids, self._features(features))

    # ---- for the kinds

    def embed(self, ids: Int[Tensor, "*step"]) -> Float[Tensor, "*step H"]:
        """The target's embeddings of tokens, in the dtype of the drafter."""
        return functional.embedding(ids, self.target_ends.embeddings.detach()).to(self._dtype)

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

    def _begin(self, vocab_size: int, target: PreTrainedModel | None) -> PreTrainedModel:
        """Check and attach the target of `build`; load `pretrained` where it is given."""
        name = type(self).__name__
        if target is None:
            raise ValueError(
                f"{name} reads its target's layers and embeddings: build needs the target itself."
            )
        embeddings: Any = target.get_input_embeddings()
        if len(embeddings.weight) != vocab_size:
            raise ValueError(
                f"{name}: the target embeds {len(embeddings.weight)} tokens, but vocab_size is {vocab_size}; "
                "pass the size of its logits, padding included."
            )
        self.attach(TargetEnds.of(target), facts_of(target).num_layers)
        if self.pretrained is not None:
            self.load_folder(feature_folder.folder_of(self.pretrained))
        return target

    def _features(self, features: Tensor | None, num: int | None = None) -> Tensor:
        """Features, checked: [..., L, H]."""
        if features is None:
            raise ValueError(
                f"{type(self).__name__} reads target layers {self.taps} and got no features; give the "
                "outputs of these layers, from a trace recorded with them or from the target run beside it."
            )
        expected = (len(self.taps), self.target_ends.embeddings.shape[1])
        if tuple(features.shape[-2:]) != expected or (num is not None and len(features) != num):
            raise ValueError(
                f"{type(self).__name__}: features have shape {list(features.shape)}, expected "
                f"[{'…' if num is None else num}, {expected[0]}, {expected[1]}]: the target's layers "
                f"{self.taps}."
            )
        return features.to(self._device, self._dtype)  # recorded ones arrive on the CPU


def completed(config: Config, target: PreTrainedModel, **more: Any) -> Config:
    """A config whose open sizes are taken from the target's.

    Raises:
        ValueError: a hidden size that is not the target's, heads that do not divide.
    """
    of: Any = text_config(target.config)
    hidden, heads = int(of.hidden_size), int(of.num_attention_heads)
    rope = getattr(of, "rope_parameters", None) or {}
    defaults: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": of.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(of, "num_key_value_heads", heads),
        "head_dim": getattr(of, "head_dim", None) or hidden // heads,
        "rms_norm_eps": getattr(of, "rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or getattr(of, "rope_theta", None) or 10000.0),
        "max_position_embeddings": getattr(of, "max_position_embeddings", None) or 4096,
    }
    given = {key: getattr(config, key) for key in defaults if getattr(config, key) is not None}
    found = replace(config, **defaults | given, **more)
    if found.hidden_size != hidden:
        raise ValueError(
            f"the drafter's hidden_size is {found.hidden_size}, the target's {hidden}: it reads the target's "
            "embeddings, so they must be equal. Leave hidden_size out, or use the target it was made for."
        )
    if known(found.num_attention_heads) % known(found.num_key_value_heads):
        raise ValueError(
            f"{found.num_attention_heads} query heads do not share {found.num_key_value_heads} key-value "
            "heads evenly."
        )
    positions = known(found.max_position_embeddings)
    return replace(found, rope_scaling=checked_scaling(found.rope_scaling, positions, "the drafter's config"))


@torch.no_grad()
def _gain(norm: Any) -> Tensor | None:
    """What a norm multiplies by: its weight, or one more (Gemma, Qwen3-Next)."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.is_meta:
        return weight
    found = norm(torch.ones_like(weight)).float()
    gains = (weight, 1 + weight)
    return next((gain for gain in gains if torch.allclose(found, gain.float(), 1e-2, 1e-2)), None)


def initialise(module: nn.Module) -> None:
    """Draw fresh weights: matrices normal with variance one over their inputs, norms one."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        elif isinstance(part, RMSNorm):
            nn.init.ones_(part.weight)
