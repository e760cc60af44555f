"""The data token's cross-entropy, ramps between losses, and step weights made from a batch's documents."""

import math

import jsonargparse
import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import K, head_target, target_probs

from certdraft import losses as L
from certdraft.certificates import Head

VOCAB = 13


def labelled(p, next_ids):
    return L.TargetBatch(Head.from_probs(p, K), p.log(), torch.tensor(next_ids))


# ---- the data token


def test_token_ce_is_cross_entropy_on_the_data_token_and_zero_where_there_is_none():
    p, z = target_probs(6, VOCAB), torch.randn(6, VOCAB, dtype=torch.float64).requires_grad_()
    labels = [3, 0, 12, -1, 7, 7]
    value = L.TokenCE()(z, labelled(p, labels))
    expected = torch.nn.functional.cross_entropy(z, torch.tensor(labels), reduction="none", ignore_index=-1)
    torch.testing.assert_close(value, expected)
    (got,) = torch.autograd.grad(value.sum(), z)
    (want,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(got, want)
    assert (got[3] == 0).all()
    assert torch.autograd.gradcheck(lambda x: L.TokenCE()(x, labelled(p, labels)), (z,))


def test_on_greedy_text_the_data_token_is_the_greedy_token():
    p, z = target_probs(6, VOCAB), torch.randn(6, VOCAB, dtype=torch.float64)
    target = labelled(p, head_target(p).greedy.tolist())
    torch.testing.assert_close(L.TokenCE()(z, target), L.HardCE()(z, target))
    missed = torch.tensor(
        [
            [oracle.missed(a.tolist(), int(g), m) for m in (1, 2, 4)]
            for a, g in zip(z, target.greedy, strict=True)
        ]
    )
    floors = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64).log()
    assert missed.any()
    assert (L.TokenCE()(z, target)[:, None] >= floors - 1e-12)[missed].all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_token_ce_alone_and_mixed_in_chunks(reduction):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCAB, 5, generator=generator, dtype=torch.float64).requires_grad_()
    target = labelled(target_probs(9, VOCAB), [3, 0, 12, -1, 7, 7, 1, 2, 3])
    mixed = L.Mixture([L.TokenCE(), L.TotalVariation("head")], [0.1, 0.9])
    for loss in (L.TokenCE(), mixed, L.Mixture([L.TokenCE(), L.TotalVariation()], [0.1, 0.9])):
        expected = L.reduce(loss(hidden @ weight.t(), target), reduction=reduction)
        value = L.Chunked(loss, reduction, 4)(hidden, weight, target)
        torch.testing.assert_close(value, expected)
        incoming = torch.ones_like(value)
        got = torch.autograd.grad(value, (hidden, weight), incoming)
        want = torch.autograd.grad(expected, (hidden, weight), incoming)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert mixed.view(target) == "full"


