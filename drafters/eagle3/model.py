"""EagleDrafter: one transformer layer that reads the target's hidden states (EAGLE-3, arXiv 2503.01840).

The row of token t reads the embedding of token t and the fused target features at token t − 1, and drafts
token t + 1. The first token of a text has no features before it, hence no row; row t sits at position t − 1,
as in every engine. Further down a round the drafter's own output, before its norm, stands in for the features
that are not known yet; training unrolls exactly that ("training-time test").

Letters: R rows, T tokens of a row, N committed tokens, K nodes of one call, S draft depth, L aux hidden-state
layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from certdraft.drafters.eagle3.config import EagleConfig, EagleLayer
from certdraft.drafters.eagle3.draft_vocab import DraftVocabCoverage, choose, coverage, spread, to_tables
from certdraft.drafters.eagle3.export import layout, read_eagle3
from certdraft.drafters.eagle3.lint import LAYOUTS
from certdraft.drafters.eagle3.state import EagleState
from certdraft.drafters.features.feature_drafter import FeatureDrafter, completed, initialise
from certdraft.drafters.features.layer_files import Weights
from certdraft.drafters.features.target_layers import check_layers, eagle_layers
from certdraft.drafters.features.transformer_layer import RMSNorm, cached_attention, known
from certdraft.drafters.features.visible_spans import VisibleSpans, document_starts
from certdraft.drafters.formats.export_metadata import Engines
from certdraft.drafters.protocol import TargetSource
from certdraft.drafters.registry import register_drafter
from certdraft.drafters.training_paths import PackedRows, Paths, TokenFeatures, TokenIds, steps_from
from certdraft.support import path_mask, project_top


@register_drafter("eagle")
class EagleDrafter(FeatureDrafter):
    """An EAGLE-3 head: drafts token by token from the target's hidden states.

    Args:
        config: sizes, target layers, draft vocabulary; for `pretrained` its own are used.
        pretrained: folder or hub id of a published EAGLE-3 head to start from.
        unroll: draft steps trained, each on the drafter's own output of the step before.
        init_from_target: start the output layer of a fresh head as the target's, cut to the draft vocabulary.
        max_lost_coverage: refuse a draft vocabulary that misses more of the target's greedy tokens.
        short_until: share of the training in which only the first draft step is trained, before the unroll;
            None: half for a fresh head, nothing for a published one.
        dtype: of the parameters.
        gradient_checkpointing: recompute each unroll step in the backward pass, for memory.

    Raises:
        ValueError: an unroll below 1; `short_until` outside [0, 1); `config` given with `pretrained`; a
            checkpoint this class cannot reproduce.
        FileNotFoundError: `pretrained` is not there.
    """

    kind: Literal["conditional", "marginal"] = "conditional"
    description: ClassVar[str] = "an EAGLE-3 head"
    export_formats: ClassVar[Mapping[str, Engines]] = {
        "eagle3": Engines(vllm="eagle3", sglang="EAGLE3", llama_cpp="draft-eagle3"),
        "speculators": Engines(vllm="eagle3", llama_cpp="draft-eagle3", by_path=True),
    }
    layouts = LAYOUTS
    read, layout = staticmethod(read_eagle3), layout
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
        self.lost: DraftVocabCoverage | None = None  # what the draft vocabulary misses of the trace
        self.max_lost_coverage = max_lost_coverage

    # ---- the network

    def build(
        self,
        vocab_size: int,
        target: PreTrainedModel | None = None,
        counts: Int[Tensor, " V"] | None = None,
        mass: Float[Tensor, " V"] | None = None,
    ) -> Self:
        """Make the network for a target; to be called once, before the optimiser is made.

        Args:
            vocab_size: entries of the target's vocabulary.
            target: the target.
            counts: how often the target's greedy token was each token: checks the draft vocabulary. Not
                needed for a full vocabulary.
            mass: summed probability of each token: chooses the draft vocabulary of a fresh head; `counts`
                when not given.

        Raises:
            ValueError: no target, or one that does not fit; a draft vocabulary without counts, or one that
                misses more than `max_lost_coverage` of them.
        """
        target = self._begin(vocab_size, target)
        if self.pretrained is None:
            self._build_fresh(target, counts if mass is None else mass)
        ids = self.draft_ids
        if ids is not None and counts is not None and not ids.is_meta:
            self.lost = coverage(counts, ids.cpu())
            if self.lost.lost > self.max_lost_coverage:
                raise ValueError(
                    f"the draft vocabulary of {len(ids)} tokens misses too many of the target's tokens: "
                    f"{self.lost}. Raise draft_vocab_size, or max_lost_coverage "
                    f"({self.max_lost_coverage:.0%})."
                )
        return self

    def _build_fresh(self, target: PreTrainedModel, weight: Tensor | None) -> None:
        ends, num, size = self.target_ends, self.num_target_layers, self.config.draft_vocab_size
        layers = self.config.target_layer_ids
        layers = self.default_layers(self.config) if layers is None else check_layers(layers, num)
        ids = None
        if size is not None and size != self.vocab_size:
            if weight is None:
                raise ValueError(
                    f"a draft vocabulary of {size} tokens is chosen by how probable each is for the target: "
                    "give a trace to count in, or leave draft_vocab_size out for the whole vocabulary."
                )
            ids = choose(weight, size)
        size = self.vocab_size if ids is None else size
        self.config = completed(self.config, target, target_layer_ids=layers, draft_vocab_size=size)
        tables = (
            {} if ids is None else dict(zip(("d2t", "t2d"), to_tables(ids, self.vocab_size), strict=True))
        )
        with torch.device(ends.embeddings.device):
            self.make(tables)
        self.settle()
        initialise(self)
        if self.init_from_target:
            with torch.no_grad():
                chosen = self.draft_ids
                self.lm_head.weight.copy_(ends.head if chosen is None else ends.head[chosen])

    def build_from_target(self, target: TargetSource) -> Self:
        """See `Drafter.build_from_target`; the probabilities of the trace choose the draft vocabulary."""
        if self.ends is None:
            partial = self.pretrained is not None or self.config.draft_vocab_size is not None
            counts, mass = (target.greedy_counts(), target.token_mass()) if partial else (None, None)
            self.build(target.vocab_size, target.load_ends(), counts, mass)
        return self

    def restore(self, target: TargetSource, state: Mapping[str, Tensor]) -> Self:
        """See `Drafter.restore`; the checkpoint's draft vocabulary, as counts, chooses itself again."""
        member = state.get("t2d")
        return self.build(target.vocab_size, target.load_ends(), None if member is None else member.long())

    @property
    def notice(self) -> str | None:
        """How much of the target's text the draft vocabulary covers."""
        if self.lost is None or self.draft_ids is None:
            return None
        return f"draft vocabulary of {len(self.draft_ids):,} tokens: {self.lost}"

    def engines(self, format: str) -> Engines:
        """See `Drafter.engines`: not every one computes the norms that a head may add."""
        config, found = self.config, super().engines(format)
        if config.norm_before_residual:
            found = replace(found, sglang=None)
        return replace(found, llama_cpp=None) if config.fc_norm or config.norm_output else found

    def default_layers(self, config: Any) -> tuple[int, ...]:
        return eagle_layers(self.num_target_layers)

    def make(self, weights: Weights | None = None) -> None:
        config = self.config
        hidden, eps = known(config.hidden_size), known(config.rms_norm_eps)
        num = len(config.target_layer_ids or ())
        if config.norm_before_fc:
            self.input_norm = RMSNorm(num * hidden, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(hidden, eps) for _ in range(num))
        self.fc = nn.Linear(num * hidden, hidden, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, known(config.draft_vocab_size), bias=False)
        for name in ("d2t", "t2d"):
            if weights and name in weights:
                self.register_buffer(name, weights[name])

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
        return self._spread(self._project(hidden, self.lm_head.weight, layer=self.lm_head))

    def _spread(self, logits: Float[Tensor, "*step D"]) -> Float[Tensor, "*step V"]:
        ids = self.draft_ids
        return logits if ids is None else spread(logits, ids, self.vocab_size)

    # ---- training

    def first_drafts(self, ids: Tensor, positions: Tensor, documents: Tensor, features: Tensor) -> Tensor:
        """See `FeatureDrafter.first_drafts`.

        The first token of a document has no features before it; its state is meaningless.
        """
        (first,), _ = self._rollouts(ids, positions, documents, features, 1)
        return first

    def passes(self, seq_len: int) -> tuple[float, float]:
        """See `Drafter.passes`: once for every draft step that is unrolled."""
        return self.short_until + (1 - self.short_until) * self.unroll, self.unroll

    def rounds(self, rows: PackedRows, depth: int | None, every: bool) -> Paths:
        """Rollouts of `unroll` (or `depth`) steps from positions in the loss mask; see `Drafter.paths`."""
        depth = depth or (1 if self._short and not every else self.unroll)
        hidden, linked = self._rollouts(*rows[:3], rows.features, depth)
        mask = (path_mask(rows.loss_mask, rows.document_ids, depth) & linked[..., None]).flatten(0, 1)
        starts = mask[:, 0].nonzero().squeeze(-1)
        chosen = torch.stack([step.flatten(0, 1)[starts] for step in hidden], 1)
        return Paths(chosen, steps_from(starts, mask[starts]), mask[starts])

    def _rollouts(
        self, ids: Tensor, positions: Tensor, documents: Tensor, features: Tensor | None, depth: int
    ) -> tuple[list[Float[Tensor, "R T H"]], Bool[Tensor, "R T"]]:
        """Normed states of each unroll step, and which rows have features before them."""
        fused = self._fused(self._features(features))
        linked = functional.pad((documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0), (1, 0))
        state = functional.pad(fused[:, :-1], (0, 0, 1, 0)) * linked[..., None]
        num = ids.shape[1]
        place = torch.arange(num, device=ids.device)
        # Rows that have features see those of their document before them, others only themselves.
        start = torch.where(linked, document_starts(documents) + 1, place)
        visible = VisibleSpans(start[..., None], (place + 1).expand_as(start))
        seen: list[Tensor] = []  # keys and values of every step so far
        outputs = []
        for step in range(depth):
            tokens = functional.pad(ids[:, step:], (0, min(step, num)))
            run: tuple[Any, ...] = (tokens, state, positions - 1 + step, visible, *seen)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                state, *new = checkpoint(self._step, *run, use_reentrant=False)
            else:
                state, *new = self._step(*run)
            seen += new
            outputs.append(self.norm(state))
            state = outputs[-1] if self.config.norm_output else state
        return outputs, linked

    def _step(self, tokens: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The layer on tokens, so that a recomputed step holds their ids and not their embeddings."""
        step: tuple[Tensor, Tensor, Tensor] = self.midlayer(self.embed(tokens), *more)
        return step

    # ---- decoding

    def start(self, ids: TokenIds, features: TokenFeatures | None = None) -> EagleState:
        """See `Drafter.start`; features at every token of `ids`."""
        tokens = [int(i) for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        if features is None and not tokens:
            features = torch.empty(
                0, len(self.taps), self.target_ends.embeddings.shape[1], device=self._device
            )
        state = EagleState(len(tokens))
        state.carry = self._fuse(features, len(tokens))
        state.waiting = tokens[1:]
        state.blind = not tokens
        return state

    @torch.no_grad()
    def draft(self, state: EagleState, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "K V"]:
        """See `Drafter.draft`."""
        return self._spread(self.draft_narrow(state, tokens, parents))

    @torch.no_grad()
    def draft_narrow(self, state: EagleState, tokens: TokenIds, parents: TokenIds) -> Float[Tensor, "K D"]:
        """See `Drafter.draft_narrow`.

        The chain of committed tokens at the front of a round is read with the target's features, every node
        after it with the drafter's own output at its parent.
        """
        batch = state.take(_ints(tokens), _ints(parents))
        skip = len(batch.tokens) - len(tokens)
        outputs: list[Tensor] = []
        for wave in batch.waves(state):
            outputs.append(self._read(state, *wave))
        return project_top(torch.cat(outputs)[skip:], self.lm_head.weight, product=self.lm_head)

    def _read(self, state: EagleState, tokens: list[int], parents: list[int], feature: Tensor) -> Tensor:
        """Normed output [K, H] of nodes whose features are known."""
        device, layer, cache = feature.device, self.midlayer, state.cache
        old = cache.num_nodes
        cache.append(parents)
        positions = torch.tensor(cache.depths[old:], device=device)[None] + cache.length
        read, residual = layer.read(self.embed(torch.tensor(tokens, device=device))[None], feature[None])
        queries = layer.self_attn.queries(read, positions)
        keys, values = cache.layers[0].update(*layer.self_attn.keys_values(read, positions))
        mask = cache.mask(len(tokens), queries.dtype, device)
        mixed = cached_attention(queries, keys, values, mask, causal=True)
        out = layer.finish(residual, mixed)[0]
        normed: Tensor = self.norm(out)
        feature = normed if self.config.norm_output else out
        state.outputs = feature if old == 0 else torch.cat([state.outputs, feature])
        return normed

    @torch.no_grad()
    def commit(self, state: EagleState, path: Sequence[int], features: TokenFeatures | None = None) -> None:
        """See `Drafter.commit`. Nodes read with true features stay; later ones are read again, with the
        features they now have, at the front of the next round.
        """
        if features is None and not len(path):
            state.forget()
            return
        state.commit(list(path), self._fuse(features))

    def _fuse(self, features: Tensor | None, num: int | None = None) -> Float[Tensor, "N H"]:
        with torch.no_grad():
            return self._fused(self._features(features, num))

    def _fused(self, features: Float[Tensor, "*step L H"]) -> Float[Tensor, "*step H"]:
        """One feature a token, from those of all target layers."""
        if self.config.fc_norm:
            features = torch.stack(
                [norm(features[..., layer, :]) for layer, norm in enumerate(self.fc_norm)], -2
            )
        wide = features.flatten(-2)
        fused: Tensor = self.fc(self.input_norm(wide) if self.config.norm_before_fc else wide)
        return fused


def _ints(values: Tensor | Sequence[int]) -> list[int]:
    return [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]
