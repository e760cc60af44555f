"""Collaborative arbitration: at a mismatch a policy chooses between the target's token and the drafter's.

Strict decoding ends a round at the first draft token that is not the target's greedy token. Here a policy
reads both distributions and may take the draft token instead; the target's logits after it are valid, because
the pass has read that token. A decision needs no model pass, and an override can only lengthen a round: a
text of given tokens never takes more target passes than under strict decoding.

The problem and its name (CoSpec) are from arXiv 2605.24793; its method section was not available, so policy,
features and look-ahead are this project's own. See docs/cospec.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.arbitration.mismatch_features import static_features, with_history
from certdraft.arbitration.policy import Policy
from certdraft.decoding import Propose, Tree, TreeBuilder, Verdict, greedy_ids, top_rows


@dataclass(frozen=True)
class Decision:
    """One mismatch and its decision.

    Attributes:
        position: new tokens of the text before it.
        draft: the drafter's token.
        target: the target's greedy token.
        log_odds: the policy's, of taking the draft token.
        overridden: whether the draft token was taken.
        features: the policy's input, in the order of `FEATURES`.
    """

    position: int
    draft: int
    target: int
    log_odds: float
    overridden: bool
    features: tuple[float, ...]


class Arbiter:
    """Acceptor that lets a policy take the drafter's token at a mismatch.

    Walks like `Strict` as long as the target's greedy token has a node. Where it has none, the most probable
    child is the draft token, and the policy decides: take it and go on below it, or commit the target's token
    and end the round. One arbiter serves one text at a time; `decode` starts a new text by itself.

    Args:
        policy: features [N, F] → log-odds [N] that the draft token is taken; `load_policy(folder)` gives one.
        threshold: probability above which the draft token is taken, in [0, 1]. 1 never takes one: the text is
            the target's greedy text. 0 always takes it.
        override_budget: most draft tokens taken at mismatches of one text; None is no limit.
        look_ahead: also arbitrate the bonus token. The drafter then reads the last token of its chain, one
            more pass per round. With threshold 0 and a chain, the text is the drafter's own greedy text.
            None: as the policy was trained (`ArbiterPolicy.texts`), false for other policies.

    Raises:
        ValueError: threshold outside [0, 1], or a negative budget.
    """

    lossless = False

    def __init__(
        self,
        policy: Policy,
        threshold: float = 0.5,
        override_budget: int | None = None,
        look_ahead: bool | None = None,
    ) -> None:
        self.log_odds_bound = log_odds(threshold)
        if override_budget is not None and override_budget < 0:
            raise ValueError(f"Arbiter.override_budget is {override_budget}; it counts tokens of one text")
        self.policy, self.threshold, self.override_budget = policy, threshold, override_budget
        trained_with = getattr(policy, "texts", None) or {}
        self.look_ahead = bool(trained_with.get("look_ahead")) if look_ahead is None else look_ahead
        self.start()

    def __repr__(self) -> str:
        name = type(self.policy).__name__
        return f"arbiter({name}, threshold={self.threshold}, look_ahead={self.look_ahead})"

    def start(self) -> None:
        """Start a new text; `decode` calls it through `listen`."""
        self.decisions: list[Decision] = []  # of the text, in order
        self._committed = 0
        self._observed: _Observed | None = None

    @property
    def overrides(self) -> int:
        """Number of draft tokens taken at mismatches of the text so far."""
        return sum(decision.overridden for decision in self.decisions)

    def listen(self, builder: TreeBuilder) -> TreeBuilder:
        """Return the builder wrapped to keep the drafter's logits of each round; start a new text."""
        self.start()
        self._observed = _Observed(builder, self.look_ahead)
        return self._observed

    @torch.no_grad()
    def walk(self, tree: Tree, logits: Float[Tensor, "S V"]) -> Verdict:
        """See `Acceptor.walk`."""
        if self._observed is None:
            raise ValueError(
                "an arbiter reads the drafter's logits too: give `decode` the builder arbiter.listen(builder)"
            )
        greedy = greedy_ids(logits)
        drafts, features = self._mismatches(tree, greedy, logits)
        slot, path = 0, [0]
        while True:
            child = tree.children[slot].get(greedy[slot])
            if child is None:
                token = drafts.get(slot)
                if token is None or not self._take(len(path) - 1, token, greedy[slot], features[slot]):
                    return self._end(path, greedy[slot])
                child = tree.children[slot].get(token)
                if child is None:  # look-ahead: the draft token is the bonus
                    return self._end(path, token)
            path.append(child)
            slot = child

    def _end(self, path: list[int], bonus: int) -> Verdict:
        self._committed += len(path)
        return Verdict(path, bonus)

    def _mismatches(
        self, tree: Tree, greedy: Sequence[int], logits: Float[Tensor, "S V"]
    ) -> tuple[dict[int, int], dict[int, Tensor]]:
        """Draft token and static features (on the CPU) of each slot where the policy may have to decide."""
        assert self._observed is not None
        drafts: dict[int, int] = {}
        rows: list[Tensor] = []
        for slot, token in enumerate(greedy):
            children = tree.children[slot]
            if token in children or not (children or self.look_ahead):
                continue
            row = self._observed.row(tree, slot)
            if row is None:
                continue  # no draft there, or a leaf that the drafter has not read
            if children:
                draft = max(children, key=lambda t: (tree.logmass[children[t]], -children[t]))
            else:
                draft = int(row.argmax())
            if draft != token:
                drafts[slot] = draft
                rows.append(row)
        if not drafts:
            return {}, {}
        slots = torch.tensor(list(drafts), device=logits.device)
        tokens = torch.tensor(list(drafts.values()), device=logits.device)
        targets = torch.tensor([greedy[slot] for slot in drafts], device=logits.device)
        drafter_logits = torch.stack(rows).to(logits.device)
        features = static_features(logits[slots], drafter_logits, tokens, targets).cpu()
        return drafts, dict(zip(drafts, features, strict=True))

    def _take(self, depth: int, draft: int, target: int, static: Float[Tensor, " S"]) -> bool:
        position, spent = self._committed + depth, self.overrides
        counts = (torch.tensor([count]) for count in (depth, spent, position))
        features = with_history(static[None], *counts)
        odds = float(self.policy(features)[0])
        within = self.override_budget is None or spent < self.override_budget
        taken = within and odds > self.log_odds_bound
        self.decisions.append(Decision(position, draft, target, odds, taken, tuple(features[0].tolist())))
        return taken


