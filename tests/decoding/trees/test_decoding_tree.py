"""Trees and builders against enumeration: the best nodes, in the right order, with the fewest passes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.models.decoding_models import MarginalDrafter, TableDrafter, all_prefixes, random_distribution

from certdraft.decoding import BestFirst, Chain, NodeStream, RealClock, StaticTree, Tree
from certdraft.decoding.draft_session import DraftSession
from certdraft.decoding.trees.builders import Growth
from certdraft.decoding.trees.ranking import NonFiniteLogits, greedy_ids, rank_of, top_rows
from certdraft.decoding.trees.tree import Row


def build(builder, drafter, root: int = 0, max_depth: int = 99) -> Tree:
    tree = builder.build(DraftSession(drafter, [1], RealClock()), root, max_depth=max_depth)
    tree.check()
    return tree


def paths(tree: Tree) -> dict[tuple[int, ...], float]:
    """Token path -> mass, for the draft tokens of a tree."""
    found = {}
    for slot in range(1, tree.num_nodes + 1):
        found[tuple(tree.tokens[i] for i in tree.path_to(slot)[1:])] = math.exp(tree.logmass[slot])
    return found


def marginal_drafter(rows: list[list[float]]) -> MarginalDrafter:
    return MarginalDrafter(lambda prefix: rows, len(rows[0]))


@st.composite
def rows(draw, max_depth: int, vocab_size: int) -> list[list[float]]:
    """Marginals with ties and small integers drawn on purpose."""
    depth = draw(st.integers(1, max_depth))
    weights = st.lists(st.integers(1, 4), min_size=vocab_size, max_size=vocab_size)
    return [[w / sum(ws) for w in ws] for ws in draw(st.lists(weights, min_size=depth, max_size=depth))]


# D1


@settings(max_examples=15)
@given(rows(max_depth=3, vocab_size=3), st.integers(1, 4))
def test_best_first_beats_every_prefix_closed_tree(table: list[list[float]], budget: int) -> None:
    every = all_prefixes(lambda p: table[len(p) - 2], (1, 0), 3, len(table))
    best = 0.0
    names = list(every)
    for chosen in itertools.combinations(names, min(budget, len(names))):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            best = max(best, math.fsum(every[path] for path in chosen))
    tree = build(BestFirst(budget, max_depth=3), marginal_drafter(table))
    assert tree.num_nodes == min(budget, len(names))
    assert tree.expected_accepted == pytest.approx(best, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 50), st.sampled_from([0.3, 1.0, 4.0]))
def test_marginal_tree_is_the_top_of_all_prefixes(seed: int, budget: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = (sharpness * torch.randn(4, 5, generator=generator)).double().softmax(-1).tolist()
    every = all_prefixes(lambda p: table[len(p) - 2], (1, 0), 5, 4)
    tree = build(BestFirst(budget, max_depth=9), marginal_drafter(table))
    assert sorted(paths(tree).values(), reverse=True) == pytest.approx(
        sorted(every.values(), reverse=True)[:budget], rel=1e-5
    )


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.3, 1.0, 3.0]), st.integers(1, 4))
def test_conditional_tree_is_the_top_of_all_prefixes(
    seed: int, budget: int, sharpness: float, max_depth: int
) -> None:
    """The exactness claim of BestFirst, for every cap on the nodes per pass; and its bound on the passes."""
    table = random_distribution(4, seed, sharpness)
    every = all_prefixes(table, (1, 0), 4, max_depth)
    wanted = sorted(every.values(), reverse=True)[:budget]
    for frontier in (None, 1, 3):
        drafter = TableDrafter(table, 4)
        tree = build(BestFirst(budget, max_depth=max_depth, frontier=frontier), drafter)
        assert [math.exp(w) for w in tree.logmass[1:]] == pytest.approx(wanted, rel=1e-5)
        for path, mass in paths(tree).items():
            assert mass == pytest.approx(every[path], rel=1e-5)
        if frontier is None:
            assert len(drafter.passes) <= min(1 + max(tree.depths), max_depth)
            first = paths(tree)
        assert paths(tree).keys() == first.keys()


def test_conditional_tree_cannot_stop_a_pass_earlier() -> None:
    """The last pass of an exact search is no waste: a child may be as probable as its parent."""
    sharp = {(): [0.6, 0.4], (0,): [0.5, 0.5], (1,): [1.0, 0.0]}
    drafter = TableDrafter(lambda p: sharp.get(p[2:], [0.5, 0.5]), 2)
    tree = build(BestFirst(3, max_depth=2), drafter)
    assert paths(tree).keys() == {(0,), (1,), (1, 0)}


# order, ties, limits


@given(rows(max_depth=4, vocab_size=4), st.integers(2, 40))
def test_trees_of_smaller_budgets_are_prefixes(table: list[list[float]], budget: int) -> None:
    """D2, ties included: so the realised accepted length of a round cannot fall as the budget grows."""
    large = build(BestFirst(budget), marginal_drafter(table))
    small = build(BestFirst(budget // 2), marginal_drafter(table))
    size = len(small.tokens)
    assert (small.tokens, small.parents) == (large.tokens[:size], large.parents[:size])
    assert list(large.logmass) == sorted(large.logmass, reverse=True)


def test_conditional_trees_are_nested_too() -> None:
    table = random_distribution(5, 3, 1.0)
    trees = [build(BestFirst(b, max_depth=4), TableDrafter(table, 5)) for b in (1, 2, 5, 12, 40)]
    for small, large in itertools.pairwise(trees):
        size = len(small.tokens)
        assert (small.tokens, small.parents) == (large.tokens[:size], large.parents[:size])


def test_expected_accepted_is_the_mean_over_the_drafters_own_texts() -> None:
    """D2: sample texts from the product of marginals and walk the tree."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 5, generator=generator).softmax(-1)
    tree = build(BestFirst(20), marginal_drafter(table.tolist()))
    texts = torch.stack([torch.multinomial(row, 20_000, True, generator=generator) for row in table], 1)
    lengths = []
    for text in texts.tolist():
        slot = length = 0
        while length < 4 and (slot := tree.children[slot].get(text[length], -1)) >= 0:
            length += 1
        lengths.append(length)
    mean = sum(lengths) / len(lengths)
    error = torch.tensor(lengths, dtype=torch.float64).std().item() / len(lengths) ** 0.5
    assert abs(mean - tree.expected_accepted) < 4 * error


