"""DSparkDrafter: a DFlash block, corrected from left to right by the token before each position (DSpark).

The backbone is `BlockDrafter`'s: one pass drafts the states h_1 … h_D of a block. The distribution of draft
token d given the token before it is

    softmax(lm_head h_d + W_2 W_1[token d − 1]),

with a low-rank correction (the Markov head) that costs a row of W_1 and a product with W_2. So the drafter is
conditional: a chain or a tree is drafted node by node, and only the root costs a pass of the layers. The
confidence head estimates from h_d and W_1[token d − 1] the chance that draft token d is accepted.

In training a draft token's state is [h_d, W_1[token d − 1]] and the head's weight [lm_head, W_2], so that
losses see one linear head. Source: deepseek-ai/DeepSpec, DSpark_paper.pdf.

Letters: those of `BlockDrafter`; D draft depth, E rank of the correction, P paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from certdraft.drafters.dflash.model import BlockDrafter
from certdraft.drafters.dspark.config import ConfidenceHead, DSparkConfig, MarkovHead, initialise_heads
from certdraft.drafters.dspark.export import layout, read_dspark
from certdraft.drafters.dspark.lint import LAYOUTS
from certdraft.drafters.dspark.state import DSparkState
from certdraft.drafters.features.layer_files import Weights
from certdraft.drafters.features.transformer_layer import known
from certdraft.drafters.formats.export_metadata import Engines
from certdraft.drafters.lm.tree_cache import TreeCache
from certdraft.drafters.registry import register_drafter
from certdraft.drafters.training_paths import PackedRows, Paths, TokenFeatures, TokenIds
from certdraft.support import project_fp32


@register_drafter("dspark")
class DSparkDrafter(BlockDrafter):
    """A block drafter whose tokens depend on each other, with a confidence estimate.

    Args:
        config: sizes, block, target layers, rank; for `pretrained` its own are used.
        pretrained: folder or hub id of a published DSpark drafter to start from.
        num_anchors: full blocks trained per row of a batch, at random positions in the loss mask.
        confidence_weight: of the confidence head's loss beside the drafter's; binary cross-entropy with
            Σ min(p, q), the acceptance rate of speculative sampling. Above 0.
        init_from_target: as in `BlockDrafter`.
        short_until: as in `BlockDrafter`; one draft token a block until then.
        dtype: of the parameters.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.

    Raises:
        ValueError: no anchors; a confidence head that is not trained; `short_until` outside [0, 1); `config`
            given with `pretrained`; a checkpoint this class cannot reproduce.
        FileNotFoundError: `pretrained` is not there.
    """

    kind: Literal["conditional", "marginal"] = "conditional"
    description: ClassVar[str] = (
        "a DSpark drafter, which drafts a block in one pass and corrects it token by token"
    )
    export_formats: ClassVar[Mapping[str, Engines]] = {
        "dspark": Engines(vllm="dspark", sglang="DSPARK"),
        "speculators": Engines(vllm="dspark", by_path=True),
    }
    layouts = LAYOUTS
    read, layout = staticmethod(read_dspark), layout
    config: DSparkConfig
    config_class: ClassVar[type[DSparkConfig]] = DSparkConfig
    state_class: ClassVar[type[TreeCache]] = DSparkState
    markov_head: MarkovHead
    confidence_head: ConfidenceHead | None

    def __init__(
        self,
        config: DSparkConfig | None = None,
        pretrained: str | None = None,
        *,
        num_anchors: int = 512,
        confidence_weight: float = 1.0,
        init_from_target: bool = False,
        short_until: float | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            config,
            pretrained,
            num_anchors=num_anchors,
            init_from_target=init_from_target,
            short_until=short_until,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
        )
        if not confidence_weight > 0:
            raise ValueError(
                f"confidence_weight is {confidence_weight}; must be above 0. To train no confidence head set "
                "enable_confidence_head: false in the config."
            )
        self._confidence_weight = confidence_weight

    # ---- the network

    def build(
        self, vocab_size: int, target: PreTrainedModel | None = None, mask_token_id: int | None = None
    ) -> Self:
        super().build(vocab_size, target, mask_token_id)
        if self.pretrained is None:
            initialise_heads(self.markov_head, self.confidence_head)
        return self

    def make(self, weights: Weights | None = None) -> None:
        super().make(weights)
        config = self.config
        self.markov_head = MarkovHead(self.vocab_size, config.markov_rank)
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None

    @property
    def lead(self) -> int:
        """See `BlockDrafter.lead`; none where the root's position drafts the first token."""
        return 0 if self.config.sample_from_anchor else 1

    def engines(self, format: str) -> Engines:
        """See `Drafter.engines`: SGLang drafts only from the root's position."""
        found = self.export_formats[format]
        return found if self.config.sample_from_anchor else replace(found, sglang=None)

    @property
    def confidence_weight(self) -> float:
        return self._confidence_weight if self.config.enable_confidence_head else 0.0

    @property
    def head_weight(self) -> Float[Tensor, "V H+E"]:
        """The target's lm_head, frozen, beside the correction's; a copy in the type products are made in."""
        head, correction = self.target_ends.head.detach(), self.markov_head.markov_w2.weight
        dtype, device = torch.promote_types(head.dtype, correction.dtype), correction.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return torch.cat([head.to(dtype), correction.to(dtype)], 1)

    def head(self, hidden: Float[Tensor, "*step H+E"]) -> Float[Tensor, "*step V"]:
        """Corrected logits of draft tokens, from states that end in the previous token's embedding."""
        state, previous = hidden.split([known(self.config.hidden_size), self.config.markov_rank], -1)
        return self._base(state) + self._correction(previous)

    def _base(self, state: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        return self._project(state, self.target_ends.head.detach())

    def _correction(self, previous: Float[Tensor, "*step E"]) -> Float[Tensor, "*step V"]:
        return project_fp32(previous, self.markov_head.markov_w2.weight)

    def confidence(self, hidden: Float[Tensor, "*step H+E"]) -> Float[Tensor, "*step"]:
        if self.confidence_head is None:
            raise ValueError("this DSpark drafter has no confidence head (enable_confidence_head: false).")
        return self.confidence_head(hidden).float()

    # ---- training

    def first_drafts(self, ids: Tensor, positions: Tensor, documents: Tensor, features: Tensor) -> Tensor:
        """See `FeatureDrafter.first_drafts`; the token before the first draft token is the anchor."""
        return self._beside(super().first_drafts(ids, positions, documents, features), ids)

    def rounds(self, rows: PackedRows, depth: int | None, every: bool) -> Paths:
        """Blocks as in `BlockDrafter.rounds`, each draft token after the true token before it."""
        paths = super().rounds(rows, depth, every)
        return paths._replace(hidden=self._beside(paths.hidden, rows.input_ids.flatten()[paths.steps]))

    def _beside(self, hidden: Float[Tensor, "*step H"], previous: Int[Tensor, "*step"]) -> Tensor:
        """States with the embeddings of the tokens before them, [..., H + E]."""
        return torch.cat([hidden, self.markov_head(previous).to(hidden.dtype)], -1)

    # ---- decoding

    @torch.no_grad()
    def draft(self, state: Any, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "K V"]:
        """See `Drafter.draft`.

        The first call of a round is the chain of committed tokens that ends in the root; the features stand
        for those before the root, whose own rows are NaN.
        """
        ids, above = [int(token) for token in tokens], [int(parent) for parent in parents]
        if state.hidden is None:
            if not ids or above != list(range(-1, len(ids) - 1)):
                raise ValueError(
                    f"a DSpark round opens with one chain that ends in its root, not with parents {above}."
                )
            hidden = self._drafts(state, ids[-1])
            depths = state.open(len(ids), hidden, self._base(hidden))
        else:
            depths = state.place(above)
        front = sum(depth < 0 for depth in depths)
        places = torch.tensor(depths[front:], device=self._device)
        states = self._beside(state.hidden[places], torch.tensor(ids[front:], device=self._device))
        logits = state.base[places] + self._correction(states[:, -self.config.markov_rank :])
        sure = None if self.confidence_head is None else self.confidence(states).sigmoid()
        if front:
            logits = torch.cat([logits.new_full((front, logits.shape[1]), torch.nan), logits])
            sure = None if sure is None else torch.cat([sure.new_full((front,), torch.nan), sure])
        state.confidence = sure
        return logits

    @torch.no_grad()
    def commit(self, state: Any, path: Sequence[int], features: TokenFeatures | None = None) -> None:
        """See `Drafter.commit`; the features of the committed tokens become context."""
        state.close()
        super().commit(state, path, features)
