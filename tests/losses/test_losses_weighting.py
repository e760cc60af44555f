"""Reduction, step weights and path weights; the budget loss against real best-first trees."""

import math

import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import head_target, target_probs

from certdraft import losses as L


def test_reductions_are_weighted_masked_and_scale_free():
    loss = torch.tensor([1.0, 2.0, 4.0, 8.0])
    mask, weight = torch.tensor([True, True, False, True]), torch.tensor([1.0, 2.0, 5.0, 1.0])
    assert float(L.reduce(loss, mask, weight)) == pytest.approx(13 / 4)
    assert float(L.reduce(loss, mask, 10 * weight)) == pytest.approx(13 / 4)
    assert float(L.reduce(loss, mask, weight, "sum")) == 13
    assert L.reduce(loss, mask, weight, "none").tolist() == [1.0, 4.0, 0.0, 8.0]
    assert float(L.reduce(loss, mask, weight, denominator=26.0)) == 0.5
    assert float(L.reduce(loss)) == float(loss.mean())


def test_uncounted_steps_cannot_poison_value_or_gradient():
    loss = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    value = L.reduce(loss, torch.tensor([True, False, False]))
    value.backward()
    assert float(value.detach()) == 1.0
    assert loss.grad.tolist() == [1.0, 0.0, 0.0]
    nothing = L.reduce(loss, torch.zeros(3, dtype=torch.bool))
    assert float(nothing.detach()) == 0.0


def test_weights_carry_no_gradient():
    loss, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    L.reduce(loss, weight=weight).backward()
    assert weight.grad is None


