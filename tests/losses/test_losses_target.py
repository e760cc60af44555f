"""TargetBatch, what losses refuse and how they say it, and mixtures from a configuration."""

import dataclasses

import jsonargparse
import pytest
import torch
from oracles.mathematics.loss_cases import HEAD_LOSSES, K, full_target, head_target, target_probs

from certdraft import losses as L
from certdraft.certificates import Head

VOCAB = 13


def test_a_target_is_the_same_from_logits_and_from_a_trace():
    logits = torch.randn(2, 5, VOCAB) * 2
    online = L.TargetBatch.from_logits(logits.flatten(0, 1), K)
    stored = L.TargetBatch(Head.from_logits(logits, K).flatten())
    assert (online.top_ids == stored.top_ids).all()
    assert (online.greedy == logits.flatten(0, 1).argmax(-1)).all()
    torch.testing.assert_close(
        stored.top_logp, logits.flatten(0, 1).log_softmax(-1).sort(descending=True)[0][:, :K]
    )
    torch.testing.assert_close(
        online.tail_logp.exp(), 1 - stored.top_logp.exp().sum(-1), rtol=1e-4, atol=1e-6
    )
    top = logits.flatten(0, 1).softmax(-1).topk(2).values
    torch.testing.assert_close(online.margin, top[:, 0] - top[:, 1])
    assert stored.logp is None
    assert L.TargetBatch.from_logits(logits[0], 99).num_kept == VOCAB


def test_stored_half_precision_gaps_become_fp32_and_probabilities_still_add_up():
    head = Head.from_logits(torch.randn(6, VOCAB) * 2, K)
    stored = dataclasses.replace(head, gap=head.gap.half(), ids=head.ids.int())
    target = L.TargetBatch(stored)
    assert target.head.gap.dtype == torch.float32
    assert target.top_ids.dtype == torch.int64
    torch.testing.assert_close(target.coarse_logp.exp().sum(-1), torch.ones(6))
    assert torch.isfinite(target.coarse_logp).all()


def test_a_stored_head_that_rounds_to_one_has_a_small_tail_not_an_impossible_one():
    """Half-precision gaps can make the K probabilities add up to more than one."""
    gap = torch.tensor([[0.0, 1.0, 2.0]])
    lse_gap = gap.neg().logsumexp(-1) - 1e-4
    target = L.TargetBatch(Head(torch.tensor([[4, 1, 2]]), gap, lse_gap, VOCAB))
    assert float(target.tail_logp) == -torch.inf
    torch.testing.assert_close(target.coarse_logp.exp().sum(-1), torch.ones(1))
    z = torch.zeros(1, VOCAB)
    assert float(L.ReverseKL()(z, target)) < 20.0
    assert float(L.ForwardKL()(target.coarse_logp.new_zeros(1, VOCAB), target)) > 0.0


def test_indexing_selects_the_same_steps_everywhere():
    target = full_target(target_probs(8, VOCAB))
    for index in (slice(2, 5), torch.tensor([2, 3, 4]), torch.arange(8).sub(3).abs() < 2):
        part = target[index]
        assert len(part) == 3
        assert (part.top_ids == target.top_ids[index]).all()
        assert (part.logp == target.logp[index]).all()
        torch.testing.assert_close(part.coarse_logp, target.coarse_logp[index])
    assert (target.to("cpu").top_ids == target.top_ids).all()


def test_no_gradient_flows_into_the_target():
    scores = torch.randn(4, VOCAB, requires_grad=True)
    head = Head.from_logits(scores, K)
    assert head.gap.requires_grad
    target = L.TargetBatch(head, scores.log_softmax(-1))
    z = torch.randn(4, VOCAB, requires_grad=True)
    (
        L.ForwardKL()(z, target) + L.ForwardKL("head")(z, target) + L.PoolDiscountedCE(3)(z, target)
    ).sum().backward()
    assert scores.grad is None
    assert z.grad is not None


def test_a_target_made_without_gradients_trains_later():
    with torch.no_grad():
        target = L.TargetBatch.from_logits(torch.randn(4, VOCAB), K)
        _ = target.coarse_logp, target.margin
    z = torch.randn(4, VOCAB, requires_grad=True)
    L.ForwardKL()(z, target).sum().backward()
    assert (z.grad != 0).any()


@pytest.mark.parametrize(
    "loss",
    [L.ForwardKL("full"), L.LK(vocabulary="full"), L.Mixture([L.HardCE(), L.ReverseKL("full")], [1, 1])],
)
def test_full_vocabulary_losses_refuse_a_head_by_name(loss):
    assert loss.requires == "full"
    target = head_target(target_probs(4, VOCAB))
    name = "ReverseKL|Mixture" if isinstance(loss, L.Mixture) else type(loss).__name__
    with pytest.raises(ValueError, match=rf"({name}).*full distribution.*K = 6.*vocabulary=auto"):
        loss(torch.randn(4, VOCAB), target)
    loss(torch.randn(4, VOCAB), full_target(target_probs(4, VOCAB)))


