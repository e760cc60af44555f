"""Tree decoding with a cache around any causal LM: prefill, extend, keep.

`CachedLM` binds a model, `TreeCache` is the state of one sequence. The same two serve the target (verify all
draft tokens in one pass) and causal drafters (draft a tree level by level).

Assumed: batch 1, texts within any attention window, positions given by `position_ids`, logits = head(hidden).
A numeric probe checks it once per model (`tree_probe`).
Masks are additive floats, because eager attention silently misreads a boolean mask.
Letters: N committed tokens, K nodes of one pass, L aux hidden-state layers, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from certdraft.drafters.features.flex import ATTENTION
from certdraft.drafters.lm.chain_cache import ChainCache
from certdraft.drafters.lm.tree_cache import TreeCache
from certdraft.drafters.lm.tree_probe import check_decoding
from certdraft.support import (
    HiddenStates,
    OutputLayer,
    facts_of,
    packed_product,
    project_greedy,
    project_top,
    text_body,
)

_WHOLE_PAST = {"full_attention", "sliding_attention", "chunked_attention"}  # up to the window
_IN_ORDER = {"full_attention", "linear_attention"}  # read only as chains


def split_causal_lm(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Split a causal LM into tokens → hidden (after the final norm), and hidden → logits.

    Args:
        model: a transformers causal LM whose logits are exactly `head(hidden)`.

    Returns:
        `(body, head)`, modules of `model` itself, sharing its parameters.

    Raises:
        ValueError: the model has no output embeddings, changes its logits after the lm_head (soft-capping,
            scaling), or has layers of unknown kinds. Attention windows are refused where a text outgrows
            them, and linear attention where trees or packed rows meet it: see `ModelFacts.check_window` and
            `check_attention`.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ValueError(
            f"{name} has no separate language-model head; use a causal LM such as Qwen3ForCausalLM."
        )
    facts = facts_of(model)
    if facts.logit_changes:
        raise ValueError(
            f"{name} changes its logits after the head ({', '.join(facts.logit_changes)} in its config); use "
            "one whose logits are lm_head(hidden), such as Qwen3 or Llama."
        )
    other = set(facts.layer_types) - (_IN_ORDER if facts.recurrent else _WHOLE_PAST)
    if other:
        raise ValueError(
            f"{name} has {', '.join(sorted(other))} layers"
            f"{' beside linear_attention' * facts.recurrent}, which certdraft does not decode; use a "
            "model with attention to the previous tokens, such as Qwen3 or Llama."
        )
    return text_body(model), head


class CachedLM:
    """A causal LM that decodes token trees with a cache: the machinery under targets and causal drafters.

    Args:
        model: a transformers causal LM with eager or sdpa attention, used where and as it is; also one that
            was trained with block masks, whose attention is sdpa for the masks of decoding.
        taps: aux hidden-state layers: 0-based decoder layers whose outputs, before the final norm,
            `TreeCache.features` holds.

    Raises:
        ValueError: a model or layers it cannot serve, or one whose trees differ from its plain passes.

    Examples:
        One round of greedy tree decoding:

            lm = CachedLM(model)
            cache = lm.prefill(prompt_ids[:-1])
            logits = lm.extend(cache, [prompt_ids[-1], 7, 9], [-1, 0, 0])  # root and two siblings
            cache.keep([0, 2])                                             # root and the second sibling
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[int] = ()) -> None:
        self.model = model
        self.body, self.head = split_causal_lm(model)
        self._embeddings: Any = model.get_input_embeddings()
        self._project = OutputLayer()
        self.taps = tuple(taps)
        self.facts = facts_of(model)
        self.num_layers = self.facts.num_layers
        if model.config._attn_implementation not in ("eager", "sdpa", ATTENTION):
            raise ValueError(
                f"attention {model.config._attn_implementation!r} cannot follow a tree; load "
                f"{type(model).__name__} with attn_implementation='sdpa' or 'eager'."
            )
        if not all(0 <= tap < self.num_layers for tap in self.taps):
            raise ValueError(f"taps {self.taps} must be layers 0 to {self.num_layers - 1} of the model.")
        self._outputs = HiddenStates(self.body, self.taps)
        if not model.training:
            check_decoding(self)

    @property
    def vocab_size(self) -> int:
        """Rows of the lm_head."""
        return int(self.head.weight.shape[0])  # type: ignore[index]

    @property
    def device(self) -> torch.device:
        """Device of inputs and logits."""
        device: torch.device = self._embeddings.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states; logits are fp32 whatever it is."""
        dtype: torch.dtype = self._embeddings.weight.dtype
        return dtype

    def prefill(self, ids: Int[Tensor, " N"] | Sequence[int], room: int = 256) -> TreeCache | ChainCache:
        """Return a cache holding `ids` as committed tokens.

        No logits: the next token's come from the first `extend`, which feeds the last known token.

        Args:
            ids: token ids, possibly none.
            room: tokens to reserve beyond them; the cache doubles when it is full.

        Returns:
            The state; `length` is the number of ids, `features` [N, L, H] if `taps` names layers.

        Raises:
            ValueError: the model is in training mode, where dropout would make its logits random.
        """
        if self.model.training:
            raise ValueError(
                f"{type(self.model).__name__} is in training mode; call .eval() before decoding."
            )
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.device).reshape(1, -1)
        check_decoding(self)
        num = ids.shape[1]
        self.facts.check_window(num)
        cache: TreeCache | ChainCache = TreeCache(self.num_layers, num + room)
        if self.facts.recurrent:
            cache = ChainCache(self.model.config, num + room, self.facts.name)
        if num:
            positions = torch.arange(num, device=self.device)[None]
            self._forward(cache, ids, positions, None)
            cache.length = num
        return cache

    def extend(
        self,
        cache: TreeCache | ChainCache,
        tokens: Int[Tensor, " K"] | Sequence[int],
        parents: Sequence[int] | Int[Tensor, " K"] | None = None,
        *,
        needed: Literal["all", "top", "greedy"] = "all",
    ) -> Float[Tensor, "K V"]:
        """Append nodes to the round in one pass and return the next-token logits after each.

        Args:
            cache: the state; grows by K nodes.
            tokens: token id of each new node.
            parents: for each new node the number of its parent in this round (an earlier node, of this call
                or a previous one), −1 for a child of the last committed token. None: a chain, continuing
                the latest node.
            needed: the logits that must be exact; others may be rounded to the model's dtype. "top": the
                largest of each row, which a draft tree ranks. "greedy": its largest one.

        Returns:
            fp32 logits of the token after each new node, in the order given.
        """
        ids = torch.as_tensor(tokens, dtype=torch.long)
        num, old = ids.numel(), cache.num_nodes
        if parents is None:
            parents = range(old - 1, old + num - 1)
        elif isinstance(parents, Tensor):
            parents = parents.tolist()
        if num == 0 or len(parents) != num:
            raise ValueError(
                f"{num} tokens and {len(parents)} parents; each token, at least one, needs a parent."
            )
        ids = ids.view(1, -1).to(self.device)
        before = self._waiting(cache)
        cache.append(parents)
        self.facts.check_window(cache.length + max(cache.depths[old:]) + 1)
        positions = torch.tensor(cache.depths[old:]).add_(cache.length)[None].to(self.device)
        if before is not None:
            ids = torch.cat([before, ids], 1)
            positions = torch.arange(cache.length - before.shape[1], cache.length + num, device=self.device)[
                None
            ]
        mask = cache.mask(num, self.dtype, self.device)
        hidden = self._forward(cache, ids, positions, mask)[:, -num:]
        if cache.features is not None:
            cache.features = cache.features[-num:]
        if isinstance(cache, ChainCache):
            cache.remember(ids[0, -num:].tolist())
        with torch.no_grad():
            if needed == "all":
                return self.project(hidden[0])
            head: Any = self.head
            project = project_top if needed == "top" else project_greedy
            return project(hidden[0], head.weight, head.bias, packed_product(head))

    def _waiting(self, cache: TreeCache | ChainCache) -> Int[Tensor, "1 W"] | None:
        """Committed tokens to be read in front of a round that begins; too many are read here, for good."""
        if not isinstance(cache, ChainCache) or cache.num_nodes or not cache.waiting:
            return None
        ids = torch.tensor([cache.waiting], device=self.device)
        if not cache.overdue:
            return ids
        positions = torch.arange(cache.length - len(cache.waiting), cache.length, device=self.device)[None]
        self._forward(cache, ids, positions, None)
        cache.waiting = []
        return None

    def project(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """fp32 logits from hidden states after the final norm."""
        head: Any = self.head
        return self._project(hidden, head.weight, head.bias, head)

    @torch.no_grad()
    def _forward(
        self, cache: TreeCache | ChainCache, ids: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Last hidden state [1, K, H] of one pass; writes the cache and the features."""
        with self._outputs.recorded():
            hidden: Tensor = self.body(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache.past,
                use_cache=True,
            ).last_hidden_state
            if self.taps:
                cache.features = self._outputs.take()[0]  # [K, L, H]
        return hidden