class _Observed:
    """A builder that keeps the drafter's logits; with `look_ahead` the drafter also reads a chain's leaf."""

    def __init__(self, builder: TreeBuilder, look_ahead: bool) -> None:
        self.builder, self.look_ahead = builder, look_ahead
        self.kind: Literal["conditional", "marginal"] = "conditional"
        self._rows: list[Tensor] = []  # of each node read, or of each depth
        self._tree: Tree | None = None  # the one they belong to
        # The loop looks these up by name, so they exist only where the builder has them.
        for name in ("prepare", "observe"):
            if hasattr(builder, name):
                setattr(self, name, getattr(builder, name))

    def __repr__(self) -> str:
        return repr(self.builder)

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`."""
        self._rows, self._tree, self.kind = [], None, propose.kind
        recorded = _RecordingPropose(propose, self._rows)
        tree = self.builder.build(recorded, root, max_depth=max_depth, context=context)
        limit = getattr(propose, "limit", None)
        readable = propose.kind == "conditional" and (limit is None or tree.num_nodes < limit)
        if self.look_ahead and readable and tree.is_chain and tree.drafter_ids[-1] < 0:
            parent = tree.drafter_ids[tree.parents[-1]] if tree.num_nodes else -1
            top_rows(recorded([tree.tokens[-1]], [parent]), 1)  # refuses logits that are not finite
            ids = (*tree.drafter_ids[:-1], len(self._rows) - 1)
            tree = Tree(tree.tokens, tree.parents, tree.logmass, ids)
        self._tree = tree
        return tree

    def row(self, tree: Tree, slot: int) -> Float[Tensor, " V"] | None:
        """Return the drafter's logits after a slot, None where there are none."""
        if tree is not self._tree:  # a round without a draft, which no builder made
            return None
        index = tree.drafter_ids[slot] if self.kind == "conditional" else tree.depths[slot]
        return self._rows[index] if 0 <= index < len(self._rows) else None


class _RecordingPropose:
    """A drafter's `Propose` that keeps the logits it returns."""

    def __init__(self, propose: Propose, rows: list[Tensor]) -> None:
        self.kind = propose.kind
        self._propose, self._rows = propose, rows

    def __call__(self, tokens: Sequence[int], parents: Sequence[int]) -> Float[Tensor, "K V"]:
        """See `Propose`."""
        logits = self._propose(tokens, parents)
        self._rows.extend(logits)
        return logits

    @property
    def confidence(self) -> Float[Tensor, " K"] | None:
        """See `Propose`."""
        return getattr(self._propose, "confidence", None)


def log_odds(probability: float) -> float:
    """log(t / (1 − t)), ±inf at the ends.

    Raises:
        ValueError: outside [0, 1].

    Examples:
        >>> log_odds(0.5), log_odds(1.0)
        (0.0, inf)
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"threshold is {probability}; it is a probability, in [0, 1]")
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)
