"""CausalDrafter: any small causal LM with the target's vocabulary, fresh, pretrained or with LoRA.

Letters: R rows, T tokens of a row, N committed tokens, K nodes of one call, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from certdraft.drafters.causal.export import write_transformers
from certdraft.drafters.causal.fresh_config import fresh_config
from certdraft.drafters.causal.layer_cut import TargetLayers, cut_config, cut_from
from certdraft.drafters.causal.lint import LAYOUTS
from certdraft.drafters.causal.lora import LoraSettings, add_adapters
from certdraft.drafters.features.flex import ATTENTION, takes_block_masks, use_block_masks
from certdraft.drafters.features.visible_spans import document_block_mask
from certdraft.drafters.formats.export_metadata import Engines
from certdraft.drafters.lm.cached_lm import CachedLM, split_causal_lm
from certdraft.drafters.lm.chain_cache import ChainCache
from certdraft.drafters.lm.tree_cache import TreeCache
from certdraft.drafters.protocol import Drafter, TargetSource
from certdraft.drafters.registry import register_drafter
from certdraft.drafters.training_paths import TokenFeatures, TokenIds
from certdraft.support import (
    context_limit,
    facts_of,
    has_head_bias,
    load_causal_lm,
    text_body,
    text_config,
)


@register_drafter("causal")
class CausalDrafter(Drafter):
    """A small causal LM that drafts token by token; it reads tokens only.

    Exactly one of `config`, `pretrained` and `from_target` is given. A fresh network needs the target's
    vocabulary size, in `vocab_size`, in `config`, or later through `build`.

    Args:
        config: of a fresh network: the keys of its transformers config (Qwen3Config unless `model_type` says
            otherwise). All sizes must be given; the class's own defaults describe a large model.
        pretrained: folder or hub id of a causal LM to start from.
        lora: train low-rank adapters on `pretrained` instead of all its weights.
        from_target: start from layers of the target, with its embeddings and lm_head; made by `build`.
        freeze_embeddings: train neither the embeddings nor the lm_head of `pretrained` or `from_target`; of a
            small drafter they are most of the weights. They stay out of checkpoints.
        vocab_size: entries of the target's vocabulary.
        init_from_target: start a fresh network with the target's embeddings and lm_head; needs the target's
            hidden size. See `build`.
        dtype: of the parameters; None: the checkpoint's, fp32 for a fresh network.
        attention: implementation; sdpa is the fast one.
        gradient_checkpointing: recompute activations in the backward pass, for memory.

    Raises:
        ValueError: not exactly one of `config`, `pretrained` and `from_target`; an unknown or missing config
            key; LoRA or `init_from_target` where they mean nothing; weights that do not fit.
        FileNotFoundError: `pretrained` is not there, or the hub cannot be reached.

    Examples:
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> drafter = CausalDrafter(config=sizes | heads, vocab_size=64)
        >>> drafter.logits(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 64])
    """

    kind: Literal["conditional", "marginal"] = "conditional"
    description: ClassVar[str] = "a small causal LM"
    export_formats: ClassVar[Mapping[str, Engines]] = {
        "transformers": Engines("AutoModelForCausalLM", None, "draft_model", "STANDALONE", "draft")
    }
    layouts = LAYOUTS
    write = write_transformers

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        lora: LoraSettings | None = None,
        from_target: TargetLayers | None = None,
        *,
        freeze_embeddings: bool = False,
        vocab_size: int | None = None,
        init_from_target: bool = False,
        dtype: Literal["float32", "bfloat16"] | None = "float32",
        attention: Literal["sdpa", "eager"] = "sdpa",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_start(config, pretrained, lora, from_target, freeze_embeddings, init_from_target)
        self.config, self.pretrained, self.lora = config, pretrained, lora
        self.freeze_embeddings = freeze_embeddings
        self.from_target = TargetLayers(**from_target) if isinstance(from_target, dict) else from_target
        self._fitted = False
        self.init_from_target = init_from_target
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.attention: Literal["sdpa", "eager"] = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.network: nn.Module | None = None
        if config is not None:
            sized = config.get("vocab_size", vocab_size)
            if vocab_size not in (None, sized):
                raise ValueError(
                    f"config has vocab_size {sized}, the argument is {vocab_size}; leave one out."
                )
            fresh_config(config, sized or 1)  # refuse a bad config now, wherever `build` happens
            if sized is not None:
                self._adopt(self._fresh(sized))
        elif pretrained is not None:
            model = load_causal_lm(str(pretrained), dtype=self.dtype, attention=attention)
            if text_config(model.config) is not model.config:  # the text part of a multimodal model
                every = TargetLayers(facts_of(model).num_layers)
                model = cut_from(model, every, dtype=self.dtype, attention=attention).eval()
            self._adopt(model)
            if vocab_size not in (None, self.vocab_size):
                self.build(int(vocab_size))  # raises, naming both sizes

    def build(self, vocab_size: int, target: PreTrainedModel | None = None) -> Self:
        """Fit the drafter to its target; to be called once, before the optimiser is made.

        Creates a fresh network that did not know its vocabulary, refuses one of another vocabulary, and
        copies the target's embeddings and lm_head with `init_from_target`.

        Args:
            vocab_size: entries of the target's vocabulary.
            target: the target, read by `from_target` and `init_from_target` only.

        Raises:
            ValueError: another vocabulary; `from_target` or `init_from_target` without a target, or with one
                that does not fit.
        """
        if self.network is None and self.from_target is not None:
            if target is None:
                raise ValueError(
                    "from_target needs the target model, but only its vocabulary size was given."
                )
            self._adopt(cut_from(target, self.from_target, dtype=self.dtype, attention=self.attention))
        elif self.network is None:
            self._adopt(self._fresh(vocab_size))
        if self.vocab_size != vocab_size:
            raise ValueError(
                f"the drafter {self.pretrained or '(from config)'} has a vocabulary of {self.vocab_size}, "
                f"the target of {vocab_size}. Draft tokens are the target's tokens: start from one with the "
                "target's tokenizer and padded vocabulary, or from a fresh config."
            )
        if self.init_from_target:
            self._copy_embeddings(target)
        self._fitted = True
        return self

    def build_from_target(self, target: TargetSource) -> Self:
        """See `Drafter.build_from_target`; the target is loaded only where its weights are copied."""
        if not self._fitted:
            copies = self.init_from_target or self.from_target is not None
            self.build(target.vocab_size, target.load() if copies else None)
        return self

    def restore(self, target: TargetSource, state: Mapping[str, Tensor]) -> Self:
        self.init_from_target = False
        return self.build(target.vocab_size, None if self.from_target is None else target.load())

    @classmethod
    def on_meta(
        cls, target: TargetSource, read_config: Callable[[str], PreTrainedConfig], **arguments: Any
    ) -> Self:
        """See `Drafter.on_meta`; of `pretrained` and of a target to cut from only the config is read."""
        _check_start(**arguments)
        lora, pretrained = arguments.pop("lora", None), arguments.pop("pretrained", None)
        layers, network = arguments.get("from_target"), None
        if layers is not None:
            network = cut_config(read_config(target.name), layers)
        elif pretrained is not None:
            network = text_config(read_config(pretrained))
            arguments["from_target"] = TargetLayers(1)  # stands for a network that no config describes
        if network is None:
            drafter = super().on_meta(target, read_config, **arguments)
        else:
            with torch.device("meta"):
                drafter = cls(**arguments)
                drafter._adopt(drafter._random(network))
            drafter.pretrained, drafter.from_target = pretrained, layers
            drafter.build(target.vocab_size)
        if lora is not None:
            drafter.network = add_adapters(drafter.model, lora)
            drafter.lora = lora
        return drafter

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, dtype: Any, **_: Any) -> Self:
        """See `Drafter.from_folder`; no target is needed."""
        return cls(pretrained=str(folder), dtype=dtype).build(vocab_size).eval()

    @property
    def causal_lm(self) -> PreTrainedModel:
        return self.model

    @property
    def network_config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def tokenizer_source(self) -> str | None:
        return self.pretrained

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model, LoRA layers in place where there are any."""
        if self.network is None:
            raise ValueError("this drafter has no network yet: give vocab_size, or call build(vocab_size).")
        network: Any = self.network
        return network.get_base_model() if self.lora else network

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, equal to the target's."""
        return int(self.head_weight.shape[0])

    @property
    def max_context(self) -> int | None:
        """Positions or attention window of the network, whichever is smaller."""
        return context_limit(self.model)

    @property
    def head_weight(self) -> Float[Tensor, "V H"]:
        """Weight of the lm_head, for losses that never hold all logits."""
        head: Any = self.model.get_output_embeddings()
        return head.weight

    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """Hidden states after the final norm; see `Drafter.hidden`. `features` are not read."""
        mask: Any = None
        if document_ids is not None:
            if position_ids is None:
                raise ValueError("document_ids need position_ids that restart with every document.")
            if self._lm.facts.window is not None:
                self._lm.facts.check_window(int(position_ids.max()) + 1)
            mask = self._mask(document_ids)
        # use_cache=False: with a cache, transformers ignores restarting positions and documents would mix.
        output = text_body(self.model)(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _mask(self, document_ids: Int[Tensor, "R T"]) -> Tensor | BlockMask:
        """Attention within documents: a block mask on CUDA, additive numbers elsewhere."""
        if not takes_block_masks(document_ids.device) or self.attention != "sdpa":
            return document_mask(document_ids, self.model.dtype)
        if self.model.config._attn_implementation != ATTENTION:
            use_block_masks(self.model)
        return document_block_mask(document_ids)

    def head(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """Logits of the next token; see `Drafter.head`."""
        return self._lm.project(hidden)

    def start(self, ids: TokenIds, features: TokenFeatures | None = None) -> TreeCache | ChainCache:
        """See `Drafter.start`. The drafter must be in eval mode."""
        return self._lm.prefill(ids)

    def draft(
        self, state: TreeCache | ChainCache, tokens: TokenIds, parents: TokenIds
    ) -> Float[Tensor, "K V"]:
        return self._lm.extend(state, tokens, parents, needed="top")

    def commit(
        self, state: TreeCache | ChainCache, path: Sequence[int], features: TokenFeatures | None = None
    ) -> None:
        """See `Drafter.commit`: keys and values of the path stay, the rest goes."""
        state.keep(path)

    def _fresh(self, vocab_size: int) -> PreTrainedModel:
        assert self.config is not None
        return self._random(fresh_config(self.config, vocab_size))

    def _random(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A network of this config with random weights."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=self.attention, dtype=self.dtype or torch.float32
        )
        return model

    def _adopt(self, model: PreTrainedModel) -> None:
        split_causal_lm(model)  # refuses what training and decoding would get wrong
        facts_of(model).check_attention()
        _freeze_bias(model)
        if self.freeze_embeddings:
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                embeddings.requires_grad_(False)
        if self.gradient_checkpointing:
            # transformers 5.23 renamed it and warns at the old name
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.network = add_adapters(model, self.lora) if self.lora else model
        self._lm = CachedLM(self.model)

    @torch.no_grad()
    def _copy_embeddings(self, target: PreTrainedModel | None) -> None:
        if target is None:
            raise ValueError(
                "init_from_target needs the target model, but only its vocabulary size was given."
            )
        networks: tuple[Any, Any] = self.model, target
        own, source = (network.get_input_embeddings().weight for network in networks)
        if own.shape != source.shape:
            raise ValueError(
                f"init_from_target: the target's embeddings are {tuple(source.shape)}, the drafter's "
                f"{tuple(own.shape)}; set hidden_size to {source.shape[1]} or init_from_target to false."
            )
        head = networks[1].get_output_embeddings().weight
        if self.head_weight is own and head is not source:
            raise ValueError(
                "init_from_target: the target's lm_head is not tied to its embeddings, so both cannot be "
                "copied to one matrix; set tie_word_embeddings to false."
            )
        own.copy_(source)
        self.head_weight.copy_(head)


def _freeze_bias(model: PreTrainedModel) -> None:
    """Keep a zero bias of the lm_head at zero: the chunked losses read only its weight.

    Raises:
        ValueError: a bias that is not zero.
    """
    if has_head_bias(model):
        raise ValueError(
            f"the lm_head of {type(model).__name__} has a bias, which the losses of a drafter do not apply. "
            "Draft with a model without one, such as Qwen3 or Llama; as a target this model is fine."
        )
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        bias.requires_grad_(False)


def document_mask(document_ids: Int[Tensor, "R T"], dtype: torch.dtype) -> Float[Tensor, "R 1 T T"]:
    """Additive attention mask of packed rows: 0 for earlier tokens of the same document, lowest elsewhere.

    Padding (−1) attends to earlier padding and itself, so no softmax is empty.

    Examples:
        >>> (document_mask(torch.tensor([[0, 0, 1]]), torch.float32)[0, 0] == 0).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    num = document_ids.shape[-1]
    visible = document_ids[:, :, None] == document_ids[:, None, :]  # [R, T, T]
    visible &= torch.ones(num, num, dtype=torch.bool, device=document_ids.device).tril()
    mask = torch.zeros(visible.shape, dtype=dtype, device=document_ids.device)
    return mask.masked_fill_(visible.logical_not_(), torch.finfo(dtype).min)[:, None]


def _check_start(
    config: dict[str, Any] | None = None,
    pretrained: str | None = None,
    lora: LoraSettings | None = None,
    from_target: TargetLayers | None = None,
    freeze_embeddings: bool = False,
    init_from_target: bool = False,
    **_: Any,
) -> None:
    """Refuse arguments of `CausalDrafter` that do not name one network to start from, or do not fit it."""
    if [config, pretrained, from_target].count(None) != 2:
        raise ValueError(
            "a causal drafter needs either config (fresh weights), pretrained (a folder or hub id) or "
            "from_target (layers of the target)."
        )
    if config is None and init_from_target:
        raise ValueError(
            "init_from_target overwrites embeddings; it is for a fresh config, not for pretrained or "
            "from_target."
        )
    if pretrained is None and lora is not None:
        raise ValueError(
            "lora freezes the network it adapts; it is for pretrained, not for a fresh config or from_target."
        )
    if freeze_embeddings and (config is not None or lora is not None):
        raise ValueError(
            "freeze_embeddings is for pretrained or from_target: a fresh config's are random, and lora "
            "freezes them anyway."
        )