@pytest.mark.parametrize(
    ("loss", "needs"),
    [
        (L.PoolDiscountedCE(6), 7),
        (L.CertificateHinge(6), 7),
        (L.RunnerUpForgivingCE(7), 7),
        (L.SoftTopK(7), 7),
        (L.Mixture([L.HardCE(), L.PoolDiscountedCE(6)], [1, 1]), 7),
    ],
)
def test_short_heads_are_refused_with_both_numbers(loss, needs):
    assert loss.min_head == needs
    with pytest.raises(ValueError, match=rf"needs the {needs} most probable.*K = 6.*K >= {needs}"):
        loss(torch.randn(4, VOCAB), head_target(target_probs(4, VOCAB)))
    loss(torch.randn(4, VOCAB), head_target(target_probs(4, VOCAB), needs))


def test_a_small_vocabulary_is_never_too_short():
    """V <= m: everything is covered, every loss still has a value."""
    z, target = torch.randn(4, 3, requires_grad=True), head_target(target_probs(4, 3).float(), 3)
    for loss in (L.PoolDiscountedCE(4), L.RunnerUpForgivingCE(4), L.CertificateHinge(4), L.SoftTopK(4)):
        (gradient,) = torch.autograd.grad(loss(z, target).sum(), z)
        assert torch.isfinite(gradient).all(), loss
    assert torch.isinf(L.HardCE().miss_floor(target, 4)).all()


def test_shape_errors_name_both_sides():
    target = head_target(target_probs(4, VOCAB))
    with pytest.raises(ValueError, match=r"HardCE.*shape \[5, 13\].*\[4, V\]"):
        L.HardCE()(torch.randn(5, VOCAB), target)
    with pytest.raises(ValueError, match="12 tokens in its vocabulary, the target 13"):
        L.HardCE()(torch.randn(4, 12), target)
    with pytest.raises(ValueError, match=r"\[2, 3, 6\].*TargetBatch\(head\[loss_mask\]\)"):
        L.TargetBatch(Head.from_logits(torch.randn(2, 3, VOCAB), K))
    with pytest.raises(ValueError, match=r"logp has shape \[4, 12\]"):
        L.TargetBatch(target.head, torch.randn(4, 12))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L.JensenShannon(0.0), "beta=0.0"),
        (lambda: L.LK("gamma"), "form='gamma'"),
        (lambda: L.ForwardKL("all"), "vocabulary='all'"),
        (lambda: L.SoftTopK(0), "k=0"),
        (lambda: L.MarginDiscountedCE(a=0.0), "a=0.0"),
        (lambda: L.PoolDiscountedCE(0), "m=0"),
        (lambda: L.PoolDiscountedCE(floor=2.0), "floor=2.0"),
        (lambda: L.CertificateHinge(form="square"), "form='square'"),
        (lambda: L.CappedCE(1, 1.0), "never stops"),
        (lambda: L.Mixture([L.HardCE()], [0.5, 0.5]), "1 losses and 2 weights"),
        (lambda: L.Mixture([L.HardCE()], [float("nan")]), "finite"),
    ],
)
def test_constructors_refuse_by_value(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_mixture_shares_one_view_and_is_its_parts():
    p, z = target_probs(8, VOCAB), torch.randn(8, VOCAB, dtype=torch.float64)
    parts = [L.MarginDiscountedCE(), L.ForwardKL(), L.TotalVariation()]
    for target in (head_target(p), full_target(p)):
        mixed = L.Mixture(parts, [0.5, 0.25, 2.0])(z, target)
        by_hand = 0.5 * parts[0](z, target) + 0.25 * parts[1](z, target) + 2.0 * parts[2](z, target)
        torch.testing.assert_close(mixed, by_hand)


def test_losses_come_from_a_configuration():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=L.Loss)
    config = {
        "class_path": "certdraft.losses.Mixture",
        "init_args": {
            "losses": [
                {"class_path": "certdraft.losses.PoolDiscountedCE", "init_args": {"m": 2}},
                {"class_path": "certdraft.losses.ForwardKL", "init_args": {"vocabulary": "head"}},
            ],
            "weights": [0.5, 0.5],
        },
    }
    loss = parser.instantiate(parser.parse_object({"loss": config})).loss
    assert repr(loss) == "Mixture(0.5 PoolDiscountedCE(m=2, floor=0.02) + 0.5 ForwardKL(vocabulary='head'))"
    assert loss.min_head == 3
    bad = {"class_path": "certdraft.losses.ForwardKL", "init_args": {"vocabulary": "half"}}
    with pytest.raises(jsonargparse.ArgumentError, match="half"):
        parser.parse_object({"loss": bad})


def test_every_loss_says_what_it_is():
    for loss, _ in HEAD_LOSSES.values():
        assert type(loss).__name__ in repr(loss)
        assert "\n" not in repr(loss)
        assert loss.requires == "head"