def test_next_tokens_end_with_their_document():
    ids = torch.tensor([[5, 6, 7, 8, 9, 0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    assert L.next_tokens(ids, documents).tolist() == [[6, 7, -1, 9, -1, -1]]
    assert L.next_tokens(ids[:, :1], documents[:, :1]).tolist() == [[-1]]


def test_missing_or_misshapen_labels_are_named():
    p = target_probs(4, VOCAB)
    with pytest.raises(ValueError, match="TokenCE.*next_ids"):
        L.TokenCE()(torch.randn(4, VOCAB), head_target(p))
    with pytest.raises(ValueError, match="TokenCE.*next_ids"):
        L.Mixture([L.HardCE(), L.TokenCE()], [1.0, 1.0])(torch.randn(4, VOCAB), head_target(p))
    with pytest.raises(ValueError, match=r"next_ids has shape \[3\]"):
        labelled(p, [1, 2, 3])
    assert labelled(p, [1, 2, 3, 4])[1:3].next_ids.tolist() == [2, 3]
    assert labelled(p, [1, 2, 3, 4]).to("cpu").next_ids.tolist() == [1, 2, 3, 4]


def test_an_online_target_brings_its_labels():
    online = L.OnlineTarget(torch.randn(4, 3), torch.randn(VOCAB, 3), K, next_ids=torch.tensor([1, 2, 3, 4]))
    assert online[1:].next_ids.tolist() == [2, 3, 4]
    assert online.select(torch.tensor([True, False, False, True]))[:].next_ids.tolist() == [1, 4]


# ---- ramps


def test_a_ramp_moves_between_its_ends_and_skips_what_weighs_nothing():
    p, z = target_probs(8, VOCAB), torch.randn(8, VOCAB, dtype=torch.float64)
    target = head_target(p)
    ce, kl = L.HardCE(), L.ForwardKL()
    ramp = L.Ramp([ce, kl], [1.0, 0.0], [0.25, 2.0], begin=0.2, end=0.6)
    for progress, weights in (
        (0.0, (1, 0)),
        (0.2, (1, 0)),
        (0.4, (0.625, 1)),
        (0.6, (0.25, 2)),
        (1.0, (0.25, 2)),
    ):
        ramp.at(progress)
        assert ramp.weights == pytest.approx(weights)
        torch.testing.assert_close(ramp(z, target), weights[0] * ce(z, target) + weights[1] * kl(z, target))
    step = L.Ramp([ce, kl], [1, 0], [0, 1], 0.5, 0.5)
    step.at(0.49)
    assert [type(part) for _, part in step.terms()] == [L.HardCE]
    step.at(0.5)
    assert [type(part) for _, part in step.terms()] == [L.ForwardKL]
    full = L.TargetBatch(target.head, p.log())
    assert L.Mixture([ce, kl], [1.0, 0.0]).view(full) == "head"
    assert L.Mixture([ce, kl], [0.0, 0.0])(z, full).eq(0).all()


def test_progress_reaches_a_ramp_inside_a_mixture():
    ramp = L.Ramp([L.HardCE(), L.ForwardKL()], [1, 0], [0, 1])
    L.Mixture([ramp, L.TotalVariation()], [1.0, 1.0]).at(0.25)
    assert ramp.weights == [0.75, 0.25]
    L.HardCE().at(0.5)  # nothing to move


def test_ramps_are_configured_and_refuse_nonsense():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=L.Loss)
    parser.add_argument("--weights", type=L.StepWeights)
    found = parser.instantiate(
        parser.parse_object(
            {
                "loss": {
                    "class_path": "certdraft.losses.Ramp",
                    "init_args": {
                        "losses": [
                            {"class_path": "certdraft.losses.HardCE"},
                            {"class_path": "certdraft.losses.LK"},
                        ],
                        "start": [1.0, 0.0],
                        "stop": [0.0, 1.0],
                    },
                },
                "weights": {"class_path": "certdraft.losses.BudgetWeights", "init_args": {"node_budget": 16}},
            }
        )
    )
    assert "1→0 HardCE()" in repr(found.loss)
    assert "node_budget=16" in repr(found.weights)
    for arguments, words in (
        (([1, 0], [0, 1], 0.5, 0.4), "begin=0.5, end=0.4"),
        (([1, 0], [0, 0]), "must be positive"),
        (([1], [0, 1]), "2 losses and 1 weights"),
        (([1, 0], [0, -1]), "nonnegative"),
    ):
        with pytest.raises(ValueError, match=words):
            L.Ramp([L.HardCE(), L.LK()], *arguments)


# ---- step weights


DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
COUNTED = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]]).bool()


def paths_by_hand(depth):
    """Flat step indices of the path from every counted step."""
    order = {at: n for n, at in enumerate(map(tuple, COUNTED.nonzero().tolist()))}
    paths = []
    for r, t in order:
        path = []
        for d in range(depth):
            at = (r, t + d)
            if at not in order or DOCUMENTS[at] != DOCUMENTS[r, t]:
                break
            path.append(order[at])
        paths.append(path)
    return paths


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_budget_weights_are_the_gradient_of_the_budget_loss_over_all_paths(depth):
    nll = (torch.rand(int(COUNTED.sum()), dtype=torch.float64) * 2).requires_grad_()
    total = sum((2 * torch.sigmoid((nll[path].cumsum(0) - 1.5) / 0.7)).sum() for path in paths_by_hand(depth))
    (expected,) = torch.autograd.grad(total, nll)
    weights = L.BudgetWeights(32, depth, budget_nats=1.5, temperature=0.7, base=0.0)
    target = head_target(target_probs(len(nll), VOCAB))
    found = weights(target, COUNTED, DOCUMENTS, nll)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    more = L.BudgetWeights(32, depth, budget_nats=1.5, temperature=0.7, base=0.3)
    torch.testing.assert_close(more(target, COUNTED, DOCUMENTS, nll), expected + 0.3)


