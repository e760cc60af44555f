"""fp32 logits against float64, whatever the dtypes, autocast and gradients."""

import pytest
import torch
from torch import Tensor

from certdraft.support import fp32, project_fp32, project_greedy, project_top

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F32, BF16), (torch.float16, BF16)]


def drawn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


@pytest.fixture(params=[1, 7 * 48, 1 << 19], ids=["a row a block", "odd blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 1 row, of 7 rows (100 rows leave a rest of 2), and of all rows."""
    monkeypatch.setattr(fp32, "_BLOCK_VALUES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(("of_hidden", "of_weight"), DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_those_of_float64(
    of_hidden: torch.dtype, of_weight: torch.dtype, autocast: bool, biased: bool
) -> None:
    hidden, weight = drawn(5, 48, dtype=of_hidden), drawn(100, 48, dtype=of_weight, seed=1)
    bias = drawn(100, dtype=of_weight, seed=2) if biased else None
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        logits = project_fp32(hidden, weight, bias)
    assert logits.dtype == F32
    torch.testing.assert_close(logits.double(), exact(hidden, weight, bias), atol=2e-5, rtol=0)


def test_float64_stays_float64() -> None:
    hidden, weight = drawn(5, 48, dtype=F64), drawn(10, 48, dtype=BF16)
    assert project_fp32(hidden, weight).dtype == F64
    torch.testing.assert_close(project_fp32(hidden, weight), exact(hidden, weight), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("of_hidden", "of_weight"), DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_of_float64(
    of_hidden: torch.dtype, of_weight: torch.dtype, autocast: bool
) -> None:
    hidden = drawn(5, 48, dtype=of_hidden).requires_grad_()
    weight = drawn(100, 48, dtype=of_weight, seed=1).requires_grad_()
    bias = drawn(100, seed=2).requires_grad_()
    upstream = drawn(5, 100, seed=3)
    with torch.autocast("cpu", BF16, enabled=autocast):
        logits = project_fp32(hidden, weight, bias)
    logits.backward(upstream)
    for parameter, expected in (
        (hidden, upstream.double() @ weight.double()),
        (weight, upstream.double().T @ hidden.double()),
        (bias, upstream.double().sum(0)),
    ):
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        rounding = 2e-5 if parameter.dtype == F32 else 2**-8 if parameter.dtype == BF16 else 2**-10
        torch.testing.assert_close(parameter.grad.double(), expected, atol=2e-5, rtol=rounding)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3), (1, 2, 3)])
def test_any_leading_axes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden, weight = drawn(*shape, 48, dtype=dtype), drawn(100, 48, dtype=dtype)
    with torch.no_grad():
        logits = project_fp32(hidden, weight)
    assert logits.shape == (*shape, 100)
    torch.testing.assert_close(logits.double(), exact(hidden, weight), atol=2e-5, rtol=0)


def test_bf16_logits_that_would_tie_do_not() -> None:
    weight = torch.tensor([[16.0, 0.0], [16.0, 0.03125]], dtype=BF16)
    hidden = torch.tensor([1.0, 1.0], dtype=BF16)
    assert (hidden @ weight.T).diff().item() == 0.0
    with torch.no_grad():
        assert project_fp32(hidden, weight).diff().item() == 0.03125


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_greedy_tokens_of_rounded_logits_are_those_of_fp32(scale: float, biased: bool) -> None:
    """Logits that crowd at the top, so that bf16 alone gets many argmaxes wrong."""
    hidden = drawn(300, 48, dtype=BF16)
    weight = (drawn(1, 48) + 0.02 * drawn(500, 48, seed=1)).mul(scale).to(BF16)
    bias = (scale * drawn(500, seed=2)).to(BF16) if biased else None
    with torch.no_grad():
        logits, whole = project_greedy(hidden, weight, bias), project_fp32(hidden, weight, bias)
        rounded = torch.nn.functional.linear(hidden, weight, bias)
    assert logits.dtype == F32
    best = whole.amax(-1)
    found = whole.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(found, best, atol=1e-4 * scale, rtol=0)  # the order of sums may differ
    assert biased or (rounded.argmax(-1) != whole.argmax(-1)).float().mean() > 0.1
    lead = whole.topk(2).values.diff(dim=-1).abs().squeeze(-1)
    near = lead < 2**-8 * best.abs()
    assert near.any()
    torch.testing.assert_close(
        logits.topk(2).values.diff(dim=-1).abs().squeeze(-1)[near], lead[near], atol=1e-4 * scale, rtol=0
    )


@pytest.mark.parametrize("biased", [False, True])
def test_the_largest_logits_of_a_draft_are_those_of_fp32(biased: bool) -> None:
    hidden = drawn(30, 48, dtype=BF16)
    weight = (drawn(1, 48) + 0.3 * drawn(500, 48, seed=1)).to(BF16)
    bias = drawn(500, seed=2).to(BF16) if biased else None
    with torch.no_grad():
        logits, whole = project_top(hidden, weight, bias, exact=64), project_fp32(hidden, weight, bias)
        rounded = torch.nn.functional.linear(hidden, weight, bias)
    assert logits.dtype == F32
    best, found = whole.topk(32), logits.topk(32)
    torch.testing.assert_close(found.values, best.values, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), whole.logsumexp(-1), atol=2e-3, rtol=0)
    order = (rounded.topk(32).indices != best.indices).any(-1)
    assert order.float().mean() > 0.5  # bf16 alone orders most rows otherwise


def test_greedy_tokens_of_fp32_weights_are_plain_logits() -> None:
    hidden, weight = drawn(3, 48), drawn(100, 48, seed=1)
    torch.testing.assert_close(project_greedy(hidden, weight), project_fp32(hidden, weight), atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shape", [(0,), (1,), (33,), (2, 5)])
def test_bf16_factors_on_cuda(shape: tuple[int, ...]) -> None:
    hidden, weight = drawn(*shape, 64, dtype=BF16).cuda(), drawn(100, 64, dtype=BF16).cuda()
    with torch.no_grad(), torch.autocast("cuda", BF16):
        logits = project_fp32(hidden, weight)
    assert logits.dtype == F32
    torch.testing.assert_close(logits.double(), exact(hidden, weight), atol=1e-4, rtol=0)
