"""KL from a sharpened target: its definition, its two ends, what a miss costs, and exponents that adapt."""

import math
from typing import Any

import oracles.mathematics.losses as oracle
import pytest
import torch
from oracles.mathematics.loss_cases import full_target, head_target, target_probs

from certdraft.certificates import Coverage, Head, radius
from certdraft.losses import AdaptiveSharpenedKL, Chunked, ForwardKL, HardCE, Mixture, SharpenedKL
from certdraft.losses.sharpened import Noise

VOCAB, K = 12, 7


def drafter_logits(p: torch.Tensor, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return p.log() + spread * torch.randn(p.shape, generator=generator, dtype=torch.float64)


def sharpened(p: torch.Tensor, a: float) -> torch.Tensor:
    return p**a / (p**a).sum(-1, keepdim=True)


def test_full_value_is_the_kl_from_the_sharpened_target() -> None:
    p = target_probs(40, VOCAB)
    z = drafter_logits(p)
    for a in (1.0, 2.0, 3.5):
        r = sharpened(p, a)
        expected = [oracle.kl(t.tolist(), oracle.softmax(s.tolist())) for t, s in zip(r, z, strict=True)]
        value = SharpenedKL(a)(z, full_target(p, K))
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_on_a_head_that_is_everything_head_and_full_agree() -> None:
    p = target_probs(40, VOCAB)
    z = drafter_logits(p)
    torch.testing.assert_close(
        SharpenedKL(2.0)(z, head_target(p, VOCAB)), SharpenedKL(2.0)(z, full_target(p, K))
    )


def test_the_bucket_holds_at_least_the_sharpened_tail() -> None:
    p = target_probs(60, VOCAB)
    for a in (1.0, 2.0, 4.0):
        teacher = SharpenedKL(a).teacher(head_target(p, K)).exp()
        torch.testing.assert_close(teacher.sum(-1), torch.ones(len(p), dtype=torch.float64))
        exact = sharpened(p, a).sort(-1, descending=True).values
        assert (teacher[:, -1] >= exact[:, K:].sum(-1) - 1e-7).all()
        ranked = p.sort(-1, descending=True).values
        allowed = ranked[:, K:].sum(-1) / ranked[:, 0] * (ranked[:, K - 1] / ranked[:, 0]) ** (a - 1)
        assert (teacher[:, -1] / teacher[:, 0] <= allowed + 1e-7).all()
        ratio = (teacher[:, :K] / exact[:, :K])[:, :1]  # the kept tokens keep their proportions
        torch.testing.assert_close(teacher[:, :K] / exact[:, :K], ratio.expand(-1, K), rtol=1e-6, atol=1e-9)


def test_the_ends_are_forward_kl_and_hard_cross_entropy() -> None:
    p = target_probs(40, VOCAB)
    z = drafter_logits(p)
    for target in (head_target(p, K), full_target(p, K)):
        torch.testing.assert_close(SharpenedKL(1.0)(z, target), ForwardKL()(z, target), rtol=1e-6, atol=1e-9)
        lead = target.head.gap[:, 1] > 0.05
        assert int(lead.sum()) > 10
        near = SharpenedKL(1e4)(z, target)[lead], HardCE()(z, target)[lead]
        torch.testing.assert_close(*near, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_a_miss_costs_at_least_the_radius_of_the_sharper_teacher(m: int) -> None:
    p = torch.cat([target_probs(200, VOCAB, seed) for seed in range(3)])
    z = drafter_logits(p, 1.5)
    greedy = p.argmax(-1)
    missed = torch.tensor([oracle.missed(s.tolist(), int(g), m) for s, g in zip(z, greedy, strict=True)])
    assert int(missed.sum()) > 50
    for a in (1.0, 2.0, 4.0):
        kappa = radius(Head.from_probs(sharpened(p, a), VOCAB), Coverage(m))
        assert (SharpenedKL(a)(z, full_target(p, K))[missed] >= kappa[missed] - 1e-9).all()
    wider = radius(Head.from_probs(sharpened(p, 2.0), VOCAB), Coverage(1))
    assert (wider >= radius(Head.from_probs(p, VOCAB), Coverage(1)) - 1e-12).float().mean() > 0.5


def test_gradient() -> None:
    p = target_probs(6, VOCAB)
    z = drafter_logits(p).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SharpenedKL(2.0)(x, head_target(p, K)), z)
    (gradient,) = torch.autograd.grad(SharpenedKL(2.0)(z, full_target(p, K)).sum(), z)
    torch.testing.assert_close(gradient, z.softmax(-1).detach() - sharpened(p, 2.0))


def test_refuses_exponents_below_one_and_infinity() -> None:
    for a in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="SharpenedKL: a="):
            SharpenedKL(a)