def test_ties_go_to_the_lower_rank_path_and_the_lower_id() -> None:
    tree = build(BestFirst(6), marginal_drafter([[0.25] * 4, [0.25] * 4]))
    assert tree.tokens[1:] == (0, 1, 2, 3, 0, 1)
    assert tree.parents[1:] == (0, 0, 0, 0, 1, 1)


@pytest.mark.parametrize(("budget", "size"), [(5, 5), (12, 12), (100, 3 + 9)])
def test_vocabulary_smaller_than_the_budget(budget: int, size: int) -> None:
    assert build(BestFirst(budget), marginal_drafter([[0.5, 0.3, 0.2]] * 2)).num_nodes == size


def test_impossible_tokens_are_not_drafted() -> None:
    assert build(BestFirst(50), marginal_drafter([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])).num_nodes == 3


def test_stream_is_lazy() -> None:
    """A budget of n asks for the rows of at most n + 1 prefixes."""
    asked = []

    def rows(ranks: tuple[int, ...]) -> Row:
        asked.append(ranks)
        return Row([-1.0, -2.0], [0, 1])

    assert len(list(itertools.islice(NodeStream(rows), 10))) == 10
    assert len(asked) == 11


# shapes


def test_chain_follows_the_drafters_greedy_text() -> None:
    table = random_distribution(6, 1, 2.0)
    tree, drafter, text = None, TableDrafter(table, 6), [1, 0]
    tree = build(Chain(4), drafter)
    for _ in range(4):
        p = table(tuple(text))
        text.append(p.index(max(p)))
    assert tree.tokens == tuple(text[1:])
    assert tree.is_chain
    assert drafter.passes == [1, 1, 1, 1]  # the last draft token is not read
    assert tree.drafter_ids == (0, 1, 2, 3, -1)
    assert math.exp(tree.logmass[1]) == pytest.approx(max(table((1, 0))), rel=1e-6)


def test_static_tree_has_the_best_children_everywhere() -> None:
    table = random_distribution(6, 2, 1.0)
    drafter = TableDrafter(table, 6)
    tree = build(StaticTree((3, 2, 1)), drafter)
    assert drafter.passes == [1, 3, 6]
    assert tree.num_nodes == 3 + 6 + 6
    for slot, children in enumerate(tree.children):
        depth = tree.depths[slot]
        p = table((1, 0, *(tree.tokens[i] for i in tree.path_to(slot)[1:])))
        best = sorted(range(6), key=lambda token: (-p[token], token))
        assert list(children) == best[: (3, 2, 1, 0)[depth]]
    marginal = build(StaticTree((3, 2, 1)), marginal_drafter([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]]))
    assert marginal.tokens[1:] == (0, 1, 2, 1, 2, 1, 2, 1, 2)


