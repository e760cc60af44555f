"""BlockDrafter: drafts a whole block in one pass from the target's hidden states (DFlash, arXiv 2602.06036).

A block is the root (the anchor) and B − 1 mask tokens. Every layer reads the fused target features of the
committed tokens as keys and values through its own projections, and the block itself, in both directions;
layers with a window see only the last of them (`windows`).
Position k of the block drafts the token at position k: nothing is shifted. Embeddings and lm_head are the
target's, frozen.

Letters: R rows, T tokens of a row, A anchors of a row, B block size, N committed tokens, L aux hidden-state
layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from certdraft.drafters.dflash.config import BlockConfig, BlockLayer
from certdraft.drafters.dflash.export import layout, read_dflash
from certdraft.drafters.dflash.lint import LAYOUTS
from certdraft.drafters.features.feature_drafter import FeatureDrafter, completed, initialise
from certdraft.drafters.features.layer_files import Weights
from certdraft.drafters.features.target_layers import block_layers, check_layers
from certdraft.drafters.features.transformer_layer import KeysValues, RMSNorm, cached_attention, known
from certdraft.drafters.features.visible_spans import document_starts
from certdraft.drafters.formats.export_metadata import Engines
from certdraft.drafters.formats.lint_files import Layout
from certdraft.drafters.lm.tree_cache import TreeCache
from certdraft.drafters.protocol import TargetSource
from certdraft.drafters.registry import register_drafter
from certdraft.drafters.training_paths import PackedRows, Paths, TokenFeatures, TokenIds, steps_from
from certdraft.support import has_head_bias, path_mask

_ANCHORS_AT_ONCE = 64  # a row, where all of them are wanted and none is drawn


@register_drafter("block")
class BlockDrafter(FeatureDrafter):
    """A block-diffusion drafter: all depths of a round at once, as marginals.

    Args:
        config: sizes, block, target layers; for `pretrained` its own are used.
        pretrained: folder or hub id of a published DFlash drafter to start from.
        num_anchors: full blocks trained per row of a batch, at random positions in the loss mask.
        init_from_target: start with the target's final norm, for targets whose lm_head is not tied to their
            embeddings (with tied ones a fresh block would draft the mask token, confidently).
        short_until: share of the training in which blocks of one mask are trained, more of them for the
            same number of tokens; None: half for a fresh drafter, nothing for a published one.
        dtype: of the parameters.
        gradient_checkpointing: recompute each layer in the backward pass, for memory.

    Raises:
        ValueError: no anchors, a block without a mask; `short_until` outside [0, 1); `config` given with
            `pretrained`; a checkpoint this class cannot reproduce.
        FileNotFoundError: `pretrained` is not there.
    """

    kind: Literal["conditional", "marginal"] = "marginal"
    description: ClassVar[str] = "a DFlash block drafter, which drafts a whole block in one pass"
    export_formats: ClassVar[Mapping[str, Engines]] = {
        "dflash": Engines(vllm="dflash", sglang="DFLASH", llama_cpp="draft-dflash"),
        "speculators": Engines(vllm="dflash", by_path=True),
        "transformers": Engines(transformers="MuseGlimmerAssistantModel", speculation_type="dflash"),
    }
    layouts: ClassVar[tuple[Layout, ...]] = LAYOUTS
    read, layout = staticmethod(read_dflash), layout
    config: BlockConfig
    target_head: ClassVar[bool] = True
    config_class: ClassVar[type[BlockConfig]] = BlockConfig
    state_class: ClassVar[type[TreeCache]] = TreeCache

    def __init__(
        self,
        config: BlockConfig | None = None,
        pretrained: str | None = None,
        *,
        num_anchors: int = 512,
        init_from_target: bool = False,
        short_until: float | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(config, pretrained, init_from_target, short_until, dtype, gradient_checkpointing)
        self.config, self.num_anchors = config or self.config_class(), num_anchors
        if num_anchors < 1 or self.config.block_size < 2 or self.config.num_hidden_layers < 1:
            raise ValueError(
                f"num_anchors {num_anchors}, block_size {self.config.block_size}, num_hidden_layers "
                f"{self.config.num_hidden_layers}: need at least 1, 2 and 1."
            )

    # ---- the network

    def build(
        self, vocab_size: int, target: PreTrainedModel | None = None, mask_token_id: int | None = None
    ) -> Self:
        """Make the network for a target; to be called once, before the optimiser is made.

        Args:
            vocab_size: entries of the target's vocabulary.
            target: the target.
            mask_token_id: stands in where the config names none; a spare row of the target's embedding.

        Raises:
            ValueError: no target, one that does not fit, or no mask token.
        """
        target = self._begin(vocab_size, target)
        if has_head_bias(target):
            raise ValueError(
                f"the lm_head of {type(target).__name__} has a bias, and a {type(self).__name__} uses only "
                "the weight of its target's lm_head. Train an EagleDrafter or a CausalDrafter for this one."
            )
        if self.pretrained is not None:
            return self
        layers, num = self.config.target_layer_ids, self.num_target_layers
        layers = self.default_layers(self.config) if layers is None else check_layers(layers, num)
        mask = self.config.mask_token_id if self.config.mask_token_id is not None else mask_token_id
        if mask is None or not 0 <= mask < vocab_size:
            raise ValueError(
                f"mask_token_id is {mask}; it must be a row of the target's embedding, 0 to "
                f"{vocab_size - 1}, that no text uses. By default it is the first id after the tokenizer's "
                f"last; where the tokenizer uses all {vocab_size} ids, set mask_token_id in the drafter's "
                "config to a reserved token that your texts never contain."
            )
        self.config = completed(self.config, target, target_layer_ids=layers, mask_token_id=mask)
        with torch.device(self.target_ends.embeddings.device):
            self.make()
        self.settle()
        initialise(self)
        if self.init_from_target and self.target_ends.norm is not None:
            with torch.no_grad():
                self.norm.weight.copy_(self.target_ends.norm)
        return self

    def build_from_target(self, target: TargetSource) -> Self:
        """See `Drafter.build_from_target`; the mask token is the first id that the tokenizer does not use."""
        if self.ends is None:
            self.build(target.vocab_size, target.load_ends(), target.num_ids())
        return self

    @property
    def lead(self) -> int:
        """Positions of a block in front of the first one that drafts: the root, which drafts nothing here."""
        return 1

    @property
    def max_draft_length(self) -> int:
        """Positions of a block that draft."""
        return self.config.block_size - self.lead

    def engines(self, format: str) -> Engines:
        """See `Drafter.engines`: SGLang reads layers with a window in order, llama.cpp has no windows."""
        views, found = self.config.views(), super().engines(format)
        if any(view.causal != (view.window is not None) for view in views):
            found = replace(found, sglang=None)
        plain = all(view.window is None and not view.causal for view in views)
        return found if plain else replace(found, llama_cpp=None)

    def default_layers(self, config: Any) -> tuple[int, ...]:
        return block_layers(self.num_target_layers, config.num_hidden_layers)

    def make(self, weights: Weights | None = None) -> None:
        config = self.config
        hidden, eps = known(config.hidden_size), known(config.rms_norm_eps)
        self.fc = nn.Linear(len(config.target_layer_ids or ()) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.layers = nn.ModuleList(BlockLayer(config, view) for view in config.views())
        self.norm = RMSNorm(hidden, eps)

    @property
    def head_weight(self) -> Float[Tensor, "V H"]:
        """Weight of the target's lm_head, frozen, for losses that never hold all logits."""
        return self.target_ends.head.detach()

    def head(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """Logits of drafted positions, by the target's lm_head."""
        return self._project(hidden, self.head_weight)

    # ---- training

    def first_drafts(self, ids: Tensor, positions: Tensor, documents: Tensor, features: Tensor) -> Tensor:
        """See `FeatureDrafter.first_drafts`; every token is an anchor, at the cost of B causal passes."""
        anchors = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        return self._in_chunks(ids, positions, documents, features, anchors, 1)[:, :, 0]

    def passes(self, seq_len: int) -> tuple[float, float]:
        """See `Drafter.passes`: blocks at the anchors, as many tokens in short ones as in full ones."""
        share = min(self.num_anchors, seq_len) * self.config.block_size / seq_len
        return share, share

    def rounds(self, rows: PackedRows, depth: int | None, every: bool) -> Paths:
        """Blocks of `depth` masks at random anchors, or those of decoding at all; see `Drafter.paths`.

        With `every` only positions in the loss mask are drafted from, padded to the longest row of them.
        """
        longest = self.max_draft_length
        depth = min(depth or (1 if self._short and not every else longest), longest)
        ids, positions, documents, loss_mask, features = rows
        mask = path_mask(loss_mask, documents, depth)
        first = torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]  # of each row
        if every:
            anchors, chosen = all_anchors(mask[..., 0])
            blocks = self._in_chunks(ids, positions, documents, features, anchors, depth)
        else:
            num = self.num_anchors * self.config.block_size // (self.lead + depth)
            anchors, chosen = sample_anchors(mask[..., 0], num)
            context = self._context(self._features(features), positions)
            blocks = self._blocks(ids, positions, documents, context, anchors, depth)
        starts = (first + anchors)[chosen]
        mask = mask.flatten(0, 1)[starts]
        return Paths(blocks[chosen], steps_from(starts, mask), mask)

    def validation_mask(
        self, input_ids: Int[Tensor, "R T"], loss_mask: Bool[Tensor, "R T"]
    ) -> Bool[Tensor, "R T"]:
        """See `Drafter.validation_mask`; `num_anchors` positions of a row, which is what training drafts."""
        return stretch(loss_mask, input_ids.sum(-1), self.num_anchors)

    def _in_chunks(
        self,
        ids: Int[Tensor, "R T"],
        positions: Int[Tensor, "R T"],
        documents: Int[Tensor, "R T"],
        features: Tensor | None,
        anchors: Int[Tensor, "R A"],
        depth: int,
    ) -> Float[Tensor, "R A D H"]:
        """The first `depth` drafting positions of the blocks that decoding drafts, a few anchors at once.

        Blocks are full ones, because in a layer that reads in both directions every position depends on the
        masks behind it; where no layer does, they end at `depth`.
        """
        context = self._context(self._features(features), positions)
        masks = depth if all(view.causal for view in self.config.views()) else self.max_draft_length
        parts = [
            self._blocks(ids, positions, documents, context, part, masks)[:, :, :depth]
            for part in anchors.split(_ANCHORS_AT_ONCE, 1)
        ]
        return torch.cat(parts, 1)

    def _context(self, features: Tensor, positions: Tensor) -> list[KeysValues]:
        """Keys and values of the context, layer by layer."""
        fused = self.hidden_norm(self.fc(features.flatten(-2)))
        return [layer.context(fused, positions) for layer in self._layers]

    def _blocks(
        self,
        ids: Int[Tensor, "R T"],
        positions: Int[Tensor, "R T"],
        documents: Int[Tensor, "R T"],
        context: list[KeysValues],
        anchors: Int[Tensor, "R A"],
        depth: int,
    ) -> Float[Tensor, "R A D H"]:
        """Normed states at the `depth` drafting positions of blocks at the anchors, kept apart."""
        size, mask_id = self.lead + depth, known(self.config.mask_token_id)
        tokens = torch.full((*anchors.shape, size), mask_id, device=ids.device)
        tokens[..., 0] = ids.gather(1, anchors)
        places = positions.gather(1, anchors)[..., None] + torch.arange(size, device=ids.device)
        starts = document_starts(documents).gather(1, anchors)
        visible = {view: view.spans(starts, anchors, size) for view in self.config.views()}
        x = self.embed(tokens).flatten(1, 2)
        for layer, (keys, values) in zip(self._layers, context, strict=True):
            run = (x, keys, values, places.flatten(1), visible[layer.view])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *run, use_reentrant=False)
            else:
                x = layer(*run)
        normed: Tensor = self.norm(x)
        return normed.unflatten(1, (-1, size))[:, :, self.lead :]

    @property
    def _layers(self) -> list[BlockLayer]:
        return [*self.layers]

    # ---- decoding

    @torch.no_grad()
    def start(self, ids: TokenIds, features: TokenFeatures | None = None) -> TreeCache:
        """See `Drafter.start`; features at every token of `ids`."""
        state = self.state_class(len(self._layers), len(ids) + 256)
        if len(ids):
            self._extend(state, self._features(features, len(ids)))
        return state

    @torch.no_grad()
    def draft(self, state: TreeCache, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "D V"]:
        """See `Drafter.draft`; only the last token, the root, is read; features stand for those before."""
        if [int(p) for p in parents] != list(range(-1, len(tokens) - 1)):
            raise ValueError(
                f"a block drafter reads one chain a round, not parents {[int(p) for p in parents]}."
            )
        return self._project.top(self._drafts(state, int(tokens[-1])), self.head_weight)

    def _drafts(self, state: TreeCache, root: int) -> Float[Tensor, "D H"]:
        """Normed states at the drafting positions of the block after the context; the cache stays as is."""
        size, mask_id, device = self.config.block_size, known(self.config.mask_token_id), self._device
        block = torch.tensor([root, *[mask_id] * (size - 1)], device=device)
        positions = torch.arange(state.length, state.length + size, device=device)[None]
        x = self.embed(block)[None]
        for layer, cached in zip(self._layers, state.layers, strict=True):
            read = layer.input_layernorm(x)
            queries = layer.self_attn.queries(read, positions)
            keys, values = cached.update(*layer.self_attn.keys_values(read, positions))
            start, mask = layer.view.cached(state.length, size, x.dtype, device)
            x = layer.finish(x, cached_attention(queries, keys[:, :, start:], values[:, :, start:], mask))
            cached.truncate(state.length)
        normed: Tensor = self.norm(x)
        return normed[0, self.lead :]

    @torch.no_grad()
    def commit(self, state: TreeCache, path: Sequence[int], features: TokenFeatures | None = None) -> None:
        """See `Drafter.commit`; the features of the committed tokens become context."""
        if features is None and not len(path):
            return
        self._extend(state, self._features(features))

    def _extend(self, state: TreeCache, features: Float[Tensor, "N L H"]) -> None:
        num = len(features)
        positions = torch.arange(state.length, state.length + num, device=features.device)[None]
        for cached, kv in zip(state.layers, self._context(features[None], positions), strict=True):
            cached.update(*kv)
        state.length += num


