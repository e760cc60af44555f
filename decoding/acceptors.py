"""Acceptors: from a verified tree to the path that is committed and the bonus token that follows it.

An acceptor reads the target's logits after every slot of the tree and walks down from the root. It may follow
a branch it accepted at every edge and never hops to another one: the logits below a node are valid only on
the path through it. The bonus token is the target's own choice after the last accepted slot.

`Strict` and `SampleMatch` are lossless: greedy text is the target's greedy text, sampled text has the
target's distribution, whatever the drafter proposes. `Relaxed` trades that for longer paths, by a certificate
rule. Letters: S = 1 + n tree slots, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from certdraft.certificates import Coverage, Rule, SingleTokenRule, StrictGreedy
from certdraft.decoding.trees.ranking import greedy_ids
from certdraft.decoding.trees.tree import Tree


class Verdict(NamedTuple):
    """What to commit: slots of the accepted path, the root first, and the token the target adds after it."""

    path: list[int]
    bonus: int


class Acceptor(Protocol):
    """Interface of the acceptors of `decode`; `lossless`: the text stays the target's own.

    An acceptor that does not read all logits may say so with `needed`: "greedy" if it reads only greedy
    tokens, "top" if a row's largest logits decide; see `CachedLM.extend`.
    """

    lossless: bool

    def walk(self, tree: Tree, logits: Float[Tensor, "S V"]) -> Verdict:
        """The accepted path and the bonus token, from the target's fp32 logits after each slot."""
        ...


class Strict:
    """Accepts a draft token when it is the target's greedy token (lowest id at exact ties)."""

    lossless = True
    needed = "greedy"

    def __repr__(self) -> str:
        return "strict"

    def walk(self, tree: Tree, logits: Float[Tensor, "S V"]) -> Verdict:
        """See `Acceptor.walk`."""
        greedy = greedy_ids(logits)
        slot, path = 0, [0]
        while (child := tree.children[slot].get(greedy[slot])) is not None:
            path.append(child)
            slot = child
        return Verdict(path, greedy[slot])


class Relaxed:
    """Accepts a draft token when a certificate rule does, and commits the longest accepted path.

    Paths of equal length are ranked by their likelihood under the target, then by slot. The bonus is the
    target's greedy token. The text is the target's greedy text only for `StrictGreedy`; for that rule use
    `Strict`, which compares logits instead of probabilities.

    Args:
        rule: a single-token rule of `certdraft.certificates`: Additive, Multiplicative, TopM, Typical.
        temperature: of the target's softmax before the rule sees it, > 0.
    """

    lossless = False
    needed = "top"  # an accepted token is among the target's most probable ones

    def __init__(self, rule: Rule, temperature: float = 1.0) -> None:
        if isinstance(rule, Coverage):
            raise ValueError(
                f"{rule} compares two distributions, it does not judge a token; use a single-token rule"
            )
        if not temperature > 0:
            raise ValueError(f"Relaxed.temperature is {temperature}; use Strict for greedy decoding")
        self.rule: SingleTokenRule = rule
        self.temperature = temperature

    def __repr__(self) -> str:
        return str(self.rule)

    def walk(self, tree: Tree, logits: Float[Tensor, "S V"]) -> Verdict:
        """See `Acceptor.walk`."""
        greedy = greedy_ids(logits)
        if tree.num_nodes == 0:
            return Verdict([0], greedy[0])
        p = torch.softmax(logits / self.temperature, dim=-1)
        above = p[:-1] if tree.is_chain else p[torch.tensor(tree.parents[1:], device=p.device)]  # [n, V]
        tokens = torch.tensor(tree.tokens[1:], device=p.device)
        accepted = [True, *self.rule.accepts(above, tokens).tolist()]
        logp = [0.0, *above.gather(-1, tokens[:, None])[:, 0].log().tolist()]
        best, score = 0, [(0, 0.0)]  # per slot: depth and log-likelihood of its path
        for slot in range(1, len(tree.tokens)):
            parent = tree.parents[slot]
            accepted[slot] = accepted[slot] and accepted[parent]
            score.append((score[parent][0] + 1, score[parent][1] + logp[slot]))
            if accepted[slot] and score[slot] > score[best]:
                best = slot
        return Verdict(tree.path_to(best), greedy[best])


class SampleMatch:
    """Lossless sampling: draws the target's next token at each slot and follows the child that carries it.

    Every emitted token is a fresh draw from the target's distribution given its own prefix, so the text has
    the target's distribution for any drafter, as long as the tree does not depend on the draws.

    Args:
        temperature: of the target, > 0.
        generator: source of the draws, on the target's device; None uses torch's global one.

    Source: SYSTEMS "sample-and-match", as in the released code of DFlash (arXiv 2602.06036) and DDTree.
    """

    lossless = True

    def __init__(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> None:
        if not temperature > 0:
            raise ValueError(
                f"SampleMatch.temperature is {temperature}; it must be above 0, and Strict is the limit 0"
            )
        self.temperature, self.generator = temperature, generator

    def __repr__(self) -> str:
        return f"sample_match(temperature={self.temperature})"

    def walk(self, tree: Tree, logits: Float[Tensor, "S V"]) -> Verdict:
        """See `Acceptor.walk`."""
        greedy_ids(logits)  # refuses logits that are not finite
        slot, path = 0, [0]
        while True:
            p = torch.softmax(logits[slot] / self.temperature, dim=-1)
            token = int(torch.multinomial(p, 1, generator=self.generator))
            child = tree.children[slot].get(token)
            if child is None:
                return Verdict(path, token)
            path.append(child)
            slot = child


def as_acceptor(acceptor: Acceptor | Rule) -> Acceptor:
    """A certificate rule as an acceptor; an acceptor as it is.

    Raises:
        ValueError: the rule does not judge single tokens.
    """
    if isinstance(acceptor, StrictGreedy):
        return Strict()
    return Relaxed(acceptor) if isinstance(acceptor, Rule) else acceptor
