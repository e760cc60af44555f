"""The fused kernels against the readable path: same losses, same gradients, any width.

Needs triton, which is part of the test extra on Linux. On a machine without CUDA the kernels run in triton's
interpreter; with `TRITON_INTERPRET=0` they are compiled for a device that is not there instead.
"""

import importlib.util
import os

import pytest
import torch
from oracles.mathematics.loss_cases import K, head_target, target_probs

from certdraft import losses as L

CUDA = torch.cuda.is_available()
if not CUDA:  # read when triton is imported, which nothing does before the first kernel
    os.environ.setdefault("TRITON_INTERPRET", "1")
RUNS = importlib.util.find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs triton, and CUDA or TRITON_INTERPRET=1")
DEVICE = "cuda" if CUDA else "cpu"

LOSSES = {
    "hard_ce": L.HardCE(),
    "margin": L.MarginDiscountedCE(),
    "pool": L.PoolDiscountedCE(3, floor=0.0),
    "runner_up": L.RunnerUpForgivingCE(4),
    "kl": L.ForwardKL(),
    "kl_head": L.ForwardKL("head"),
    "token": L.TokenCE(),
    "hinge": L.CertificateHinge(3),
    "lk_head": L.LK(vocabulary="head"),
    "ce_kl": L.Mixture([L.HardCE(), L.ForwardKL()], [0.5, 0.5]),
    "fallback": L.TotalVariation(),
    "rank": L.CoverageMargin(3),
}


