"""Targets and drafters to reason about: tiny networks, hand-made tables, and drafters that misbehave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft.drafters import CachedLM, CausalDrafter, TreeCache

Distribution = Callable[[tuple[int, ...]], Sequence[float]]  # next-token probabilities after a prefix


def tiny_qwen3(
    seed: int = 0, vocab_size: int = 40, layers: int = 2, attention: str = "sdpa"
) -> Qwen3ForCausalLM:
    """A random fp32 network whose greedy text varies: large weights, and a confident head."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=160,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    config._attn_implementation = attention
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 3
    return model


def perturbed(model: Qwen3ForCausalLM, scale: float, seed: int = 1) -> Qwen3ForCausalLM:
    """A copy with noise of relative size `scale` in every matrix: a drafter that is right sometimes."""
    copy = Qwen3ForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.ndim == 2:
                weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
    return copy


def disturbed_drafter(model: Qwen3ForCausalLM, scale: float) -> CausalDrafter:
    """The product's own drafter, with the target's weights disturbed; see `perturbed`."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "head_dim")
    config = {key: getattr(model.config, key) for key in sizes}
    drafter = CausalDrafter(config=config, vocab_size=model.config.vocab_size).eval()
    drafter.model.load_state_dict(perturbed(model, scale).state_dict())
    return drafter


class NetworkDrafter:
    """A causal LM as a conditional drafter; counts its passes."""

    kind = "conditional"
    taps = ()

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model, self.lm = model, CachedLM(model)
        self.vocab_size = model.config.vocab_size
        self.passes: list[int] = []

    def start(self, ids: Sequence[int]) -> TreeCache:
        return self.lm.prefill(ids)

    def draft(self, state: TreeCache, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.passes.append(len(tokens))
        return self.lm.extend(state, tokens, parents)

    def commit(self, state: TreeCache, path: Sequence[int]) -> None:
        state.keep(path)

    def parameters(self):
        return self.model.parameters()

    def hidden(self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor) -> Tensor:
        return self.lm.body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm.head(hidden)


class _Text:
    """State of the table models: committed tokens and the nodes of the round."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.tokens, self.parents = list(ids), [], []

    def extend(self, tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
        """The prefixes that end in the new nodes."""
        first = len(self.tokens)
        self.tokens += tokens
        self.parents += parents
        return [self.prefix(node) for node in range(first, len(self.tokens))]

    def prefix(self, node: int) -> tuple[int, ...]:
        path: list[int] = []
        while node >= 0:
            path.append(self.tokens[node])
            node = self.parents[node]
        return (*self.ids, *reversed(path))

    def keep(self, path: Sequence[int]) -> None:
        for parent, node in itertools.pairwise([-1, *path]):
            assert self.parents[node] == parent, "not a root path"
        self.ids += [self.tokens[node] for node in path]
        self.tokens, self.parents = [], []


def _logits(distribution: Distribution, prefixes: Sequence[tuple[int, ...]]) -> Tensor:
    return (
        torch.tensor([list(distribution(prefix)) for prefix in prefixes], dtype=torch.float64).log().float()
    )


class TableTarget:
    """A target given by a function from prefixes to probabilities."""

    max_context = None

    def __init__(self, distribution: Distribution, vocab_size: int) -> None:
        self.distribution, self.vocab_size = distribution, vocab_size

    def start(self, ids: Sequence[int]) -> _Text:
        return _Text(ids)

    def verify(self, state: _Text, tree) -> Tensor:
        return _logits(self.distribution, state.extend(tree.tokens, tree.parents))

    def features(self, state: _Text) -> None:
        return None

    def keep(self, state: _Text, path: Sequence[int]) -> None:
        state.keep(path)


class TableDrafter:
    """A conditional drafter given by a function from prefixes to probabilities; counts its passes."""

    kind = "conditional"
    taps = ()

    def __init__(self, distribution: Distribution, vocab_size: int) -> None:
        self.distribution, self.vocab_size = distribution, vocab_size
        self.passes: list[int] = []

    def start(self, ids: Sequence[int]) -> _Text:
        return _Text(ids)

    def draft(self, state: _Text, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.passes.append(len(tokens))
        return _logits(self.distribution, state.extend(tokens, parents))

    def commit(self, state: _Text, path: Sequence[int]) -> None:
        state.keep(path)


class MarginalDrafter(TableDrafter):
    """A parallel drafter: `distribution(prefix)` gives one row per draft depth, [D][V]."""

    kind = "marginal"

    def draft(self, state: _Text, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        self.passes.append(len(tokens))
        prefix = state.extend(tokens, parents)[-1]
        return torch.tensor(self.distribution(prefix), dtype=torch.float64).log().float()


class GarbageDrafter(TableDrafter):
    """Random logits at every call, from its own generator; sometimes with ties everywhere."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        super().__init__(lambda prefix: [], vocab_size)
        self.generator = torch.Generator().manual_seed(seed)

    def draft(self, state: _Text, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        rows = len(state.extend(tokens, parents))
        logits = torch.randn(rows, self.vocab_size, generator=self.generator)
        return logits.round() if torch.rand((), generator=self.generator) < 0.5 else 5 * logits


class FeatureDrafter(NetworkDrafter):
    """A network that also reads two target layers: those of the last token committed before the round."""

    taps = (0, 1)

    def __init__(self, model: Qwen3ForCausalLM, strength: float = 1.0, seed: int = 5) -> None:
        super().__init__(model)
        generator = torch.Generator().manual_seed(seed)
        self.weight = strength * torch.randn(
            self.vocab_size, 2 * model.config.hidden_size, generator=generator
        )

    def bias(self, features: Tensor) -> Tensor:
        """[..., L, H] -> [..., V]"""
        return features.flatten(-2).float() @ self.weight.T

    def start(self, ids: Sequence[int], features: Tensor) -> TreeCache:
        assert len(features) == len(ids)
        state = super().start(ids)
        state.bias = self.bias(features[-1])
        return state

    def draft(self, state: TreeCache, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        return super().draft(state, tokens, parents) + state.bias

    def commit(self, state: TreeCache, path: Sequence[int], features: Tensor | None = None) -> None:
        super().commit(state, path)
        if features is not None:
            state.bias = self.bias(features[-1])

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, features: Tensor
    ) -> Tensor:
        """Depth 1 at every step: the token just read has no feature yet, the one before it has."""
        before = torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], dim=1)
        return torch.cat([super().hidden(input_ids, position_ids, document_ids), self.bias(before)], dim=-1)

    def head(self, hidden: Tensor) -> Tensor:
        size = hidden.shape[-1] - self.vocab_size
        return super().head(hidden[..., :size]) + hidden[..., size:]


class FeatureMarginalDrafter(MarginalDrafter):
    """A parallel drafter that reads a target layer of all committed tokens (their mean)."""

    taps = (1,)

    def __init__(self, distribution, vocab_size: int, hidden_size: int, seed: int = 6) -> None:
        super().__init__(distribution, vocab_size)
        self.weight = torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(seed))

    def start(self, ids: Sequence[int], features: Tensor) -> _Text:
        state = super().start(ids)
        state.seen = features[:, 0].float()
        assert len(state.seen) == len(ids)
        return state

    def draft(self, state: _Text, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        return super().draft(state, tokens, parents) + state.seen.mean(0) @ self.weight.T

    def commit(self, state: _Text, path: Sequence[int], features: Tensor | None = None) -> None:
        super().commit(state, path)
        if features is not None:
            state.seen = torch.cat([state.seen, features[:, 0].float()])


class BrokenDrafter(NetworkDrafter):
    """A network that turns to NaN in the given drafter passes: in its logits and in its cache."""

    def __init__(self, model: Qwen3ForCausalLM, broken: Callable[[int], bool]) -> None:
        super().__init__(model)
        self.broken = broken

    def draft(self, state: TreeCache, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        logits = super().draft(state, tokens, parents)
        if not self.broken(len(self.passes)):
            return logits
        for layer in state.layers:
            layer.keys[:, :, -len(tokens) :] = math.nan
        return logits * math.nan


def random_distribution(vocab_size: int, seed: int, sharpness: float = 1.0) -> Distribution:
    """A fixed random distribution for every prefix of at most the last three tokens."""
    cache: dict[tuple[int, ...], list[float]] = {}

    def distribution(prefix: tuple[int, ...]) -> list[float]:
        key = prefix[-3:]
        if key not in cache:
            number = seed + sum((token + 1) * 97**i for i, token in enumerate(key))
            logits = sharpness * torch.randn(vocab_size, generator=torch.Generator().manual_seed(number))
            cache[key] = logits.double().softmax(-1).tolist()
        return cache[key]

    return distribution


def all_prefixes(
    distribution: Distribution, start: tuple[int, ...], vocab_size: int, max_depth: int
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `start` of 1..max_depth tokens, by enumeration."""
    masses: dict[tuple[int, ...], float] = {}
    for depth in range(1, max_depth + 1):
        for path in itertools.product(range(vocab_size), repeat=depth):
            above = masses[path[:-1]] if depth > 1 else 1.0
            masses[path] = above * distribution((*start, *path[:-1]))[path[-1]]
    return masses


def with_one_wrong_token(decode: Callable[..., Any], place: int, vocab_size: int) -> Callable[..., Any]:
    """`decode`, whose texts have another token at `place`."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = decode(*args, **kwargs)
        result.tokens[place] = (result.tokens[place] + 1) % vocab_size
        return result

    return wrong
