"""Many arbitrated texts at once, token by token, for training and counterfactuals.

A windowed round verifies a chain in one pass; here both models advance all texts by one token at a time, and
each text keeps its position in its round. Tokens and number of target passes equal those of `decode` with
`Chain(depth)` and an `Arbiter` (up to rounding: a pass of another width may flip exact ties), at a fraction
of the time, because hundreds of texts share a pass.

Only causal drafters can be simulated: the predictions of a drafter that reads target features or drafts in
parallel depend on the position in the window. `decode` still arbitrates them.

Letters: P prompts · R texts, the copies of a prompt side by side · N decisions · F features · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from certdraft.arbitration.arbiter import log_odds
from certdraft.arbitration.branches import Branches
from certdraft.arbitration.mismatch_features import FEATURES, static_features, with_history
from certdraft.arbitration.policy import Policy
from certdraft.support import pack_linears

ASK = -1  # in `forced`: let the policy decide


class Stepper(Protocol):
    """A model that advances many texts together."""

    def start(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "R V"]:
        """fp32 next-token logits behind each prompt, each prompt `copies` times."""
        ...

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """The same after one more token of each text."""
        ...

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """Keep only these texts, in this order."""
        ...


class Lockstep:
    """A causal LM as a `Stepper`: prompts padded on the left, one cache for all texts.

    Args:
        model: any transformers causal LM, in eval mode; used in its own dtype and on its own device. Its
            linear layers are packed where that is faster; see `pack_linears`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode; call .eval() before simulating")
        self.model = model
        pack_linears(model)

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], copies: int) -> Float[Tensor, "R V"]:
        """See `Stepper.start`."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.model.device)
        self._mask = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device
        )
        self._cache: Any = DynamicCache()
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        logits = self._forward(ids, positions)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            self._mask = self._mask.repeat_interleave(copies, 0)
        return logits.repeat_interleave(copies, 0)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """See `Stepper.step`."""
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(tokens[:, None].to(self.model.device), positions)

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """See `Stepper.keep`."""
        rows = rows.to(self.model.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].float()


@dataclass(frozen=True)
class Rollouts:
    """R texts and their decisions.

    Attributes:
        tokens: new tokens of each text, an end-of-sequence token included.
        passes: target passes that windowed decoding takes for each text.
        overrides: draft tokens taken at mismatches of each text.
        mismatches: decisions of each text.
        row: text of each decision; decisions of a text are in its order.
        index: number of each decision in its text, from 0.
        features: the policy's input.
        taken: the draft token was taken.
    """

    tokens: list[list[int]]
    passes: Int[Tensor, " R"]
    overrides: Int[Tensor, " R"]
    mismatches: Int[Tensor, " R"]
    row: Int[Tensor, " N"]
    index: Int[Tensor, " N"]
    features: Float[Tensor, "N F"]
    taken: Bool[Tensor, " N"]

    def actions(self) -> list[list[int]]:
        """Return the decisions of each text, 1 where the draft token was taken."""
        lists: list[list[int]] = [[] for _ in self.tokens]
        for row, taken in zip(self.row.tolist(), self.taken.tolist(), strict=True):
            lists[row].append(int(taken))
        return lists


@torch.no_grad()
def simulate(
    target: Stepper,
    drafter: Stepper,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    *,
    depth: int = 4,
    max_new_tokens: int = 32,
    eos: Collection[int] = (),
    copies: int = 1,
    threshold: float | None = 0.5,
    override_budget: int | None = None,
    look_ahead: bool = False,
    forced: Int[Tensor, "R K"] | None = None,
    branches: Branches | None = None,
) -> Rollouts:
    """Return arbitrated texts, as `decode(…, Chain(depth), Arbiter(policy, …))` would write them.

    Args:
        target: predicts the target's tokens.
        drafter: predicts the draft tokens.
        prompts: token ids, each at least one.
        policy: features → log-odds that the draft token is taken; asked for all texts at once.
        depth: draft tokens per round, ≥ 1.
        max_new_tokens: of each text, ≥ 1.
        eos: tokens that end a text.
        copies: texts per prompt; text r belongs to prompt r // copies.
        threshold: as in `Arbiter`; None draws each decision with the policy's probability, from torch's
            generator.
        override_budget: as in `Arbiter`.
        look_ahead: as in `Arbiter`.
        forced: decisions that are not the policy's: entry [r, k] is the k-th of text r, 1 to take the draft
            token, 0 not to, `ASK` and beyond K for the policy.
        branches: a table of the same two models, length and end tokens, which is read instead of them.

    Raises:
        ValueError: no prompt, an empty one, or a count below 1.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("simulate needs prompts, each of at least one token")
    if min(depth, max_new_tokens, copies) < 1:
        raise ValueError(f"{depth=}, {max_new_tokens=} and {copies=} count things and must be at least 1")
    bound = None if threshold is None else log_odds(threshold)
    num = len(prompts) * copies
    ground: _Running | _Written = (
        _Running(target, drafter, prompts, copies)
        if branches is None
        else _Written(branches, prompts, copies)
    )
    device = ground.greedy.device
    stops = torch.tensor(sorted(eos), dtype=torch.long, device=device)
    active = torch.arange(num, device=device)  # texts that the models still carry, finished ones among them
    alive = torch.ones(num, dtype=torch.bool, device=device)
    place, window = (torch.zeros(num, dtype=torch.long, device=device) for _ in range(2))
    passes, overrides, mismatches = (torch.zeros(num, dtype=torch.long, device=device) for _ in range(3))
    tokens = torch.full((num, max_new_tokens), -1, device=device)
    log: list[tuple[Tensor, ...]] = []
    for length in range(max_new_tokens):
        first = (place == 0) & alive
        passes += first
        window[first] = min(depth, max_new_tokens - length - 1)
        y, x = ground.greedy, ground.draft
        asked = (x != y) & alive[active]
        if not look_ahead:
            asked &= place[active] < window[active]
        chosen, ends = y.clone(), (x != y) | (place[active] >= window[active])
        if bool(asked.any()):
            where = asked.nonzero()[:, 0]
            rows = active[where]
            committed = torch.full_like(rows, length)
            features = with_history(ground.static(where), place[rows], overrides[rows], committed)
            odds = policy(features)
            if bound is None:
                taken = torch.rand(len(odds), device=device) < odds.sigmoid()
            else:
                taken = odds > bound
            if override_budget is not None:
                taken &= overrides[rows] < override_budget
            taken = _with_forced(taken, forced, rows, mismatches[rows])
            log.append((rows, mismatches[rows], features, taken))
            mismatches[rows] += 1
            overrides[rows] += taken
            chosen[where] = torch.where(taken, x[where], y[where])
            ends[where] = ~taken | (place[rows] >= window[rows])
        tokens[active, length] = torch.where(alive[active], chosen, -1)
        place[active] = torch.where(ends, 0, place[active] + 1)
        alive[active] &= ~torch.isin(chosen, stops)
        carried = alive[active]
        if length + 1 == max_new_tokens or not bool(carried.any()):
            break
        if int(carried.sum()) * 2 <= len(active):
            kept = carried.nonzero()[:, 0]
            ground.keep(kept)
            active, chosen = active[kept], chosen[kept]
        ground.step(chosen)
    return _rollouts(tokens, passes, overrides, mismatches, log)


