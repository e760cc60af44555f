"""Engines in a hundred lines: drafters read from their exported files alone, and decoded without any cache.

Written from the formats' descriptions (names, layer numbering, positions), in plain torch; shares nothing
with the package, least of all its modules. Every round runs target and drafter over the whole text again.

Letters: N tokens, H target hidden, h drafter hidden, A tapped layers, K draft tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from oracles.mathematics.rotary import frequencies
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Reader:
    """What both kinds share: config, tensors, the target's two ends."""

    def __init__(self, folder: Path, target: Any) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.sizes = self.config.get("transformer_layer_config", self.config)
        self.weights = load_file(folder / "model.safetensors")
        self.embeddings = target.get_input_embeddings().weight.detach()
        self.head = target.get_output_embeddings().weight.detach()
        self.eps = self.sizes["rms_norm_eps"]

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        size = self.sizes["head_dim"]
        rope = self.sizes["rope_parameters"]
        turns, scale = frequencies(rope["rope_theta"], size, rope)
        angles = positions[:, None] * torch.tensor(turns)
        angles = torch.cat([angles, angles], -1)
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return (x * angles.cos() + turned * angles.sin()) * scale

    def project(self, prefix: str, part: str, x: Tensor) -> Tensor:
        """[N, heads, d] as [heads, N, d], with the norm of queries or keys where there is one."""
        y = (x @ self.weights[f"{prefix}.self_attn.{part}_proj.weight"].T).unflatten(
            -1, (-1, self.sizes["head_dim"])
        )
        scale = self.weights.get(f"{prefix}.self_attn.{part}_norm.weight")
        return (y if scale is None else norm(y, scale, self.eps)).transpose(0, 1)

    def attend(
        self, prefix: str, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        groups = queries.shape[0] // keys.shape[0]
        mixed = scaled_dot_product_attention(
            queries, keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0), attn_mask=mask
        )
        return mixed.transpose(0, 1).flatten(1) @ self.weights[f"{prefix}.self_attn.o_proj.weight"].T

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T


class Eagle3Reader(Reader):
    """An EAGLE-3 head, flat or in the layout of speculators."""

    def __init__(self, folder: Path, target: Any) -> None:
        super().__init__(folder, target)
        self.prefix = "midlayer" if "midlayer.hidden_norm.weight" in self.weights else "layers.0"
        self.hidden_states = self.config["eagle_aux_hidden_state_layer_ids"]

    def draft(self, ids: Sequence[int], hidden_states: Sequence[Tensor], num_tokens: int) -> list[int]:
        """Tokens after `ids`, of whose last one the target's hidden states are not known."""
        w, at, flags = self.weights, self.prefix, self.config
        layers = [hidden_states[k][: len(ids) - 1] for k in self.hidden_states]
        if flags["fc_norm"]:
            layers = [norm(x, w[f"fc_norm.{number}.weight"], self.eps) for number, x in enumerate(layers)]
        wide = torch.cat(layers, -1)
        wide = norm(wide, w["input_norm.weight"], self.eps) if flags["norm_before_fc"] else wide
        features = wide @ w["fc.weight"].T
        tokens, drafted = list(ids[1:]), []
        while True:
            count = len(tokens)
            embedded = norm(self.embeddings[tokens], w[f"{at}.input_layernorm.weight"], self.eps)
            normed = norm(features, w[f"{at}.hidden_norm.weight"], self.eps)
            read = torch.cat([embedded, normed], -1)
            residual = normed if flags["norm_before_residual"] else features
            positions = torch.arange(count)
            queries, keys = (self.rope(self.project(at, part, read), positions) for part in "qk")
            causal = torch.ones(count, count, dtype=torch.bool).tril()
            x = residual + self.attend(at, queries, keys, self.project(at, "v", read), causal)
            x = x + self.mlp(at, norm(x, w[f"{at}.post_attention_layernorm.weight"], self.eps))
            output = norm(x[-1:], w["norm.weight"], self.eps)
            best = int((output @ w["lm_head.weight"].T).argmax())
            drafted.append(best + int(w["d2t"][best]) if "d2t" in w else best)
            if len(drafted) == num_tokens:
                return drafted
            tokens, features = (
                [*tokens, drafted[-1]],
                torch.cat([features, output if flags["norm_output"] else x[-1:]]),
            )


