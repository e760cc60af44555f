"""Packed linear layers: the same products, and never those of a weight that is gone."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from certdraft.support import PackedLinear, pack_linears

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 products in oneDNN"
)


def made(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias).to(BF16)
    model = nn.Sequential(layer, nn.GELU())
    pack_linears(model)
    assert type(layer) is PackedLinear
    return model


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(BF16)


def check(layer: nn.Module, x: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), None)
        expected = expected if layer.bias is None else expected + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, atol=2e-2, rtol=2**-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 7), (0,)])
def test_products_are_those_of_the_weight(bias: bool, shape: tuple[int, ...]) -> None:
    check(made(bias)[0], hidden(*shape))


def test_a_weight_written_to_or_replaced_is_not_multiplied_from_its_old_copy() -> None:
    layer = made()[0]
    with torch.no_grad():
        layer.weight.mul_(-2)
    check(layer, hidden(3))
    layer.weight = nn.Parameter(torch.randn(40, 24).to(BF16))
    check(layer, hidden(3))
    pack_linears(layer)
    check(layer, hidden(3))


def test_copies_and_pickles_have_their_own_weight() -> None:
    model = made()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[0].weight.zero_()
        check(other[0], hidden(3))
    check(model[0], hidden(3))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_gradients_and_other_dtypes_go_the_usual_way() -> None:
    model = made()
    model(hidden(3)).float().sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        assert model.float()(hidden(3).float()).dtype == torch.float32
