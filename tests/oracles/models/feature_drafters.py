"""EAGLE-3, DFlash and DSpark from their definitions: float64, no cache, no batching, one head at a time.

All read a drafter's weights by their published names and the target's embeddings and head. Nothing is
imported from the package.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from oracles.mathematics.rotary import frequencies
from torch import Tensor, nn

Weights = dict[str, Tensor]


def weights_of(drafter: Any) -> Weights:
    """State dict, embeddings and target head of a drafter, in float64."""
    state = {name: value.double() for name, value in drafter.state_dict().items()}
    return state | {"embed": drafter.ends.embeddings.double(), "target_head": drafter.ends.head.double()}


def enlarge(module: nn.Module, seed: int = 0) -> None:
    """Random weights so large that reading a wrong token, or a wrong weight, shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        mean = 0.0 if parameter.ndim > 1 else 1.0
        nn.init.normal_(parameter, mean=mean, std=0.25, generator=generator)


def assert_checkpointing_changes_nothing(drafter: Any, ids: Tensor, features: Tensor) -> None:
    """One text's gradients with and without recomputed layers; a seed, because anchors are drawn."""
    row = torch.arange(len(ids))[None]
    args = ids[None], row, torch.zeros_like(row), torch.ones_like(row).bool(), features[None]
    gradients = []
    for flag in (False, True):
        drafter.gradient_checkpointing = flag
        drafter.zero_grad()
        torch.manual_seed(0)
        drafter.head(drafter.paths(*args).hidden).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in drafter.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def packed_paths(drafter: Any, ids: Tensor, features: Tensor, every: bool) -> Any:
    """Rounds along one row of two documents, of 5 and 6 tokens, and two tokens of padding."""
    documents = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2])
    positions = torch.tensor([[*range(5), *range(6), 0, 1]])
    return drafter.paths(ids[None], positions, documents, documents >= 0, features[None], every=every)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rope(x: Tensor, position: int, config: Any) -> Tensor:
    """x: [D] of one head."""
    turns, scale = frequencies(config.rope_theta, len(x), config.rope_scaling)
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * turns[i]
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out * scale


def heads(x: Tensor, size: int) -> list[Tensor]:
    return list(x.split(size))