def test_the_exponent_is_that_of_the_noise_measured_over_the_head() -> None:
    p = target_probs(50, VOCAB)
    z, target = drafter_logits(p, spread=0.8), head_target(p, K)
    loss = AdaptiveSharpenedKL(decay=0.5)
    before = loss(z, target)
    torch.testing.assert_close(before, ForwardKL()(z, target), rtol=1e-6, atol=1e-9)
    loss.settle()
    loss.at(0.1)
    total = weight = 0.0
    for row, logits in zip(p.tolist(), z.tolist(), strict=True):
        order = sorted(range(VOCAB), key=lambda v: -row[v])[:K]
        for v in order[1:]:
            gap = math.log(row[order[0]] / row[v])
            total += row[v] * (logits[order[0]] - logits[v] - gap) ** 2
            weight += row[v]
    expected = math.pi / math.sqrt(3 * total / weight)
    assert 1.0 < expected < 8.0
    assert loss.a == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(loss(z, target), SharpenedKL(expected)(z, target), rtol=1e-4, atol=1e-6)


def test_better_drafters_get_harder_labels_within_the_limits() -> None:
    p = target_probs(50, VOCAB)
    found = []
    for spread in (0.0, 0.3, 0.6, 20.0):
        loss = AdaptiveSharpenedKL(most=5.0)
        loss(drafter_logits(p, spread), full_target(p, K))
        loss.settle()
        loss.at(0.5)
        found.append(loss.a)
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (5.0, 1.0)


def test_the_running_error_is_in_checkpoints_and_the_same_in_chunks() -> None:
    p = target_probs(50, VOCAB).float()
    target = head_target(p, K)
    hidden, weight = drafter_logits(p).float(), torch.eye(VOCAB)
    losses = [AdaptiveSharpenedKL(), AdaptiveSharpenedKL()]
    for loss, size in zip(losses, (7, 50), strict=True):
        for progress in (0.1, 0.2):
            Chunked(loss, chunk_tokens=size)(hidden.clone().requires_grad_(), weight, target)
            loss.settle()
            loss.at(progress)
    assert 1.0 < losses[0].a == pytest.approx(float(losses[1].a), rel=1e-5)
    resumed = AdaptiveSharpenedKL()
    resumed.load_state_dict(losses[0].state_dict())
    for loss in (resumed, losses[0]):
        loss.at(0.3)
    assert resumed.a == losses[0].a


def test_micro_batches_count_once_and_nothing_is_measured_in_evaluation() -> None:
    p = target_probs(50, VOCAB)
    z, target = drafter_logits(p, 0.7), head_target(p, K)
    whole, parts = AdaptiveSharpenedKL(), Mixture([Mixture([AdaptiveSharpenedKL()], [1.0])], [1.0])
    whole(z, target)
    for rows in (slice(0, 20), slice(20, 50)):
        parts(z[rows], target[rows])
        parts.at(0.0)  # before every micro-batch
    for loss in (whole, parts):
        loss.settle()
        loss.at(0.1)
    inner = parts.parts[0].parts[0]
    assert inner.a == pytest.approx(float(whole.a), rel=1e-5)
    torch.testing.assert_close(inner.error, whole.error)
    whole.eval()
    known = float(whole.a)
    whole(9 * z, target)
    whole.settle()
    whole.at(0.2)
    assert whole.a == pytest.approx(known, rel=1e-6)


def test_tokens_that_cannot_be_proposed_do_not_count_as_errors() -> None:
    p = target_probs(30, VOCAB)
    z, target = drafter_logits(p, 0.5), head_target(p, K)
    whole, narrow = AdaptiveSharpenedKL(), AdaptiveSharpenedKL()
    absent = z.scatter(1, target.top_ids[:, 3:4], -1e4)
    whole(z, target)
    narrow(absent, target)
    for loss in (whole, narrow):
        loss.settle()
        loss.at(0.5)
    assert narrow.a == pytest.approx(float(whole.a), rel=0.5)


