"""A chain that ends where the drafter's own estimate says that the next token will be rejected."""

from __future__ import annotations

from certdraft.decoding.trees.builders import Chain, Propose
from certdraft.decoding.trees.ranking import top_rows
from certdraft.decoding.trees.tree import Tree


class CutChain(Chain):
    """The drafter's greedy continuation, cut before the first token whose confidence is below a threshold.

    The confidence is that of a trained head (`DSparkDrafter`), which estimates the acceptance rate
    Σ min(p, q) of the token's distribution; the cut is that of DeepSpec's evaluation. Rounds may go
    undrafted, and their text is the target's all the same.

    Args:
        depth: draft tokens per round at the most, >= 1.
        threshold: lowest confidence of a token that is verified, in [0, 1].

    Raises:
        ValueError: a depth below 1, a threshold outside [0, 1]; in decoding, a drafter without a confidence
            head.
    """

    def __init__(self, depth: int = 7, threshold: float = 0.5) -> None:
        super().__init__(depth)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"CutChain.threshold is {threshold}; it is a probability, in [0, 1]")
        self.threshold = threshold

    def __repr__(self) -> str:
        return f"cut_chain(depth={self.depth}, threshold={self.threshold})"

    def build(self, propose: Propose, root: int, *, max_depth: int, context: int = 0) -> Tree:
        """See `TreeBuilder.build`; one drafter pass per draft token, and one that finds where to cut."""
        depth = min(self.depth, max_depth)
        if depth == 0:
            return Tree.root_only(root)
        tokens, logmass = [root], [0.0]
        read = 0
        draft_ids = getattr(propose, "draft_ids", None)
        for node in range(depth):
            row = top_rows(propose(tokens[-1:], (node - 1,)), 1, draft_ids=draft_ids)[0]
            read += 1
            confidence = getattr(propose, "confidence", None)
            if confidence is None:
                raise ValueError(
                    "CutChain cuts by a trained confidence head, and this drafter has none; use Chain, or "
                    "CostAware, which cuts by the drafter's probabilities."
                )
            if float(confidence[-1]) < self.threshold:
                break
            tokens.append(row.ids[0])
            logmass.append(logmass[-1] + row.logp[0])
        ids = (*range(min(read, len(tokens))), *(-1 for _ in range(len(tokens) - read)))
        return Tree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), tuple(logmass), ids)