def attend(queries: list[Tensor], keys: list[list[Tensor]], values: list[list[Tensor]]) -> Tensor:
    """One query per head over [key][key-value head]."""
    group = len(queries) // len(keys[0])
    mixed = []
    for head, query in enumerate(queries):
        scores = torch.stack([query @ key[head // group] / math.sqrt(len(query)) for key in keys]).softmax(0)
        mixed.append(sum(s * value[head // group] for s, value in zip(scores, values, strict=True)))
    return torch.cat(mixed)


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    gate = w[f"{name}.gate_proj.weight"] @ x
    return w[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[f"{name}.up_proj.weight"] @ x))


def eagle_logits(drafter: Any, text: list[int], features: Tensor, drafted: list[int]) -> Tensor:
    """Logits [1 + len(drafted), V] after the root (the last token of `text`) and each drafted token.

    features: [N, L, H] at every token of the text but the root.
    """
    w, c = weights_of(drafter), drafter.config
    norms = (w["midlayer.input_layernorm.weight"], w["midlayer.hidden_norm.weight"])
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    output = torch.empty(0)
    rows = []
    for place, token in enumerate([*text[1:], *drafted]):
        if place < len(features):
            layers = features[place].double()
            if c.fc_norm:
                layers = torch.stack(
                    [rms(f, w[f"fc_norm.{i}.weight"], c.rms_norm_eps) for i, f in enumerate(layers)]
                )
            wide = layers.flatten()
            wide = rms(wide, w["input_norm.weight"], c.rms_norm_eps) if c.norm_before_fc else wide
            feature = w["fc.weight"] @ wide
        elif c.norm_output:
            feature = rms(output, w["norm.weight"], c.rms_norm_eps)
        else:
            feature = output
        normed = rms(feature, norms[1], c.rms_norm_eps)
        residual = normed if c.norm_before_residual else feature
        read = torch.cat([rms(w["embed"][token], norms[0], c.rms_norm_eps), normed])
        q, k, v = (
            heads(w[f"midlayer.self_attn.{name}_proj.weight"] @ read, c.head_dim) for name in ("q", "k", "v")
        )
        if c.qk_norm:
            q = [rms(x, w["midlayer.self_attn.q_norm.weight"], c.rms_norm_eps) for x in q]
            k = [rms(x, w["midlayer.self_attn.k_norm.weight"], c.rms_norm_eps) for x in k]
        keys.append([rope(x, place, c) for x in k])
        values.append(v)
        mixed = attend([rope(x, place, c) for x in q], keys, values)
        hidden = residual + w["midlayer.self_attn.o_proj.weight"] @ mixed
        normed = rms(hidden, w["midlayer.post_attention_layernorm.weight"], c.rms_norm_eps)
        output = hidden + mlp(normed, w, "midlayer.mlp")
        if place >= len(text) - 2:
            logits = w["lm_head.weight"] @ rms(output, w["norm.weight"], c.rms_norm_eps)
            full = logits.new_full((len(w["embed"]),), -1e4)
            ids = range(len(logits))
            if "d2t" in w:
                ids = [i + int(offset) for i, offset in enumerate(w["d2t"])]
            for i, token_id in enumerate(ids):
                full[token_id] = logits[i]
            rows.append(full)
    return torch.stack(rows)


def block_logits(drafter: Any, root: int, features: Tensor) -> Tensor:
    """Logits [B − 1, V] of the block after N committed tokens with features [N, L, H]."""
    head = weights_of(drafter)["target_head"]
    return torch.stack([head @ state for state in block_states(drafter, root, features)[1:]])


def dspark_drafts(drafter: Any, root: int, features: Tensor, drafted: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [1 + len(drafted), V] after the root and each drafted token, and the chances [1 + len(drafted)].

    features: [N, L, H] at every committed token before the root.
    """
    w, c = weights_of(drafter), drafter.config
    states = block_states(drafter, root, features)
    states = states if c.sample_from_anchor else states[1:]
    logits, chances = [], []
    for state, previous in zip(states, [root, *drafted], strict=False):
        embedding = w["markov_head.markov_w1.weight"][previous]
        logits.append(w["target_head"] @ state + w["markov_head.markov_w2.weight"] @ embedding)
        if c.enable_confidence_head:
            read = torch.cat([state, embedding]) if c.confidence_head_with_markov else state
            odds = w["confidence_head.proj.weight"][0] @ read + w["confidence_head.proj.bias"][0]
            chances.append(1 / (1 + torch.exp(-odds)))
    return torch.stack(logits), torch.stack(chances) if chances else torch.empty(0)


def block_states(drafter: Any, root: int, features: Tensor) -> list[Tensor]:
    """Normed states at the B positions of the block after N committed tokens with features [N, L, H]."""
    w, c = weights_of(drafter), drafter.config
    context = [
        rms(w["fc.weight"] @ f.double().flatten(), w["hidden_norm.weight"], c.rms_norm_eps) for f in features
    ]
    block = [w["embed"][token] for token in [root, *[c.mask_token_id] * (c.block_size - 1)]]
    for index in range(c.num_hidden_layers):
        name = f"layers.{index}"

        def project(x: Tensor, which: str, place: int, name: str = name) -> list[Tensor]:
            parts = heads(w[f"{name}.self_attn.{which}_proj.weight"] @ x, c.head_dim)
            if which == "v":
                return parts
            weight = w[f"{name}.self_attn.{which}_norm.weight"]
            return [rope(rms(part, weight, c.rms_norm_eps), place, c) for part in parts]

        read = [rms(x, w[f"{name}.input_layernorm.weight"], c.rms_norm_eps) for x in block]
        sources = [*context, *read]
        keys = [project(x, "k", place) for place, x in enumerate(sources)]
        values = [project(x, "v", place) for place, x in enumerate(sources)]
        new = []
        for slot, x in enumerate(block):
            at = len(context) + slot
            sliding = c.layer_types is not None and c.layer_types[index] == "sliding_attention"
            causal = sliding if c.causal is None else c.causal
            seen = [
                place for place in range(len(keys))
                if not (causal and place > at) and not (sliding and abs(at - place) >= c.sliding_window)
            ]  # fmt: skip
            queries = project(read[slot], "q", at)
            mixed = attend(queries, [keys[place] for place in seen], [values[place] for place in seen])
            hidden = x + w[f"{name}.self_attn.o_proj.weight"] @ mixed
            normed = rms(hidden, w[f"{name}.post_attention_layernorm.weight"], c.rms_norm_eps)
            new.append(hidden + mlp(normed, w, f"{name}.mlp"))
        block = new
    return [rms(x, w["norm.weight"], c.rms_norm_eps) for x in block]