def test_prefix_weights_sum_over_all_paths_through_a_step():
    nll = torch.rand(int(COUNTED.sum()), dtype=torch.float64) * 2
    expected = torch.zeros_like(nll)
    for path in paths_by_hand(3):
        for step, weight in zip(path, oracle.prefix_weights((-nll[path]).exp().tolist(), 0.5), strict=True):
            expected[step] += weight
    found = L.PrefixWeights(3, 0.5)(head_target(target_probs(len(nll), VOCAB)), COUNTED, DOCUMENTS, nll)
    torch.testing.assert_close(found, expected)


def test_the_budget_is_estimated_from_paths_as_the_tree_would_have_it():
    """A drafter with fixed next-token odds: its own samples against its real best-first trees."""
    odds, depth, budget = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64), 4, 24
    tree = oracle.best_first_tree(lambda prefix: odds.tolist(), budget, depth)
    chances = [math.prod(odds[j] for j in path) for path in tree]
    smallest = -math.log(min(chances))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(odds, 40_000 * depth, replacement=True, generator=generator).view(-1, depth)
    found = float(L.estimated_budget_nats(-odds[drawn].log(), None, budget))
    # the tree's threshold lies between its last node and the first it leaves out; levels of equal chance tie
    inside = sum(1 for value in chances if -math.log(value) <= found + 1e-9)
    assert smallest - 0.5 <= found <= smallest + 1e-9
    assert 0.7 * budget <= inside <= budget
    none = torch.zeros(0, 3, dtype=torch.float64)
    assert float(L.estimated_budget_nats(none, None, 30)) == pytest.approx(math.log(10))


def test_a_larger_budget_moves_the_weight_to_less_likely_paths():
    nll = torch.rand(int(COUNTED.sum()), dtype=torch.float64) * 4
    target = head_target(target_probs(len(nll), VOCAB))
    estimate = [
        float(
            L.estimated_budget_nats(
                torch.rand(500, 6, generator=torch.Generator().manual_seed(1)) * 3, None, b
            )
        )
        for b in (2, 8, 32, 128)
    ]
    assert estimate == sorted(estimate)
    assert (L.BudgetWeights(8, 4)(target, COUNTED, DOCUMENTS, nll) > 0).all()


def test_low_margin_weights_ask_for_a_trace():
    target = head_target(target_probs(int(COUNTED.sum()), VOCAB))
    found = L.LowMarginWeights(0.1, 3.0)(target, COUNTED, DOCUMENTS)
    torch.testing.assert_close(found, L.low_margin_weight(target, 0.1, 3.0))
    online = L.OnlineTarget(torch.randn(2, 3), torch.randn(VOCAB, 3))
    with pytest.raises(ValueError, match="recorded trace"):
        L.LowMarginWeights()(online, COUNTED, DOCUMENTS)


def test_step_weights_refuse_nonsense():
    target = head_target(target_probs(int(COUNTED.sum()), VOCAB))
    for make, words in (
        (lambda: L.BudgetWeights(0), "node_budget=0"),
        (lambda: L.BudgetWeights(temperature=0.0), "temperature=0.0"),
        (lambda: L.BudgetWeights(base=math.nan), "base=nan"),
        (lambda: L.LowMarginWeights(threshold=5.0), "threshold=5.0"),
        (lambda: L.LowMarginWeights(boost=-2.0), "boost=-2.0"),
        (lambda: L.LowMarginWeights(boost=math.inf), "boost=inf"),
        (lambda: L.ReachWeights(focal=math.inf), "focal=inf"),
        (lambda: L.ReachWeights(acceptance="greedy", candidates=[8, 4]), r"candidates=\[8, 4\] is read with"),
        (lambda: L.ReachWeights(candidates=[8, 2.5]), "a whole number"),
        (lambda: L.RunnerUpForgivingCE(True), "a whole number"),
        (lambda: L.LK(eta=-3.0), "eta=-3.0"),
        (lambda: L.PrefixWeights(0), "depth=0"),
        (lambda: L.PrefixWeights(4, 1.0), "smoothing=1.0"),
        (lambda: L.BudgetWeights()(target, COUNTED, DOCUMENTS), "needs the nll"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
