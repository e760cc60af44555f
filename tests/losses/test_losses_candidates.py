"""Losses and weights whose number of candidates depends on the draft depth."""

from dataclasses import replace

import numpy as np
import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import full_target, head_target, target_probs

from certdraft import losses as L

VOCAB, SIZES = 13, [4, 2, 1]
MAKE = {
    "runner-up": L.RunnerUpForgivingCE,
    "pool": lambda m: L.PoolDiscountedCE(m, floor=0.1),
    "margin": lambda m: L.CoverageMargin(m, slack=0.5),
    "mixture": lambda m: L.Mixture([L.RunnerUpForgivingCE(m), L.ForwardKL("head")], [0.5, 0.5]),
}


def case(num=60):
    p = target_probs(num, VOCAB)
    generator = torch.Generator().manual_seed(3)
    z = p.log() + torch.randn(p.shape, generator=generator, dtype=torch.float64)
    depths = torch.randint(1, 6, (num,), generator=generator)  # deeper than the list is long
    return p, z, depths, replace(head_target(p), depths=depths)


@pytest.mark.parametrize("name", MAKE)
def test_a_list_is_the_loss_of_each_depth(name):
    _, z, depths, target = case()
    found = MAKE[name](SIZES)(z, target)
    expected = torch.stack([MAKE[name](m)(z, target) for m in SIZES])
    torch.testing.assert_close(found, expected.gather(0, depths.clamp(max=3)[None] - 1)[0])
    assert not torch.equal(found, expected[0])


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("online", [False, True])
def test_chunks_keep_the_depths(name, online):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, 5, generator=generator, dtype=torch.float64)
    hidden, far = torch.randn(2, 21, 5, generator=generator, dtype=torch.float64)
    depths = torch.randint(1, 5, (21,), generator=generator)
    hidden.requires_grad_()
    whole = replace(L.TargetBatch.from_logits(far @ weight.T, 7), depths=depths)
    target = L.OnlineTarget(far, weight, 7, depths=depths) if online else whole
    loss = MAKE[name](SIZES)
    value = L.Chunked(loss, "mean", 8)(hidden, weight, target)
    expected = loss(hidden @ weight.T, whole).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # an online target's logits are fp32
    (got,), (want,) = (torch.autograd.grad(v, hidden) for v in (value, expected))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    masked = L.Chunked(loss, "none", 8)(hidden, weight, target, mask=depths > 2)
    torch.testing.assert_close(masked[depths > 2], loss(hidden @ weight.T, whole)[depths > 2])


def test_a_miss_costs_what_the_width_of_its_depth_says():
    """RunnerUpForgivingCE is at least log 2 on every miss of the m of that depth."""
    p, z, depths, target = case(400)
    greedy = p.argmax(-1)
    loss = L.RunnerUpForgivingCE(SIZES)(z, target)
    sizes = [SIZES[min(int(d), 3) - 1] for d in depths]
    rows = zip(z.tolist(), greedy.tolist(), sizes, strict=True)
    missed = torch.tensor([oracle.missed(row, g, m) for row, g, m in rows])
    assert 20 < int(missed.sum()) < 380
    assert (loss[missed] >= torch.log(torch.tensor(2.0, dtype=torch.float64)) - 1e-12).all()


@pytest.mark.parametrize("name", MAKE)
def test_positions_without_a_depth_are_refused(name):
    p, z, *_ = case()
    for target in (head_target(p), full_target(p)):
        with pytest.raises(ValueError, match=r"m=\[4, 2, 1\] is a list by draft depth.*EagleDrafter"):
            MAKE[name](SIZES)(z, target)
        assert MAKE[name]([4])(z, target).isfinite().all()  # one number needs no depth


def test_nonsense_is_refused():
    for m in (0, [], [4, 0]):
        with pytest.raises(ValueError, match="RunnerUpForgivingCE: m="):
            L.RunnerUpForgivingCE(m)
    with pytest.raises(ValueError, match=r"depths has shape \[3\], expected \[60\]"):
        replace(case()[3], depths=torch.ones(3, dtype=torch.long))


def test_reach_by_coverage_is_the_chance_that_the_tree_still_holds_the_path():
    """Written out: weight 1 up to and with the first depth whose greedy token is not among its candidates."""
    paths, depth = 30, 4
    p, z, *_ = case(paths * depth)
    depths = torch.arange(1, depth + 1).repeat(paths)
    target = replace(head_target(p), depths=depths)
    weights = L.ReachWeights(depth, candidates=SIZES)
    nll = weights.nll_loss(z, target)
    found = weights.on_drafts(target, torch.ones(paths, depth, dtype=torch.bool), nll).view(paths, depth)
    lost = 0
    for path in range(paths):
        alive = 1.0
        for d in range(depth):
            assert float(found[path, d]) == alive
            row = path * depth + d
            if oracle.missed(z[row].tolist(), int(target.greedy[row]), SIZES[min(d, 2)]):
                alive, lost = 0.0, lost + (alive == 1.0)
    assert 5 < lost < paths
    product = L.ProductWeights([L.DepthWeights(4.0), weights])
    assert product.candidates == SIZES
    with pytest.raises(ValueError, match="different acceptances"):
        L.ProductWeights([weights, L.ReachWeights(depth)])


def test_sizes_may_be_any_whole_numbers():
    """Rounded means of a measurement are numpy's."""
    expected = L.RunnerUpForgivingCE([8, 4]).m.sizes
    for m in (np.array([8, 4]), [np.int64(8), np.int64(4)], (8, 4), torch.Size([8, 4])):
        assert L.RunnerUpForgivingCE(m).m.sizes == expected
    for wrong in ([], [8, 0], [8, 2.5], "84", True, [[8]]):
        with pytest.raises(ValueError, match="a whole number of at least 1"):
            L.RunnerUpForgivingCE(wrong)
