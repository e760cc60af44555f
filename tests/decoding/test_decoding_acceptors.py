"""Acceptors: lossless sampling (A2), certificate rules edge by edge, and what may never be accepted."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.models.decoding_models import TableDrafter, TableTarget, random_distribution
from scipy.stats import chisquare

from certdraft.certificates import Additive, Coverage, Multiplicative, StrictGreedy, TopM, Typical
from certdraft.decoding import (
    BestFirst,
    Chain,
    Relaxed,
    SampleMatch,
    StaticTree,
    Strict,
    Tree,
    Verdict,
    as_acceptor,
    decode,
)

RULES = [
    Additive(0.1),
    Additive(0.5),
    Multiplicative(0.3),
    TopM(3, t=0.3),
    TopM(3, alpha=0.2),
    Typical(0.1, 0.3),
]


@st.composite
def verified_trees(draw) -> tuple[Tree, torch.Tensor]:
    """A random tree over 5 tokens and random target logits with ties."""
    size = draw(st.integers(1, 12))
    tokens, parents, seen = [0], [-1], set()
    for _ in range(size):
        edge = (draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, 4)))
        if edge not in seen:
            seen.add(edge)
            parents.append(edge[0])
            tokens.append(edge[1])
    values = st.lists(st.integers(-2, 3), min_size=5, max_size=5)
    logits = draw(st.lists(values, min_size=len(tokens), max_size=len(tokens)))
    return Tree.from_parents(tokens, parents), torch.tensor(logits, dtype=torch.float32)


def check_path(tree: Tree, verdict: Verdict) -> None:
    """A path from the root, every slot the child of the one before: branches are never hopped."""
    assert verdict.path[0] == 0
    for parent, slot in itertools.pairwise(verdict.path):
        assert tree.parents[slot] == parent


@given(verified_trees())
def test_strict_follows_the_greedy_tokens(case) -> None:
    tree, logits = case
    verdict = Strict().walk(tree, logits)
    check_path(tree, verdict)
    greedy = [row.index(max(row)) for row in logits.tolist()]  # the lowest id at ties
    for parent, slot in itertools.pairwise(verdict.path):
        assert tree.tokens[slot] == greedy[parent]
    last = verdict.path[-1]
    assert verdict.bonus == greedy[last]
    assert verdict.bonus not in tree.children[last]


@given(verified_trees(), st.sampled_from(RULES))
def test_relaxed_accepts_exactly_what_the_rule_accepts(case, rule) -> None:
    """Against every root path, each edge put to the rule by itself."""
    tree, logits = case
    p = logits.softmax(-1)
    best = (0, 0.0)
    for slot in range(1, len(tree.tokens)):
        path = tree.path_to(slot)
        edges = list(itertools.pairwise(path))
        if all(bool(rule.accepts(p[a], torch.tensor(tree.tokens[b]))) for a, b in edges):
            best = max(best, (len(edges), sum(p[a, tree.tokens[b]].log().item() for a, b in edges)))
    verdict = Relaxed(rule).walk(tree, logits)
    check_path(tree, verdict)
    for a, b in itertools.pairwise(verdict.path):
        assert bool(rule.accepts(p[a], torch.tensor(tree.tokens[b])))
    score = sum(p[a, tree.tokens[b]].log().item() for a, b in itertools.pairwise(verdict.path))
    assert len(verdict.path) - 1 == best[0]
    assert score == pytest.approx(best[1], abs=1e-5)
    assert verdict.bonus == logits[verdict.path[-1]].argmax()


def test_relaxed_takes_the_longest_path_not_the_most_probable_edge() -> None:
    tree = Tree.from_parents([0, 1, 2, 3], [-1, 0, 0, 2])
    p = torch.tensor([[0.0, 0.5, 0.4, 0.1], [1.0, 0, 0, 0], [0.1, 0.2, 0.1, 0.6], [0.0, 0, 0, 1.0]])
    assert Relaxed(Additive(0.2)).walk(tree, p.log()) == Verdict([0, 2, 3], 3)
    assert Relaxed(Additive(0.05)).walk(tree, p.log()) == Verdict([0, 1], 0)
    assert Strict().walk(tree, p.log()) == Verdict([0, 1], 0)


def test_ties_in_length_go_to_the_likelier_path() -> None:
    tree = Tree.from_parents([0, 1, 2], [-1, 0, 0])
    p = torch.tensor([[0.1, 0.4, 0.5], [1.0, 0, 0], [0, 1.0, 0]])
    assert Relaxed(Additive(0.3)).walk(tree, p.log()) == Verdict([0, 2], 1)


def test_temperature_reaches_the_rule() -> None:
    tree = Tree.from_parents([0, 1], [-1, 0])
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert len(Relaxed(Multiplicative(0.2)).walk(tree, logits).path) == 1  # exp(-2) = 0.14
    assert len(Relaxed(Multiplicative(0.2), temperature=2.0).walk(tree, logits).path) == 2  # exp(-1) = 0.37


def test_rules_become_acceptors() -> None:
    assert isinstance(as_acceptor(StrictGreedy()), Strict)
    assert str(as_acceptor(Additive(0.1))) == "additive(t=0.1)"
    assert as_acceptor(strict := Strict()) is strict
    with pytest.raises(ValueError, match="single-token"):
        as_acceptor(Coverage(4))
    for make in (lambda: SampleMatch(0.0), lambda: Relaxed(Additive(0.1), 0.0)):
        with pytest.raises(ValueError, match="temperature"):
            make()


def test_the_more_a_rule_forgives_the_longer_the_paths() -> None:
    target = TableTarget(random_distribution(8, 5, 1.5), 8)
    drafter = TableDrafter(random_distribution(8, 6, 1.5), 8)
    lengths = [
        decode(target, drafter, [1], Chain(4), rule, max_new_tokens=120).acceptance_length
        for rule in (Strict(), Additive(0.1), Additive(0.3), Additive(0.99))
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == 120 / 24


# A2

P, Q = random_distribution(3, 5, 1.0), random_distribution(3, 9, 1.5)


class ResidualOmitted:
    """Wrong on purpose: Leviathan's test, but after a rejection the whole of p instead of the residual."""

    lossless = True

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def walk(self, tree: Tree, logits: torch.Tensor) -> Verdict:
        slot, path = 0, [0]
        while tree.children[slot]:
            token, child = next(iter(tree.children[slot].items()))
            p = logits[slot].softmax(-1)[token]
            if torch.rand((), generator=self.generator) > p:  # q is a point mass: accept with p
                break
            path.append(slot := child)
        return Verdict(path, int(torch.multinomial(logits[slot].softmax(-1), 1, generator=self.generator)))


