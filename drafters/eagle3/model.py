"""EagleDrafter: one transformer layer that reads the target's features (EAGLE-3, arXiv 2503.01840).

The row of token t reads the embedding of token t and the fused target features at token t − 1, and drafts
token t + 1. The first token of a text has no features before it, hence no row; row t sits at position t − 1,
as in every engine. Further down a round the drafter's own output, before its norm, stands in for the features
nobody has yet; training unrolls exactly that ("training-time test").

Letters: R rows, T tokens of a row, N committed tokens, K nodes of one call, S draft depth, L tapped layers,
H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from certdraft.drafters.eagle3.config import EagleConfig, EagleLayer
from certdraft.drafters.eagle3.export import read_eagle3
from certdraft.drafters.eagle3.state import EagleState
from certdraft.drafters.features.draft_vocab import Coverage, choose, coverage, from_tables, spread, to_tables
from certdraft.drafters.features.feature_drafter import FeatureDrafter, TargetEnds, completed, initialise
from certdraft.drafters.features.feature_layers import checked, eagle_layers
from certdraft.drafters.features.grouped_attention import grouped_attention
from certdraft.drafters.features.transformer_layer import RMSNorm, cached_attention, known
from certdraft.drafters.formats.format_files import Weights
from certdraft.drafters.formats.warm_start import check_belongs, folder_of
from certdraft.drafters.training_paths import Paths, reach, steps_from
from certdraft.support import project_fp32


class EagleDrafter(FeatureDrafter):
    """An EAGLE-3 head: drafts token by token from the target's features.

    Args:
        config: sizes, target layers, draft vocabulary; for `pretrained` its own are used.
        pretrained: folder or hub id of a published EAGLE-3 head to start from.
        unroll: draft steps trained, each on the drafter's own output of the step before.
        init_from_target: start the output layer of a fresh head as the target's, cut to the draft vocabulary.
        max_lost_coverage: refuse a draft vocabulary that misses more of the target's greedy tokens.
        short_until: share of the training in which the first draft step alone is trained, before the unroll;
            None: half for a fresh head, nothing for a published one.
        dtype: of the parameters.
        gradient_checkpointing: recompute each unroll step in the backward pass, for memory.

    Raises:
        ValueError: an unroll below 1; `short_until` outside [0, 1); `config` given with `pretrained`; a
            checkpoint this class cannot reproduce.
        FileNotFoundError: `pretrained` is not there.
    """

    kind: Literal["conditional", "marginal"] = "conditional"
    config: EagleConfig

    def __init__(
        self,
        config: EagleConfig | None = None,
        pretrained: str | None = None,
        *,
        unroll: int = 5,
        init_from_target: bool = True,
        max_lost_coverage: float = 0.05,
        short_until: float | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(config, pretrained, init_from_target, short_until, dtype, gradient_checkpointing)
        if unroll < 1:
            raise ValueError(f"unroll is {unroll}; it counts draft steps and must be at least 1.")
        self.config, self.unroll = config or EagleConfig(), unroll
        self.lost: Coverage | None = None  # what the draft vocabulary misses of the trace
        self.max_lost_coverage = max_lost_coverage

    # ---- the network

    def build(
        self,
        vocab_size: int,
        target: PreTrainedModel | None = None,
        counts: Int[Tensor, " V"] | None = None,
    ) -> Self:
        """Makes the network for a target; to be called once, before the optimiser is made.

        Args:
            vocab_size: entries of the target's vocabulary.
            target: the target.
            counts: how often the target's greedy token was each token: chooses the draft vocabulary of a
                fresh head, judges that of a pretrained one. Not needed for a full vocabulary.

        Returns:
            The drafter itself.

        Raises:
            ValueError: no target, or one that does not fit; a draft vocabulary without counts, or one that
                misses more than `max_lost_coverage` of them.
        """
        target = self._check_target(vocab_size, target)
        if self.pretrained is None:
            self._build_fresh(target, counts)
        else:
            self._restore(self.pretrained, target)
        ids = self.draft_ids
        if ids is not None and counts is not None:
            self.lost = coverage(counts, ids.cpu())
            if self.lost.lost > self.max_lost_coverage:
                raise ValueError(
                    f"the draft vocabulary of {len(ids)} tokens misses too much of what the target says: "
                    f"{self.lost}. Raise draft_vocab_size, or max_lost_coverage "
                    f"({self.max_lost_coverage:.0%})."
                )
        return self

    def _build_fresh(self, target: PreTrainedModel, counts: Tensor | None) -> None:
        num, vocab_size = int(target.config.num_hidden_layers), len(TargetEnds.of(target).embeddings)
        layers = self.config.target_layer_ids
        layers = eagle_layers(num) if layers is None else checked(layers, num)
        size = self.config.draft_vocab_size
        ids = None
        if size is not None and size != vocab_size:
            if counts is None:
                raise ValueError(
                    f"a draft vocabulary of {size} tokens is chosen by how often the target says "
                    "each: give a trace to count in, or leave draft_vocab_size out for the whole vocabulary."
                )
            ids = choose(counts, size)
        self.config = completed(
            self.config, target, target_layer_ids=layers, draft_vocab_size=vocab_size if ids is None else size
        )
        self.ends, self.num_target_layers = TargetEnds.of(target), num
        self._make(ids)
        initialise(self)
        if self.init_from_target:
            self._copy_head()

    def _restore(self, name: str, target: PreTrainedModel) -> None:
        folder = folder_of(name)
        config, vocab_size, weights = read_eagle3(folder)
        self.num_target_layers = int(target.config.num_hidden_layers)
        layers = config.target_layer_ids
        layers = (
            eagle_layers(self.num_target_layers)
            if layers is None
            else checked(layers, self.num_target_layers)
        )
        self.config = completed(config, target, target_layer_ids=layers)
        self.ends, self.taps = TargetEnds.of(target), layers
        check_belongs(folder, self, vocab_size, weights)
        if "d2t" in weights:  # published heads may lack t2d, which follows from it
            ids = from_tables(weights["d2t"], weights.get("t2d"), vocab_size)
            weights |= dict(zip(("d2t", "t2d"), to_tables(ids, vocab_size), strict=True))
        self.adopt(weights, str(folder))

    def adopt(self, weights: Weights, where: str) -> None:
        """See `FeatureDrafter.adopt`."""
        d2t = weights.get("d2t")
        self._make(None if d2t is None else from_tables(d2t, weights.get("t2d"), self.vocab_size))
        self._load(weights, where)

    def _make(self, ids: Tensor | None) -> None:
        config = self.config
        hidden, eps = known(config.hidden_size), known(config.rms_norm_eps)
        self.taps = config.target_layer_ids or ()
        self.fc = nn.Linear(len(self.taps) * hidden, hidden, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, known(config.draft_vocab_size), bias=False)
        if ids is not None:
            d2t, t2d = to_tables(ids, self.vocab_size)
            self.register_buffer("d2t", d2t)
            self.register_buffer("t2d", t2d)
        self._settle()

    @torch.no_grad()
    def _copy_head(self) -> None:
        ends, ids = self._ends, self.draft_ids
        self.lm_head.weight.copy_(ends.head if ids is None else ends.head[ids])

    @property
    def draft_ids(self) -> Int[Tensor, " D"] | None:
        """Target ids of the draft vocabulary, ascending; None: the whole vocabulary."""
        if "d2t" not in self._buffers:
            return None
        d2t = self.get_buffer("d2t")
        return d2t + torch.arange(len(d2t), device=d2t.device)

    @property
    def head_weight(self) -> Float[Tensor, "D H"]:
        """Weight of the head over the draft vocabulary, for losses that never hold all logits."""
        return self.lm_head.weight

    def head(self, hidden: Float[Tensor, "*step H"]) -> Float[Tensor, "*step V"]:
        """Logits over the target's vocabulary, `ABSENT` outside the draft vocabulary."""
        logits = project_fp32(hidden, self.lm_head.weight)
        ids = self.draft_ids
        return logits if ids is None else spread(logits, ids, self.vocab_size)

    # ---- training

    def hidden(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"] | None = None,
        document_ids: Int[Tensor, "R T"] | None = None,
        features: Float[Tensor, "R T L H"] | None = None,
    ) -> Float[Tensor, "R T H"]:
        """Hidden states of the first draft step everywhere; see `Drafter.hidden`.

        At the first token of a document there is nothing to draft from; its state means nothing.
        """
        (first,), _ = self._rollouts(input_ids, position_ids, document_ids, features, 1)
        return first

    def paths(
        self,
        input_ids: Int[Tensor, "R T"],
        position_ids: Int[Tensor, "R T"],
        document_ids: Int[Tensor, "R T"],
        loss_mask: Bool[Tensor, "R T"],
        features: Float[Tensor, "R T L H"] | None = None,
        depth: int | None = None,
        every: bool = False,
    ) -> Paths:
        """Rollouts of `unroll` (or `depth`) steps from every counted step; see `Drafter.paths`."""
        depth = depth or (1 if self._short and not every else self.unroll)
        hidden, linked = self._rollouts(input_ids, position_ids, document_ids, features, depth)
        mask = (reach(loss_mask, document_ids, depth) & linked[..., None]).flatten(0, 1)
        starts = mask[:, 0].nonzero().squeeze(-1)
        chosen = torch.stack([step.flatten(0, 1)[starts] for step in hidden], 1)
        return Paths(chosen, steps_from(starts, mask[starts]), mask[starts])

    def _rollouts(
        self,
        ids: Tensor,
        positions: Tensor | None,
        documents: Tensor | None,
        features: Tensor | None,
        depth: int,
    ) -> tuple[list[Float[Tensor, "R T H"]], Bool[Tensor, "R T"]]:
        """Normed states of each unroll step, and which rows have features before them."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if documents is None:
            documents = torch.zeros_like(ids)
        fused = self.fc(self._features(features).flatten(-2))
        linked = functional.pad((documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0), (1, 0))
        state = functional.pad(fused[:, :-1], (0, 0, 1, 0)) * linked[..., None]
        num = ids.shape[1]
        visible = (documents[:, :, None] == documents[:, None, :]) & linked[:, None, :]
        visible = visible.tril() | torch.eye(num, dtype=torch.bool, device=ids.device)
        seen: list[Tensor] = []  # keys and values of every step so far
        outputs = []
        for step in range(depth):
            tokens = functional.pad(ids[:, step:], (0, min(step, num)))
            run = (state, tokens, positions - 1 + step, visible, *seen)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                state, *new = checkpoint(self._step, *run, use_reentrant=False)
            else:
                state, *new = self._step(*run)
            seen += new
            outputs.append(self.norm(state))
        return outputs, linked

    def _step(
        self, state: Tensor, tokens: Tensor, positions: Tensor, visible: Tensor, *seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One unroll step: its output, keys and values. Each row sees the first step's rows up to its own,
        and of later steps its own row alone."""
        layer = self.midlayer
        read = layer.read(self.embed(tokens), state)
        queries = layer.self_attn.queries(read, positions)
        keys, values = layer.self_attn.keys_values(read, positions)
        context = (seen[0], seen[1]) if seen else (keys, values)
        own = None
        if seen:
            own = torch.stack([*seen[2::2], keys], 3), torch.stack([*seen[3::2], values], 3)
        mixed = grouped_attention(queries[:, :, :, None], context, own, visible).squeeze(3)
        return layer.finish(state, mixed), keys, values

    # ---- decoding

    def start(
        self, ids: Int[Tensor, " N"] | Sequence[int], features: Float[Tensor, "N L H"] | None = None
    ) -> EagleState:
        """See `Drafter.start`; features at every token of `ids`."""
        tokens = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if features is None and not tokens:
            features = torch.empty(0, len(self.taps), self._ends.embeddings.shape[1], device=self._device)
        state = EagleState(len(tokens))
        state.carry = self._fuse(features, len(tokens))
        state.waiting = tokens[1:]
        state.blind = not tokens
        return state

    @torch.no_grad()
    def draft(
        self,
        state: EagleState,
        tokens: Int[Tensor, " K"] | Sequence[int],
        parents: Sequence[int] | Int[Tensor, " K"],
    ) -> Float[Tensor, "K V"]:
        """See `Drafter.draft`. The chain of committed tokens at the front of a round is read with the
        target's features, every node after it with the drafter's own output at its parent."""
        batch = state.take(_ints(tokens), _ints(parents))
        skip = len(batch.tokens) - len(tokens)
        outputs: list[Tensor] = []
        for wave in batch.waves(state):
            outputs.append(self._read(state, *wave))
        return self.head(self.norm(torch.cat(outputs)[skip:]))

    def _read(self, state: EagleState, tokens: list[int], parents: list[int], feature: Tensor) -> Tensor:
        """Output [K, H] of nodes whose features are known."""
        device, layer, cache = feature.device, self.midlayer, state.cache
        old = cache.num_nodes
        cache.append(parents)
        positions = torch.tensor(cache.depths[old:], device=device)[None] + cache.length
        read = layer.read(self.embed(torch.tensor(tokens, device=device))[None], feature[None])
        queries = layer.self_attn.queries(read, positions)
        keys, values = cache.layers[0].update(*layer.self_attn.keys_values(read, positions))
        mask = cache.mask(len(tokens), queries.dtype, device)
        mixed = cached_attention(queries, keys, values, mask, causal=True)
        out = layer.finish(feature[None], mixed)[0]
        state.outputs = out if old == 0 else torch.cat([state.outputs, out])
        return out

    @torch.no_grad()
    def commit(
        self, state: EagleState, path: Sequence[int], features: Float[Tensor, "N L H"] | None = None
    ) -> None:
        """See `Drafter.commit`. Nodes read with true features stay; later ones are read again, with the
        features they now have, at the front of the next round.

        Raises:
            ValueError: a path without features.
        """
        if features is None and not len(path):
            state.forget()
            return
        state.commit(list(path), self._fuse(features))

    def _fuse(self, features: Tensor | None, num: int | None = None) -> Float[Tensor, "N H"]:
        with torch.no_grad():
            fused: Tensor = self.fc(self._features(features, num).flatten(-2))
        return fused


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
