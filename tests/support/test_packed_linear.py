"""Packed linear layers: the same products, and never those of a weight that is gone."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from certdraft.support import PackedLinear, pack_linears

BF16 = torch.bfloat16
SUPPORTED = torch.ops.mkldnn._is_mkldnn_bf16_supported()
HERE = pytest.mark.skipif(not SUPPORTED, reason="this CPU has no bf16 products in oneDNN")
DTYPES = [torch.float32, pytest.param(BF16, marks=HERE)]


@pytest.fixture(autouse=True)
def _no_weight_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certdraft.support.packed_linear._LARGE", 1)


def made(dtype: torch.dtype, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(dtype)
    model = nn.Sequential(layer, nn.GELU())
    pack_linears(model)
    assert type(layer) is PackedLinear
    assert layer._packed() is not None
    return model


def hidden(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(layer: nn.Module, x: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), None)
        expected = expected if layer.bias is None else expected + layer.bias.double()
        atol, rtol = (2e-2, 2**-7) if x.dtype == BF16 else (1e-5, 1e-5)
        assert layer(x).dtype == x.dtype
        torch.testing.assert_close(layer(x).double(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 7), (0,)])
def test_products_are_those_of_the_weight(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    check(made(dtype, bias)[0], hidden(dtype, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_written_to_or_replaced_is_not_multiplied_from_its_old_copy(dtype: torch.dtype) -> None:
    layer = made(dtype)[0]
    with torch.no_grad():
        layer.weight.mul_(-2)
    check(layer, hidden(dtype, 3))
    layer.weight = nn.Parameter(torch.randn(40, 24).to(dtype))
    check(layer, hidden(dtype, 3))
    pack_linears(layer)
    check(layer, hidden(dtype, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_and_pickles_have_their_own_weight(dtype: torch.dtype) -> None:
    model = made(dtype)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[0].weight.zero_()
        check(other[0], hidden(dtype, 3))
    check(model[0], hidden(dtype, 3))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_and_other_dtypes_go_the_usual_way(dtype: torch.dtype) -> None:
    model = made(dtype)
    model(hidden(dtype, 3)).float().sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        assert model.double()(hidden(torch.float64, 3)).dtype == torch.float64


def test_autocast_decides_over_fp32_weights() -> None:
    layer = made(torch.float32)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden(torch.float32, 3)).dtype == BF16


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packed_copy_is_what_is_multiplied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, used = made(dtype)[0], []
    monkeypatch.setattr(
        "certdraft.support.packed_linear._product", lambda x, laid_out, bias: used.append(laid_out) or x
    )
    with torch.no_grad():
        layer(hidden(dtype, 3))
    assert [copy.is_mkldnn for copy in used] == [True]


def test_small_fp32_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certdraft.support.packed_linear._LARGE", 24 * 40 + 1)
    layer = nn.Linear(24, 40)
    pack_linears(layer)
    assert type(layer) is nn.Linear