def sample_anchors(eligible: Bool[Tensor, "R T"], num: int) -> tuple[Int[Tensor, "R A"], Bool[Tensor, "R A"]]:
    """At most `num` eligible positions of each row, drawn without replacement from torch's generator.

    Returns:
        Positions in ascending order, and which of them are eligible: rows with fewer are filled up.
    """
    most = max(int(eligible.sum(-1).max()), 1)
    drawn = torch.rand(eligible.shape, device=eligible.device).masked_fill_(~eligible, -1.0)
    anchors = drawn.topk(min(num, most), -1).indices.sort(-1).values
    return anchors, eligible.gather(1, anchors)


def all_anchors(eligible: Bool[Tensor, "R T"]) -> tuple[Int[Tensor, "R A"], Bool[Tensor, "R A"]]:
    """All eligible positions of each row, ascending; rows with fewer than the longest are filled up.

    Returns:
        Positions, and which of them are eligible.
    """
    most = max(int(eligible.sum(-1).max()), 1)
    anchors = (~eligible).byte().sort(dim=-1, stable=True).indices[:, :most]
    return anchors, eligible.gather(1, anchors)


def stretch(eligible: Bool[Tensor, "R T"], start: Int[Tensor, " R"], num: int) -> Bool[Tensor, "R T"]:
    """At most `num` eligible positions of each row, one after another, on a circle from the `start`th one.

    Over all values of `start` every eligible position is kept equally often.
    """
    count = eligible.sum(-1, keepdim=True).clamp(min=1)
    place = eligible.cumsum(-1) - 1
    return eligible & ((place - start[:, None]) % count < num)
