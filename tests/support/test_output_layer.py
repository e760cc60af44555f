"""`OutputLayer`: the logits of `project_fp32`, and never those of a weight that is gone."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from certdraft.support import OutputLayer, pack_linears, project_fp32

BF16 = torch.bfloat16


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Widened(TorchDispatchMode):
    """Counts the values that are converted to fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.values += result.numel()
        return result


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_are_those_of_project_fp32(shape: tuple[int, ...], biased: bool) -> None:
    head, weight = OutputLayer(), drawn(40, 24)
    bias = drawn(40, seed=2) if biased else None
    hidden = drawn(*shape, 24, seed=1)
    with torch.no_grad():
        for _ in range(2):
            logits = head(hidden, weight, bias)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, project_fp32(hidden, weight, bias), atol=1e-5, rtol=1e-5)


def test_the_weight_is_widened_once() -> None:
    head, weight, hidden = OutputLayer(), drawn(40, 24), drawn(2, 24, seed=1)
    with torch.no_grad(), Widened() as first:
        head(hidden, weight)
    with torch.no_grad(), Widened() as second:
        head(hidden, weight)
    assert first.values >= weight.numel()
    assert second.values <= hidden.numel()


def test_a_changed_or_replaced_weight_is_widened_again() -> None:
    head, weight, hidden = OutputLayer(), drawn(40, 24), drawn(2, 24, seed=1)
    with torch.no_grad():
        head(hidden, weight)
        weight.mul_(3)
        torch.testing.assert_close(head(hidden, weight), project_fp32(hidden, weight), atol=1e-5, rtol=1e-5)
        other = drawn(40, 24, seed=5)
        torch.testing.assert_close(head(hidden, other), project_fp32(hidden, other), atol=1e-5, rtol=1e-5)


def test_gradients_and_small_fp32_weights_keep_no_copy() -> None:
    head, weight, hidden = OutputLayer(), drawn(40, 24).requires_grad_(), drawn(2, 24, seed=1)
    head(hidden, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        for project in (head, head.top):
            project(hidden.float(), drawn(40, 24, dtype=torch.float32))
    assert not head._kept


def test_an_fp32_weight_is_packed_once_for_its_layer_and_its_projection() -> None:
    layer, own, shared = nn.Linear(512, 1100, bias=False), OutputLayer(), OutputLayer()
    hidden = drawn(3, 512, dtype=torch.float32)
    pack_linears(layer)
    with torch.no_grad():
        expected = project_fp32(hidden, layer.weight)
        torch.testing.assert_close(own(hidden, layer.weight.detach()), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shared(hidden, layer.weight, layer=layer), expected, atol=1e-5, rtol=1e-5)
        biased = shared(hidden, layer.weight, torch.ones(1100), layer)
        torch.testing.assert_close(biased, expected + 1, atol=1e-5, rtol=1e-5)
    assert own._kept
    assert not shared._kept


def test_copies_hold_no_weight() -> None:
    head = OutputLayer()
    with torch.no_grad():
        head(drawn(2, 24), drawn(40, 24))
        head.top(drawn(2, 24), drawn(40, 24))
    assert set(head._kept) <= {torch.float32, BF16}
    assert torch.float32 in head._kept
    assert not copy.deepcopy(head)._kept
    assert len(pickle.dumps(head)) < 200


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_draft_logits_are_those_of_project_top_and_follow_the_weight(
    shape: tuple[int, ...], biased: bool
) -> None:
    head, weight, hidden = OutputLayer(), drawn(400, 24), drawn(*shape, 24, seed=1)
    bias = drawn(400, seed=2) if biased else None
    with torch.no_grad():
        for _ in range(2):
            found, whole = head.top(hidden, weight, bias), project_fp32(hidden, weight, bias)
            torch.testing.assert_close(found.topk(16).values, whole.topk(16).values, atol=1e-4, rtol=0)
            torch.testing.assert_close(found, whole, atol=0.1, rtol=2**-7)
            weight.mul_(-2)