def problem(vocab, steps=5, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(vocab)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    hidden, weight = draw(steps, width).to(dtype), draw(vocab, width).to(dtype)
    online = L.OnlineTarget(
        hidden + 0.5 * draw(steps, width).to(dtype),
        weight,
        min(K, vocab),
        next_ids=torch.tensor([0, vocab - 1, 1, -1, 2])[:steps].to(DEVICE) % vocab,
    )
    return hidden.requires_grad_(), weight.clone().requires_grad_(), online


def run(loss, reduction, backend, hidden, weight, target):
    value = L.Chunked(loss, reduction, 2, backend)(hidden, weight, target)
    incoming = torch.linspace(-1, 2, len(value)).to(value) if value.dim() else torch.ones_like(value)
    return value, *torch.autograd.grad(value, (hidden, weight), incoming)


def assert_same_as_torch(loss, reduction, hidden, weight, target):
    found, expected = (
        run(loss, reduction, backend, hidden, weight, target) for backend in ("triton", "torch")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("vocab", [6, 17, 4096, 5003])  # the head itself; less, as much and more than a block
@pytest.mark.parametrize("name", LOSSES)
def test_kernels_and_readable_path_agree(name, vocab, reduction):
    hidden, weight, online = problem(vocab)
    for target in (online, online[:]):
        assert_same_as_torch(LOSSES[name], reduction, hidden, weight, target)


@needs_kernels
@pytest.mark.parametrize("name", ["hard_ce", "margin", "kl_head", "hinge"])
def test_a_truncated_head_is_read_at_its_own_stride(name):
    hidden, weight, online = problem(40)
    target = L.TargetBatch(online[:].head.truncate(4))
    assert not target.top_ids.is_contiguous()
    assert_same_as_torch(LOSSES[name], "mean", hidden, weight, target)


@needs_kernels
@pytest.mark.parametrize("name", ["hard_ce", "pool", "kl", "kl_head"])
def test_values_alone(name):
    hidden, weight, online = problem(5003)
    with torch.no_grad():
        found = L.Chunked(LOSSES[name], "none", 2, "triton")(hidden, weight, online)
        expected = L.Chunked(LOSSES[name], "none", 2, "torch")(hidden, weight, online)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def kernels():
    from certdraft.losses.kernels import choose_kernels

    return choose_kernels("triton", torch.device(DEVICE))


@needs_kernels
def test_a_confident_drafter_keeps_its_small_loss():
    target = head_target(target_probs(4, 64).float())
    z = torch.zeros(4, 64, device=DEVICE)
    z[torch.arange(4), target.greedy.to(DEVICE)] = 40.0
    weight = torch.ones(4, K, device=DEVICE)
    one = torch.ones(4, device=DEVICE)
    value, gradient = kernels().discounted_(z, target.top_ids.to(DEVICE), weight, one, torch.float32)
    expected = 63 * torch.tensor(-40.0, dtype=torch.float64).exp().float()
    torch.testing.assert_close(value.cpu(), expected.expand(4), rtol=1e-5, atol=0.0)
    greedy = gradient.gather(-1, target.top_ids[:, :1].to(DEVICE)).cpu()
    torch.testing.assert_close(greedy.squeeze(-1), -expected.expand(4), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient.sum(-1).cpu(), torch.zeros(4), rtol=0.0, atol=1e-20)


@needs_kernels
@pytest.mark.parametrize("gap", [50.0, 1e4])
def test_saturated_and_impossible_logits_stay_finite(gap):
    p = target_probs(6, 40).float()
    target = L.TargetBatch(head_target(p).head, p.log())
    z = torch.zeros(6, 40)
    z[torch.arange(6), target.top_ids[:, -1]] = gap
    z[:3, 7] = -torch.inf
    one = torch.ones(6, device=DEVICE)
    weight = L.RunnerUpForgivingCE(3).discount(target).to(DEVICE)
    for value, gradient in (
        kernels().discounted_(z.clone().to(DEVICE), target.top_ids.to(DEVICE), weight, one, torch.float32),
        kernels().forward_kl_(z.clone().to(DEVICE), p.log().to(DEVICE), one, torch.float32),
    ):
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
    everything = torch.full((2, 40), -torch.inf)
    everything[:, :K] = 1.0
    ids = torch.arange(K).expand(2, K).contiguous().to(DEVICE)
    coarse, rest = kernels().split_(everything.to(DEVICE), ids)
    assert torch.isfinite(coarse).all()
    grad = torch.ones(2, K + 1, device=DEVICE)
    assert torch.isfinite(kernels().joined_(everything.to(DEVICE), rest, ids, grad, torch.float32)).all()


@needs_kernels
def test_gradients_are_rounded_once_and_rows_may_be_strided():
    hidden, weight, online = problem(5003)
    target = online[:]
    z = (hidden @ weight.t()).detach()
    wide = torch.full((5, 6000), torch.nan, device=DEVICE)  # what lies beyond the row is never read
    wide[:, :5003] = z
    one = torch.linspace(0.5, 2, 5, device=DEVICE)
    share = L.MarginDiscountedCE().discount(target)
    exact = kernels().discounted_(z.clone(), target.top_ids, share, one, torch.float32)
    rounded = kernels().discounted_(wide[:, :5003], target.top_ids, share, one, torch.bfloat16)
    assert rounded[1].dtype == torch.bfloat16
    # the interpreter cuts off where the device rounds
    torch.testing.assert_close(rounded[1].float(), exact[1], rtol=2**-8 if CUDA else 2**-7, atol=1e-30)
    torch.testing.assert_close(rounded[0], exact[0], rtol=0, atol=0)
    assert torch.isnan(wide[:, 5003:]).all()
    coarse, rest = kernels().split_(z.clone(), target.top_ids)
    torch.testing.assert_close(coarse[:, -1:], rest)


SIGNATURES = {
    "split": "z ids coarse rest z_stride coarse_stride vocab_size kept",
    "join": "z ids rest grad out z_stride grad_stride out_stride vocab_size kept",
    "discounted": "z ids weight coefficient value out z_stride out_stride vocab_size kept",
    "forward_kl": "z t coefficient value out z_stride t_stride out_stride vocab_size",
}


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton without its interpreter",
)
@pytest.mark.parametrize("name", SIGNATURES)
@pytest.mark.filterwarnings("ignore:.*FP_FUSION:UserWarning")
def test_kernels_compile_for_a_device_that_is_not_here(name):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from certdraft.losses.kernels.jitted import make_jitted

    special = {"KP": 32, "TAIL": True, "GRAD": True, "BLOCK": 4096}
    kernel = make_jitted()[name]
    special = {key: value for key, value in special.items() if key in kernel.arg_names}
    types = {"ids": "*i64", "out": "*bf16"}
    arguments = {
        key: types.get(key, "i32" if "stride" in key or key in ("vocab_size", "kept") else "*fp32")
        for key in SIGNATURES[name].split()
    }
    source = ASTSource(kernel, arguments | dict.fromkeys(special, "constexpr"), special)
    built = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 0
    assert built.asm["ptx"].count("bar.sync") >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [151_936, 151_669])
@pytest.mark.parametrize("name", LOSSES)
def test_on_the_device_in_bfloat16(name, vocab):
    """Three runs: float64 truth from the same bf16 numbers, the readable path, the kernels."""
    hidden, weight, online = problem(vocab, width=64, dtype=torch.bfloat16)
    target = online[:]
    truth = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = run(LOSSES[name], "mean", "torch", *truth, target)
    found = run(LOSSES[name], "mean", "triton", hidden, weight, target)
    plain = run(LOSSES[name], "mean", "torch", hidden, weight, target)
    for a, b, c in zip(found, plain, exact, strict=True):
        error = [float((x.double() - c).norm() / c.norm()) for x in (a, b)]
        assert error[0] <= error[1] + 1e-3


def test_backends_are_chosen_by_device_and_by_name(monkeypatch):
    from certdraft.losses import kernels as module

    assert module.choose_kernels("auto", torch.device("cpu")).name == "torch"
    assert module.choose_kernels("torch", torch.device("cuda")).name == "torch"
    assert module.choose_kernels("auto", torch.device("cuda"), torch.float64).name == "torch"
    with pytest.raises(ValueError, match="backend='cuda'"):
        L.Chunked(L.HardCE(), backend="cuda")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.choose_kernels("auto", torch.device("cuda")).name == "torch"
    with pytest.raises(ValueError, match="pip install triton"):
        module.choose_kernels("triton", torch.device("cpu"))
