"""Chunked evaluation: the numbers and gradients of the plain path, without its memory."""

from types import SimpleNamespace

import pytest
import torch
from oracles.mathematics.loss_cases import HEAD_LOSSES, K
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from certdraft import losses as L
from certdraft.losses.chunks.fp32_matmul import product_dtype

N, H = 37, 5
PRIME = 211


def problem(vocab=PRIME, full=False, dtype=torch.float64, steps=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(steps, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    scores = torch.randn(steps, vocab, generator=generator, dtype=torch.float64) * 2
    return hidden, weight, L.TargetBatch.from_logits(scores, K, full=full)


def plain(loss, hidden, weight, target, reduction, mask=None, step_weight=None):
    per_step = loss(
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)) @ weight.t().to(per_dtype(weight)), target
    )
    return L.reduce(per_step, mask, step_weight, reduction)


def per_dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def grads(value, *leaves):
    incoming = torch.ones_like(value) if value.dim() == 0 else torch.linspace(-1, 2, len(value)).to(value)
    return torch.autograd.grad(value, leaves, incoming)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_same_numbers_and_gradients_as_the_plain_path(name, full, reduction):
    loss = HEAD_LOSSES[name][0]
    hidden, weight, target = problem(full=full)
    expected = plain(loss, hidden, weight, target, reduction)
    for chunk_tokens in (8, None):
        value = L.Chunked(loss, reduction, chunk_tokens)(hidden, weight, target)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for got, want in zip(grads(value, hidden, weight), grads(expected, hidden, weight), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
        expected = plain(loss, hidden, weight, target, reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_drop_rows_and_weights_multiply_them(reduction):
    hidden, weight, target = problem()
    mask, step_weight = torch.arange(N) % 3 != 0, torch.linspace(0, 2, N).double()
    broken = hidden.detach().clone()
    broken[~mask] = torch.nan  # what stands in an uncounted row never matters
    broken.requires_grad_()
    loss = L.PoolDiscountedCE(3)
    value = L.Chunked(loss, reduction, 8)(broken, weight, target, mask, step_weight)
    expected = plain(loss, hidden, weight, target, reduction, mask, step_weight)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    got, want = grads(value, broken, weight), grads(expected, hidden, weight)
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=1e-11, atol=1e-12)
    assert (got[0][~mask] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_counted_step_is_zero_loss_and_zero_gradient(reduction):
    hidden, weight, target = problem()
    nothing = torch.zeros(N, dtype=torch.bool)
    value = L.Chunked(L.HardCE(), reduction)(hidden, weight, target, nothing)
    assert (value == 0).all()
    assert all((g == 0).all() for g in grads(value, hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, target = problem(vocab=13, steps=6)
    chunked = L.Chunked(L.Mixture([L.MarginDiscountedCE(), L.ForwardKL()], [1.0, 0.5]), reduction, 4)
    assert torch.autograd.gradcheck(lambda h, w: chunked(h, w, target), (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_input_gets_no_gradient(frozen, reduction):
    hidden, weight, target = problem()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked = L.Chunked(L.HardCE(), reduction, 8)
    leaf = weight if frozen == "hidden" else hidden
    (got,) = grads(chunked(hidden, weight, target), leaf)
    (want,) = grads(plain(L.HardCE(), hidden, weight, target, reduction), leaf)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_backward_scales_with_the_incoming_gradient_and_may_run_twice():
    hidden, weight, target = problem()
    value = L.Chunked(L.HardCE(), "mean", 8)(hidden, weight, target)
    once = torch.autograd.grad(value, hidden, retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * value, hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_no_gradient_is_prepared_when_none_is_wanted():
    hidden, weight, target = problem()
    with torch.no_grad():
        value = L.Chunked(L.HardCE(), "mean", 8)(hidden, weight, target)
    assert not value.requires_grad
    with torch.inference_mode():
        same = L.Chunked(L.HardCE(), "none", 8)(hidden, weight, target)
    torch.testing.assert_close(same.mean(), value)


def test_an_online_target_is_projected_chunk_by_chunk():
    hidden, weight, _ = problem()
    generator = torch.Generator().manual_seed(9)
    t_hidden = torch.randn(N, 7, generator=generator, dtype=torch.float64)
    t_weight = torch.randn(PRIME, 7, generator=generator, dtype=torch.float64)
    target = L.TargetBatch.from_logits(t_hidden @ t_weight.t(), K)
    mask = torch.arange(N) % 2 == 0
    value = L.Chunked(L.ForwardKL("full"), "mean", 8)(
        hidden, weight, L.OnlineTarget(t_hidden, t_weight, K), mask
    )
    torch.testing.assert_close(value, plain(L.ForwardKL("full"), hidden, weight, target, "mean", mask))


class _LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.element_size()
            for leaf in tree_leaves(out)
            if isinstance(leaf, torch.Tensor)
        ]
        self.largest = max([self.largest, *sizes])
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("online", [False, True])
def test_no_tensor_holds_all_steps_times_vocabulary(reduction, online):
    steps, chunk = 128, 8
    hidden, weight, target = problem(steps=steps)
    if online:
        target = L.OnlineTarget(torch.randn(steps, 7), torch.randn(PRIME, 7), K)
    mask = torch.arange(steps) % 4 != 1
    loss = L.ForwardKL() if online else L.MarginDiscountedCE()
    allowed = max(chunk * PRIME, PRIME * H, steps * K)
    with _LargestAllocation() as seen:
        grads(L.Chunked(loss, reduction, chunk)(hidden, weight, target, mask), hidden, weight)
    assert chunk * PRIME <= seen.largest <= allowed
    if not online:
        with _LargestAllocation() as seen:  # the meter does see what the plain path holds
            grads(plain(loss, hidden, weight, target, reduction, mask), hidden, weight)
        assert seen.largest >= steps * PRIME


def test_nothing_of_that_size_is_kept_for_backward():
    hidden, weight, target = problem(steps=128)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        L.Chunked(L.MarginDiscountedCE(), "mean", 8)(hidden, weight, target)
    assert saved
    assert max(saved) <= max(128 * H, PRIME * H)


def test_low_precision_inputs_are_multiplied_and_scored_in_fp32():
    """Three runs: float64 truth from the same bf16 numbers, plain bf16 logits, chunked."""
    hidden, weight, target = problem(dtype=torch.bfloat16, steps=64)
    truth = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = grads(plain(L.ForwardKL(), *truth, target, "mean"), *truth)
    value = L.Chunked(L.ForwardKL(), "mean", 16)(hidden, weight, target)
    assert value.dtype == torch.float32
    got = grads(value, hidden, weight)
    naive = grads(L.reduce(L.ForwardKL()(hidden @ weight.t(), target)), hidden, weight)

    def error(values):
        return [float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)]

    assert all(g.dtype == torch.bfloat16 for g in got)
    assert max(error(got)) < 3e-3  # one rounding of the result
    assert all(ours <= theirs + 1e-4 for ours, theirs in zip(error(got), error(naive), strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_inputs_keep_the_gradient_of_a_step_among_thousands(reduction):
    """Loss scaling reaches a gradient in backward only; before it, 1/16384 is too small for fp16."""
    hidden, weight, target = problem(dtype=torch.float16, steps=64)
    truth = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    scale, total = 2.0**16, 2.0**14
    exact = grads(plain(L.ForwardKL(), *truth, target, "sum") / total, *truth)
    found = L.Chunked(L.ForwardKL(), reduction, 16)(hidden, weight, target, denominator=total)
    value = found if reduction == "mean" else found.sum() / total
    got = grads(scale * value, hidden, weight)
    for ours, theirs in zip(got, exact, strict=True):
        assert ours.dtype == torch.float16
        assert float((ours.double() / scale - theirs).norm() / theirs.norm()) < 2e-3
    cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16)
    assert product_dtype(cuda, cuda) == torch.float16
    assert product_dtype(cuda, cuda, gradients=True) == torch.float32


def test_autocast_does_not_round_the_logits():
    hidden, weight, target = problem(dtype=torch.float32)
    expected = L.Chunked(L.HardCE(), "mean", 8)(hidden, weight, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = L.Chunked(L.HardCE(), "mean", 8)(hidden, weight, target)
        got = grads(value, hidden, weight)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for ours, theirs in zip(got, grads(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_chunk_rule():
    assert L.auto_chunk_tokens(151_936, "cuda") == 1024
    assert L.auto_chunk_tokens(32_000, "cuda") == 2048
    assert L.auto_chunk_tokens(10_000_000, "cuda") == 512
    assert L.auto_chunk_tokens(32_000, "cpu") == 196
    assert L.auto_chunk_tokens(10_000_000, "cpu") == 32


def test_refuses_what_it_cannot_do():
    hidden, weight, target = problem()
    with pytest.raises(ValueError, match=r"hidden \[37, 5\], weight \[211, 5\] and a target of 30 steps"):
        L.Chunked(L.HardCE())(hidden, weight, target[:30])
    with pytest.raises(ValueError, match="ForwardKL.*full distribution"):
        L.Chunked(L.ForwardKL("full"))(hidden, weight, target)
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        L.Chunked(L.HardCE(), chunk_tokens=0)
    with pytest.raises(ValueError, match="reduction='avg'"):
        L.Chunked(L.HardCE(), "avg")

    class Learned(L.HardCE):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="has parameters; their gradient"):
        L.Chunked(Learned())


class _Squared(L.HardCE):
    def forward(self, logits, target):
        return super().forward(logits, target).square()


class _SquaredMargin(L.CoverageMargin):
    def forward(self, logits, target):
        return super().forward(logits, target).square()


@pytest.mark.parametrize(
    "loss",
    [
        _Squared(),
        _SquaredMargin(3),
        L.Mixture([_Squared(), L.RunnerUpForgivingCE(3)], [0.5, 0.5]),
        L.Mixture([L.ForwardKL(), _SquaredMargin(3)], [0.5, 0.5]),
    ],
    ids=["dense", "sparse", "mixed", "mixed sparse"],
)
@pytest.mark.parametrize("full", [False, True])
def test_a_forward_of_a_subclass_is_what_is_trained(loss, full):
    hidden, weight, target = problem(full=full)
    expected = plain(loss, hidden, weight, target, "mean")
    value = L.Chunked(loss, "mean", 8)(hidden, weight, target)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads(value, hidden, weight), grads(expected, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss", [L.HardCE(), L.ForwardKL(), L.TotalVariation()], ids=repr)
def test_the_bias_of_an_online_target_counts(loss):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, mine, own = (torch.randn(n, H, generator=generator) for n in (N, PRIME, N, PRIME))
    target = L.OnlineTarget(mine, own, K, bias=3 * torch.randn(PRIME, generator=generator))
    expected = loss(hidden @ weight.t(), target[:])
    torch.testing.assert_close(
        L.Chunked(loss, "none", 8)(hidden, weight, target), expected, rtol=1e-5, atol=1e-5
    )
