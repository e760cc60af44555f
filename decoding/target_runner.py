"""The target's side of a round: one tree pass over a KV cache, and its compaction.

`TargetRunner` is a thin adapter around a transformers causal LM. Anything with the members of `Target` can
stand in for it, which is how tests decode hand-made distributions. Letters: N committed tokens, S
= 1 + n tree slots, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from certdraft.decoding.trees.tree import Tree
from certdraft.drafters import CachedLM, ChainCache, TreeCache
from certdraft.support import context_limit as context_limit
from certdraft.support import pack_linears


class Target(Protocol):
    """What the loop needs from a target; the state returned by `start` is opaque to it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context(self) -> int | None:
        """Positions the model can read; None = no limit."""
        ...

    def start(self, ids: Sequence[int]) -> Any:
        """State with these tokens committed."""
        ...

    def verify(self, state: Any, tree: Tree) -> Float[Tensor, "S V"]:
        """fp32 next-token logits after every slot of the tree, from one pass.

        A target may also have `verify_greedy` and `verify_top`, the same where only the greedy tokens, or the
        largest logits, must be exact.
        """
        ...

    def features(self, state: Any) -> Float[Tensor, "S L H"] | None:
        """Outputs of the tapped layers in the latest pass; asked for only when the drafter reads them."""
        ...

    def keep(self, state: Any, path: Sequence[int]) -> None:
        """Commit the slots of a root path, drops the others."""
        ...


class TargetRunner:
    """A causal LM as a target.

    Args:
        model: any transformers causal LM with full attention, for chains with linear attention too; used
            in its own dtype and on its own device.
        taps: decoder layers whose outputs the drafter reads; see `certdraft.drafters.Drafter.taps`.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[int] = ()) -> None:
        self.model, self.taps = model, tuple(taps)
        pack_linears(model)
        self.lm = CachedLM(model, taps)
        self.fingerprint = fingerprint(model)

    @property
    def vocab_size(self) -> int:
        """Rows of the language-model head."""
        return self.lm.vocab_size

    @property
    def max_context(self) -> int | None:
        """Positions or attention window of the model, whichever is smaller."""
        return context_limit(self.model)

    @property
    def chains_only(self) -> bool:
        """Whether layers of the model read tokens in order, so that it verifies chains and no trees."""
        return self.lm.facts.recurrent

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.lm.device

    def start(self, ids: Sequence[int]) -> TreeCache | ChainCache:
        """See `Target.start`."""
        return self.lm.prefill(ids)

    def verify(self, state: TreeCache | ChainCache, tree: Tree) -> Float[Tensor, "S V"]:
        """See `Target.verify`."""
        return self.lm.extend(state, tree.tokens, tree.parents)

    def verify_greedy(self, state: TreeCache | ChainCache, tree: Tree) -> Float[Tensor, "S V"]:
        """Like `verify`, but only the greedy tokens are exact, which is cheaper in bf16 on a CPU."""
        return self.lm.extend(state, tree.tokens, tree.parents, needed="greedy")

    def verify_top(self, state: TreeCache | ChainCache, tree: Tree) -> Float[Tensor, "S V"]:
        """Like `verify`, but only the largest logits of each slot are exact."""
        return self.lm.extend(state, tree.tokens, tree.parents, needed="top")

    def features(self, state: TreeCache | ChainCache) -> Float[Tensor, "S L H"] | None:
        """See `Target.features`; None without taps."""
        return state.features

    def keep(self, state: TreeCache | ChainCache, path: Sequence[int]) -> None:
        """See `Target.keep`."""
        state.keep(path)


def verifier(target: Target, needed: str) -> Callable[[Any, Tree], Tensor]:
    """The target's pass over a tree: the cheapest it has that gives the needed logits; see `Acceptor`."""
    found: Callable[[Any, Tree], Tensor] = getattr(target, f"verify_{needed}", target.verify)
    return found


def fingerprint(model: object) -> str:
    """What latency depends on: class, parameter shapes and dtypes, attention kernel; not the weights.

    Of an object that only watches a model, its attribute `wrapped`, it is that of the model.
    """
    model = getattr(model, "wrapped", model)
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        return name
    shapes = sorted(f"{key} {tuple(value.shape)} {value.dtype}" for key, value in model.named_parameters())
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "")
    digest = hashlib.sha256("\n".join([*shapes, str(attention)]).encode()).hexdigest()
    return f"{name} {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M {digest[:12]}"


def device_name(device: torch.device | str = "cpu") -> str:
    """The machine as a cost model records it: GPU name, or CPU model and threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next(
                (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
            )
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"