@pytest.mark.parametrize("bad", [{"most": 1.0}, {"most": math.inf}, {"decay": 1.0}, {"decay": -0.1}])
def test_adaptive_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"AdaptiveSharpenedKL: {next(iter(bad))}="):
        AdaptiveSharpenedKL(**bad)


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
@pytest.mark.parametrize("a", [1.0, 2.5])
def test_labels_are_how_often_each_token_wins_under_the_noise(noise: Noise, a: float) -> None:
    p = target_probs(4, K)  # the head is the whole vocabulary
    loss = AdaptiveSharpenedKL(noise=noise)
    loss.a = a
    target = head_target(p, K)
    spread = math.pi / math.sqrt(3) / a  # of a difference of two noises
    draws = 200_000
    generator = torch.Generator().manual_seed(0)
    if noise == "gumbel":
        uniform = torch.rand(draws, K, generator=generator, dtype=torch.float64)
        noisy = -(-uniform.log()).log() * spread * math.sqrt(3) / math.pi
    else:
        noisy = torch.randn(draws, K, generator=generator, dtype=torch.float64) * spread / math.sqrt(2)
    for logp, label in zip(target.top_logp, loss.teacher(target), strict=True):
        won = torch.bincount((logp + noisy).argmax(-1), minlength=K) / draws
        torch.testing.assert_close(label.exp().double(), won.double(), atol=5e-3, rtol=0)


def test_gaussian_labels_leave_the_tail_its_mass_and_keep_the_order() -> None:
    target = head_target(target_probs(20, VOCAB), K)
    loss = AdaptiveSharpenedKL(noise="gaussian")
    loss.a = 1.7
    label = loss.teacher(target)
    torch.testing.assert_close(label.logsumexp(-1), torch.zeros_like(label[:, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(label[:, -1], target.coarse_logp[:, -1].to(label.dtype))
    assert (label[:, :-1].diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("noise", ["gumbel", "gaussian"])
def test_labels_harden_to_the_limit_for_a_drafter_that_fits_them(noise: Noise) -> None:
    """A drafter that has learned its labels exactly has no error, however sharp they are."""
    target = full_target(target_probs(50, VOCAB), VOCAB)
    loss = AdaptiveSharpenedKL(most=6.0, decay=0.5, noise=noise)
    for step in range(60):
        z = torch.zeros(50, VOCAB, dtype=torch.float64)
        gap = loss.a * target.head.gap.double()
        z.scatter_(1, target.top_ids, -gap)
        loss(z, target)
        loss.settle()
        loss.at(step / 60)
    assert float(loss.a) == 6.0


def test_the_exponent_can_be_ramped() -> None:
    loss = SharpenedKL(1.0, stop=3.0)
    assert loss.a == 1.0
    loss.at(0.5)
    assert loss.a == 2.0
    with pytest.raises(ValueError, match="SharpenedKL: stop=0.5"):
        SharpenedKL(stop=0.5)


def test_a_miss_on_a_head_may_cost_less_than_the_radius_of_the_full_target() -> None:
    """A token of the tail overtakes the greedy one at no loss: the coarsening's radius is the bound."""
    p = torch.tensor([[0.3, 0.17, 0.17, 0.16, 0.1, 0.1]], dtype=torch.float64)
    target, loss = head_target(p, 3), SharpenedKL(1.2)
    log_r = loss.teacher(target)
    z = torch.full((1, 6), -40.0, dtype=torch.float64)
    z.scatter_(1, target.top_ids, log_r[:, :3])
    z[0, 3] = log_r[0, 3]  # all of the bucket on one token
    assert z.argmax() == 3
    assert float(loss(z, target)) == pytest.approx(0.0, abs=1e-9)
    r = sharpened(p, 1.2)
    assert float(radius(Head.from_logits(r.log(), 6), Coverage(1))) > 0.01
    assert float(loss(z, full_target(p, 3))) > 0.01


@pytest.mark.parametrize("bad", [{"noise": "uniform"}, {"noise": "gaussian", "vocabulary": "full"}])
def test_noises_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="AdaptiveSharpenedKL: noise="):
        AdaptiveSharpenedKL(**bad)