@pytest.mark.parametrize("builder", [Chain(4), StaticTree((2, 2)), BestFirst(9)])
@pytest.mark.parametrize("max_depth", [0, 1, 2])
def test_no_path_is_longer_than_what_is_left(builder, max_depth: int) -> None:
    drafter = TableDrafter(random_distribution(6, 1, 3.0), 6)
    tree = build(builder, drafter, max_depth=max_depth)
    assert max(tree.depths) == max_depth
    assert bool(drafter.passes) == bool(max_depth)


def test_visible_is_the_ancestor_mask() -> None:
    tree = Tree.from_parents([7, 1, 2, 1, 5, 6], [-1, 0, 0, 2, 3, 0])
    for slot in range(6):
        assert tree.visible()[slot].nonzero().flatten().tolist() == sorted(tree.path_to(slot))


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([1, 2], [-1, 1], "before children"),
        ([1, 2, 2], [-1, 0, 0], "same token|two children"),
        ([1], [0], "-1"),
    ],
)
def test_no_tree_no_object(tokens: list[int], parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree.from_parents(tokens, parents)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(0),
        lambda: StaticTree(()),
        lambda: StaticTree((2, 0)),
        lambda: BestFirst(0),
        lambda: BestFirst(4, temperature=0.0),
    ],
)
def test_impossible_shapes_are_refused(make) -> None:
    with pytest.raises(ValueError, match=r"\w+\.\w+ is"):
        make()


def test_widths_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="7 children .* 6 tokens"):
        build(StaticTree((7,)), TableDrafter(random_distribution(6, 1), 6))


def test_temperature_changes_masses_not_order() -> None:
    drafter = TableDrafter(random_distribution(6, 1, 2.0), 6)
    hot = Growth(DraftSession(drafter, [1], RealClock()), 0, 6, 1, 2.0).row(())
    cold = Growth(DraftSession(drafter, [1], RealClock()), 0, 6, 1, 1.0).row(())
    assert hot.ids == cold.ids
    p = torch.tensor(cold.logp).exp()
    torch.testing.assert_close(torch.tensor(hot.logp).exp(), p.sqrt() / p.sqrt().sum())


# ranking


@given(st.lists(st.integers(-2, 2), min_size=5, max_size=40), st.integers(1, 12))
def test_ranks_agree_whatever_the_ties(values: list[int], width: int) -> None:
    """The live loop (top_rows), replay (rank_of) and the target (greedy_ids) order tokens alike."""
    logits = torch.tensor([values], dtype=torch.float32)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    row = top_rows(logits, width)[0]
    assert row.ids == order[:width]
    tokens = torch.arange(len(values))
    ranks = rank_of(logits.expand(len(values), -1), tokens).tolist()
    assert [order[rank] for rank in ranks] == tokens.tolist()
    assert greedy_ids(logits) == order[:1]
    torch.testing.assert_close(torch.tensor(row.logp), logits.log_softmax(-1)[0, order[:width]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("width", [1, 3])
def test_logits_that_are_not_numbers_are_refused(bad: float, width: int) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(NonFiniteLogits, match="row 1 of 2"):
        top_rows(logits, width)
    with pytest.raises(NonFiniteLogits, match="1 of 2 rows"):
        rank_of(logits, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="row 1"):
        greedy_ids(logits)
    with pytest.raises(NonFiniteLogits):
        top_rows(torch.full((1, 5), -math.inf), width)


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_many_tied_rows_are_ranked_by_logit_then_id(width: int) -> None:
    logits = torch.randint(-3, 4, (50, 40)).float()
    logits[::7, 5:30] = -math.inf
    for row, found in zip(logits.tolist(), top_rows(logits, width), strict=True):
        assert found.ids == sorted(range(40), key=lambda i: (-row[i], i))[:width]


@pytest.mark.parametrize("spread", [True, False])
def test_a_draft_vocabulary_is_ranked_alone(spread: bool) -> None:
    """Order, ties and probabilities are those of the logits over V, where all other tokens have none."""
    ids = torch.tensor([1, 4, 5, 9, 11])
    own = torch.randint(-2, 3, (20, 5)).float()
    whole = torch.full((20, 12), -1e4)
    whole[:, ids] = own
    for width in (1, 3, 5):
        expected = top_rows(whole, width, 0.7)
        found = top_rows(whole if spread else own, width, 0.7, ids)
        for a, b in zip(found, expected, strict=True):
            assert a.ids == b.ids
            assert a.logp == pytest.approx(b.logp, abs=1e-6)
    assert len(top_rows(whole, 9, draft_ids=ids)[0].ids) == 5