def p_value(acceptor, builder, texts: int) -> float:
    """Chi-square of the first three sampled tokens against their exact joint distribution."""
    target, drafter = TableTarget(P, 3), TableDrafter(Q, 3)
    counts = dict.fromkeys(itertools.product(range(3), repeat=3), 0)
    for _ in range(texts):
        counts[tuple(decode(target, drafter, [0], builder, acceptor, max_new_tokens=3).tokens)] += 1
    exact = [P((0,))[a] * P((0, a))[b] * P((0, a, b))[c] for a, b, c in counts]
    return chisquare(list(counts.values()), [texts * e for e in exact]).pvalue


@pytest.mark.parametrize("builder", [Chain(2), StaticTree((2, 2)), BestFirst(5, max_depth=3)], ids=str)
def test_sample_match_keeps_the_targets_distribution(builder) -> None:
    assert p_value(SampleMatch(1.0, torch.Generator().manual_seed(1)), builder, 2000) > 1e-3


def test_the_distribution_test_can_fail() -> None:
    assert p_value(ResidualOmitted(torch.Generator().manual_seed(1)), Chain(2), 2000) < 1e-3


def test_sampling_follows_temperature_and_generator() -> None:
    target, drafter = TableTarget(P, 3), TableDrafter(Q, 3)

    def text(seed: int, temperature: float) -> list[int]:
        accept = SampleMatch(temperature, torch.Generator().manual_seed(seed))
        return decode(target, drafter, [0], Chain(2), accept, max_new_tokens=30).tokens

    assert text(1, 1.0) == text(1, 1.0) != text(2, 1.0)
    assert text(1, 1e-4) == decode(target, drafter, [0], max_new_tokens=30).tokens