class _Running:
    """Both models, run token by token."""

    def __init__(
        self, target: Stepper, drafter: Stepper, prompts: Sequence[Sequence[int]], copies: int
    ) -> None:
        self._models = target, drafter
        self._look([model.start(prompts, copies) for model in self._models])

    def static(self, where: Int[Tensor, " N"]) -> Float[Tensor, "N S"]:
        """Features of some texts."""
        return static_features(
            self._logits[0][where], self._logits[1][where], self.draft[where], self.greedy[where]
        )

    def step(self, tokens: Int[Tensor, " R"]) -> None:
        """One more token of each text."""
        self._look([model.step(tokens) for model in self._models])

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """Goes on with these texts only."""
        for model in self._models:
            model.keep(rows)

    def _look(self, logits: list[Tensor]) -> None:
        self._logits = logits[0], logits[1].to(logits[0].device)
        self.greedy, self.draft = (each.argmax(-1) for each in self._logits)


class _Written:
    """A walk over a table of branches."""

    def __init__(self, branches: Branches, prompts: Sequence[Sequence[int]], copies: int) -> None:
        self._branches = branches
        self._nodes: Tensor
        self._look(branches.roots(prompts).repeat_interleave(copies))

    def static(self, where: Int[Tensor, " N"]) -> Float[Tensor, "N S"]:
        """See `_Running`."""
        return self._branches.static[self._nodes[where]]

    def step(self, tokens: Int[Tensor, " R"]) -> None:
        """See `_Running`; texts that have ended stay where they are."""
        self._look(self._branches.following(self._nodes, tokens).clamp_min(0))

    def keep(self, rows: Int[Tensor, " R"]) -> None:
        """See `_Running`."""
        self._nodes = self._nodes[rows]

    def _look(self, nodes: Tensor) -> None:
        self._nodes = nodes
        self.greedy, self.draft = self._branches.greedy[nodes], self._branches.draft[nodes]


def _with_forced(
    taken: Bool[Tensor, " N"], forced: Int[Tensor, "R K"] | None, rows: Tensor, index: Tensor
) -> Bool[Tensor, " N"]:
    if forced is None or forced.shape[1] == 0:
        return taken
    forced = forced.to(rows.device)
    orders = forced[rows, index.clamp_max(forced.shape[1] - 1)]
    orders = torch.where(index < forced.shape[1], orders, ASK)
    return torch.where(orders == ASK, taken, orders == 1)


def _rollouts(
    tokens: Tensor, passes: Tensor, overrides: Tensor, mismatches: Tensor, log: list[tuple[Tensor, ...]]
) -> Rollouts:
    lists = [[token for token in row if token >= 0] for row in tokens.tolist()]
    if log:
        row, index, features, taken = (torch.cat(column) for column in zip(*log, strict=True))
    else:
        row = index = torch.zeros(0, dtype=torch.long, device=tokens.device)
        features = torch.zeros(0, len(FEATURES), device=tokens.device)
        taken = torch.zeros(0, dtype=torch.bool, device=tokens.device)
    order = (row * (int(mismatches.max()) + 1) + index).argsort()
    return Rollouts(
        lists, passes, overrides, mismatches, row[order], index[order], features[order], taken[order]
    )