def test_reduce_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"mask has shape \[2\].*\[3\]"):
        L.reduce(torch.ones(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction='average'"):
        L.reduce(torch.ones(3), reduction="average")
    with pytest.raises(ValueError, match="gamma=0"):
        L.depth_decay(4, 0)


def test_step_weights():
    torch.testing.assert_close(L.depth_decay(3, 7.0), torch.tensor([1.0, math.exp(-1 / 7), math.exp(-2 / 7)]))
    p = target_probs(16, 13)
    target = head_target(p)
    top = p.topk(2).values
    low = top[:, 0] - top[:, 1] < 0.1
    assert low.any()
    assert not low.all()
    weight = L.low_margin_weight(target, 0.1, 3.0)
    torch.testing.assert_close(weight, torch.where(low, 3.0, 1.0).to(weight.dtype))


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_prefix_weights_are_the_gradient_of_expected_length(smoothing):
    accept = torch.rand(5, 6, dtype=torch.float64)
    weights = L.prefix_weights(accept, smoothing=smoothing)
    expected = torch.tensor([oracle.prefix_weights(row, smoothing) for row in accept.tolist()]).double()
    torch.testing.assert_close(weights, expected)
    log_s = ((1 - smoothing) * accept + smoothing).log().requires_grad_()
    length = log_s.exp().cumprod(-1).sum()
    torch.testing.assert_close(weights, torch.autograd.grad(length, log_s)[0])
    # a path that ends at depth 2 is a path of length 2
    mask = torch.arange(6).expand(5, 6) < 2
    short = L.prefix_weights(accept, mask, smoothing)
    torch.testing.assert_close(short[:, :2], L.prefix_weights(accept[:, :2], smoothing=smoothing))
    assert (short[:, 2:] == 0).all()


def test_windows_and_fold_are_adjoint():
    values, weights = torch.rand(2, 7), torch.rand(2, 7, 3)
    inside = L.windows(torch.ones(2, 7), 3)
    torch.testing.assert_close(
        (L.windows(values, 3) * weights).sum(), (values * L.fold(weights * inside)).sum()
    )
    assert L.windows(values, 3)[1, 5].tolist() == [*values[1, 5:].tolist(), 0.0]
    torch.testing.assert_close(L.fold(torch.ones(1, 2, 5)), torch.tensor([[1.0, 2.0]]))


def test_paths_end_with_the_document_and_at_the_first_uncounted_step():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    counted = torch.tensor([[True, False, True, True, True, False]])
    paths = L.path_mask(counted, documents, 3)[0].int().tolist()
    assert paths == [[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_a_document_does_not_resume_after_another():
    documents = torch.tensor([[0, 1, 0]])
    paths = L.path_mask(torch.ones(1, 3, dtype=torch.bool), documents, 3)[0, 0]
    assert paths.tolist() == [True, False, False]


@pytest.mark.parametrize("form", ["sigmoid", "softplus"])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_budget_loss_counts_at_least_the_lost_tokens(form, temperature):
    nll = torch.rand(200, 6, dtype=torch.float64) * 2
    budget = torch.rand(200, dtype=torch.float64) * 6
    mask = torch.arange(6).expand(200, 6) < torch.randint(1, 7, (200, 1))
    lost = ((nll.cumsum(-1) >= budget[:, None]) & mask).sum(-1)
    assert (L.budget_loss(nll, budget, mask, temperature, form) >= lost).all()
    at_threshold = L.budget_loss(torch.tensor([[1.0]]), 1.0, form=form)
    assert float(at_threshold) == pytest.approx(1.0)


@pytest.mark.parametrize("form", ["sigmoid", "softplus"])
def test_budget_weights_are_the_gradient_of_the_budget_loss(form):
    nll = (torch.rand(9, 5, dtype=torch.float64) * 2).requires_grad_()
    mask = torch.arange(5).expand(9, 5) < torch.randint(1, 6, (9, 1))
    (gradient,) = torch.autograd.grad(L.budget_loss(nll, 3.0, mask, 0.7, form).sum(), nll)
    weights = L.budget_weights(nll, 3.0, mask, 0.7, form)
    torch.testing.assert_close(weights, gradient)
    assert not weights.requires_grad
    torch.autograd.gradcheck(lambda x: L.budget_loss(x, 3.0, mask, 0.7, form), (nll,))


def test_a_certain_budget_path_is_in_every_best_first_tree():
    """Random drafters with a likely first token: paths within log(B/D) nats are always among the B nodes."""
    depth, vocab, checked = 3, 4, 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        table = {}

        def next_token(prefix, table=table, generator=generator):
            if prefix not in table:
                z = torch.randn(vocab, generator=generator, dtype=torch.float64)
                z[0] += 2.0
                table[prefix] = z.softmax(-1).tolist()
            return table[prefix]

        for budget in (6, 9, 16):
            tree = oracle.best_first_tree(next_token, budget, depth)
            nats, path = 0.0, ()
            for _ in range(depth):
                nats -= math.log(next_token(path)[0])
                path = (*path, 0)
                if nats < L.certain_budget_nats(budget, depth):
                    checked += 1
                    assert path in tree
    assert checked > 100


def test_budget_refuses_nonsense():
    with pytest.raises(ValueError, match="temperature=0"):
        L.budget_loss(torch.ones(1, 2), 1.0, temperature=0.0)
    with pytest.raises(ValueError, match="node_budget=0"):
        L.certain_budget_nats(0, 3)


def test_step_weights_multiply_on_steps_and_on_the_paths_of_a_drafter():
    target = head_target(target_probs(12, 40))
    loss_mask, document_ids = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.long)
    nll = torch.rand(12, dtype=torch.float64)
    low, prefix, depth = L.LowMarginWeights(0.3, 3.0), L.PrefixWeights(3), L.DepthWeights(2.0)
    assert len(low(target, loss_mask, document_ids).unique()) == 2
    product = L.ProductWeights([low, L.ProductWeights([prefix])])
    assert product.needs_nll
    assert not L.ProductWeights([low, depth]).needs_nll
    expected = low(target, loss_mask, document_ids) * prefix(target, loss_mask, document_ids, nll)
    torch.testing.assert_close(product(target, loss_mask, document_ids, nll), expected)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[0, 2] = mask[3, 1] = mask[3, 2] = False
    found = L.ProductWeights([low, depth]).on_drafts(target, mask, None)
    place = torch.arange(3).expand(5, 3)[mask]
    torch.testing.assert_close(
        found.double(), low_margin(target, 0.3, 3.0) * torch.exp(-place.double() / 2), rtol=1e-6, atol=0.0
    )
    along = torch.zeros(5, 3, dtype=torch.float64).masked_scatter(mask, nll)
    torch.testing.assert_close(
        product.on_drafts(target, mask, nll),
        low_margin(target, 0.3, 3.0) * L.prefix_weights((-along).exp(), mask, 0.5)[mask],
    )
    with pytest.raises(ValueError, match="factors is empty"):
        L.ProductWeights([])


def test_sums_of_step_weights_are_added_terms_of_a_loss():
    """L2R: cross-entropy, a first-error focal term and a chain term, with shares 1, 0.5 and 2."""
    z, target, mask = paths_problem()
    focal = L.ReachWeights(5, "greedy", beyond=0.0, focal=2.0)
    parts = [L.DepthWeights(float("inf")), focal, L.PrefixWeights(5, 0.0)]
    both = L.SumWeights(parts, [1.0, 0.5, 2.0])
    nll = L.HardCE()(z, target)
    found = both.on_drafts(target, mask, nll)
    expected = 1.0 + 0.5 * focal.on_drafts(target, mask, nll) + 2.0 * parts[2].on_drafts(target, mask, nll)
    torch.testing.assert_close(found, expected)
    assert both.needs_nll
    with pytest.raises(ValueError, match="SumWeights: shares"):
        L.SumWeights(parts, [1.0, -1.0, 2.0])
    with pytest.raises(ValueError, match="SumWeights: shares"):
        L.SumWeights(parts, [1.0])
    with pytest.raises(ValueError, match="one of them above 0"):
        L.SumWeights(parts, [0.0, 0.0, 0.0])


def test_factors_that_read_the_same_of_the_drafter_combine():
    reach, prefix = L.ReachWeights(4, "greedy"), L.PrefixWeights(4, 0.0)
    assert L.ProductWeights([reach, prefix, L.LowMarginWeights()]).acceptance == "greedy"
    for one, same in ((4, [4]), ((4, 2), [4, 2])):
        factors = [L.ReachWeights(4, candidates=one), L.ReachWeights(4, candidates=same, beyond=0.5)]
        assert L.SumWeights(factors, [1.0, 1.0]).candidates == one
    with pytest.raises(ValueError, match=r"different acceptances \(first of 4, first of 2\)"):
        L.ProductWeights([L.ReachWeights(4, candidates=4), L.ReachWeights(4, candidates=2)])


def test_every_draft_of_a_path_has_the_base_of_budget_weights():
    """A path far beyond the threshold has nothing else."""
    target, mask = head_target(target_probs(8, 12)), torch.tensor([[True] * 4, [True, True, True, False]])
    nll = torch.full((7,), 30.0, dtype=torch.float64)
    found = L.BudgetWeights(4, 4, budget_nats=1.0, base=0.25).on_drafts(target[:7], mask, nll)
    torch.testing.assert_close(found, torch.full((7,), 0.25, dtype=torch.float64))


def test_weights_of_d_pard_are_the_recurrence_of_d_pace_over_overlaps():
    """By hand for a = 0.8, 0.6, 0.7: s = 0.5 + 0.5 a, W_t = the sum over k >= t of s_1 ... s_k."""
    nll = -torch.tensor([0.8, 0.6, 0.7], dtype=torch.float64).log()
    weights = L.PrefixWeights(3, 0.5, "overlap")
    found = weights.on_drafts(head_target(target_probs(3, 12)), torch.ones(1, 3, dtype=torch.bool), nll)
    torch.testing.assert_close(found, torch.tensor([2.232, 1.332, 0.612], dtype=torch.float64))


def low_margin(target, threshold, boost):
    p = target.head.p
    return torch.where(p[:, 0] - p[:, 1] < threshold, boost, 1.0)


def paths_problem(depth=5, paths=40, vocab=12):
    """Logits of a drafter that is right now and then, and its target, along paths of one depth."""
    target = head_target(target_probs(paths * depth, vocab))
    z = 2 * torch.randn(paths * depth, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    z[torch.arange(len(z)), target.greedy] += 2.0
    return z, target, torch.ones(paths, depth, dtype=torch.bool)


@pytest.mark.parametrize("acceptance", ["greedy", "overlap", "first"])
@pytest.mark.parametrize(("beyond", "focal"), [(0.0, 0.0), (1.0, 2.0), (0.25, 0.5)])
def test_reach_weights_multiply_the_acceptances_before_a_draft(acceptance, beyond, focal):
    z, target, mask = paths_problem()
    weights = L.ReachWeights(5, acceptance, beyond, focal)
    found = weights.on_drafts(target, mask, weights.nll_loss(z, target)).view(mask.shape)
    first = z.argmax(-1) == target.greedy
    assert 0 < first.sum() < len(first)
    for path, row in enumerate(found.tolist()):
        steps = range(5 * path, 5 * path + 5)
        q = [oracle.softmax(z[i].tolist()) for i in steps]
        ids = [target.top_ids[i].tolist() for i in steps]
        p = [[*target.head.p[i].tolist(), float(target.head.tail_mass[i])] for i in steps]
        chance = {
            "greedy": [x[int(target.greedy[i])] for i, x in zip(steps, q, strict=True)],
            "overlap": [oracle.overlap(a, oracle.merge(b, k)) for a, b, k in zip(p, q, ids, strict=True)],
            "first": first[5 * path : 5 * path + 5].double().tolist(),
        }[acceptance]
        assert row == pytest.approx(oracle.reach(chance, beyond, focal), rel=1e-6, abs=1e-7)


def test_end_to_end_total_variation_is_a_product_of_overlaps():
    z, target, mask = paths_problem()
    z.requires_grad_()
    weights, loss = L.PrefixWeights(5, 0.0, "overlap"), L.LK("alpha")
    nll = loss(z, target)
    weighted = (weights.on_drafts(target, mask, nll.detach()) * nll).sum() / 5
    (found,) = torch.autograd.grad(weighted, z, retain_graph=True)
    accept = (-nll).exp().view(mask.shape)
    total = (1 - accept.cumprod(-1).mean(-1)).sum()
    assert total.item() == pytest.approx(sum(oracle.end_to_end_tv(row) for row in accept.tolist()))
    (expected,) = torch.autograd.grad(total, z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_factors_must_read_the_same_acceptance():
    with pytest.raises(ValueError, match=r"different acceptances \(first of 1, greedy\)"):
        L.ProductWeights([L.ReachWeights(), L.PrefixWeights(), L.DepthWeights()])
    assert L.ProductWeights([L.ReachWeights(), L.DepthWeights()]).acceptance == "first"
    with pytest.raises(ValueError, match="acceptance='best'"):
        L.ReachWeights(acceptance="best")
    with pytest.raises(ValueError, match="beyond=2"):
        L.ReachWeights(beyond=2.0)