class DFlashReader(Reader):
    """A block drafter in z-lab's layout or that of speculators."""

    def __init__(self, folder: Path, target: Any) -> None:
        super().__init__(folder, target)
        section = self.config.get("dflash_config", self.config)
        self.mask = section["mask_token_id"]
        self.causal = section.get("causal")  # of z-lab's layout; None: layers with a window are
        if self.config.get("sliding_window_non_causal"):
            self.causal = False
        speculators = self.config.get("aux_hidden_state_layer_ids")
        self.hidden_states = speculators or [k + 1 for k in section["target_layer_ids"]]

    def draft(self, ids: Sequence[int], hidden_states: Sequence[Tensor], num_tokens: int) -> list[int]:
        """Tokens after `ids`; the block is as long as what is asked for, as in vLLM."""
        logits = self.block(ids, hidden_states, num_tokens)[1:] @ self.head.T
        return [int(token) for token in logits.argmax(-1)]

    def block(self, ids: Sequence[int], hidden_states: Sequence[Tensor], num_masks: int) -> Tensor:
        """Normed states of the last token of `ids` and so many masks after it."""
        w, known = self.weights, len(ids) - 1
        context = torch.cat([hidden_states[k][:known] for k in self.hidden_states], -1) @ w["fc.weight"].T
        context = norm(context, w["hidden_norm.weight"], self.eps)
        x = self.embeddings[[ids[-1], *[self.mask] * num_masks]]
        positions = torch.arange(known + len(x))
        for layer in range(self.sizes["num_hidden_layers"]):
            at = f"layers.{layer}"
            read = norm(x, w[f"{at}.input_layernorm.weight"], self.eps)
            both = torch.cat([context, read])
            queries = self.rope(self.project(at, "q", read), positions[known:])
            keys = self.rope(self.project(at, "k", both), positions)
            sliding = self.sizes["layer_types"][layer] == "sliding_attention"
            back = positions[known:, None] - positions
            seen = torch.ones_like(back, dtype=torch.bool)
            if sliding:
                seen &= back.abs() < self.sizes["sliding_window"]
            if sliding if self.causal is None else self.causal:
                seen &= back >= 0
            x = x + self.attend(at, queries, keys, self.project(at, "v", both), seen)
            x = x + self.mlp(at, norm(x, w[f"{at}.post_attention_layernorm.weight"], self.eps))
        return norm(x, w["norm.weight"], self.eps)


class DSparkReader(DFlashReader):
    """A DSpark drafter in DeepSpec's layout or that of speculators; its block is always whole."""

    def draft(self, ids: Sequence[int], hidden_states: Sequence[Tensor], num_tokens: int) -> list[int]:
        """Tokens after `ids`, each by the token before it."""
        w, tokens = self.weights, [ids[-1]]
        states = self.block(ids, hidden_states, self.config["block_size"] - 1)
        for state in states[0 if self.config["sample_from_anchor"] else 1 :][:num_tokens]:
            bias = w["markov_head.markov_w2.weight"] @ w["markov_head.markov_w1.weight"][tokens[-1]]
            tokens.append(int((self.head @ state + bias).argmax()))
        return tokens[1:]


@torch.no_grad()
def speculate(
    target: Any,
    reader: Reader,
    prompt: Sequence[int],
    num_tokens: int,
    max_new_tokens: int,
    clamp: bool = True,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Greedy speculative decoding without a cache.

    Returns:
        The new tokens, and of every round how many were drafted and how many of them accepted. With `clamp`
        a draft is never longer than what is still wanted.
    """
    text, rounds = list(prompt), []
    while (wanted := len(prompt) + max_new_tokens - len(text)) > 0:
        known = target(torch.tensor([text]), output_hidden_states=True).hidden_states
        length = min(num_tokens, wanted - 1) if clamp else num_tokens
        draft = reader.draft(text, [states[0] for states in known], num_tokens)[:length]
        best = target(torch.tensor([[*text, *draft]])).logits[0, len(text) - 1 :].argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
        text += [*draft[:accepted], best[accepted]]
        rounds.append((len(draft), accepted))
    return text[len(prompt) :][:max_new_tokens], rounds
