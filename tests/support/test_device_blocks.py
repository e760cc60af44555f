"""Accelerators work in few large blocks, because each block costs launches; meta tensors stand for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from certdraft.losses import OnlineTarget
from certdraft.support import fp32
from certdraft.train import restricted_target
from certdraft.train.restricted_target import DraftVocabulary

V = 151_936


class Products(TorchDispatchMode):
    """Rows of the weight, and of the hidden states, in every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows.append((args[1].shape[1], args[0].shape[0]))
        return func(*args, **(kwargs or {}))


def test_a_weight_is_widened_in_ten_blocks() -> None:
    hidden = torch.empty(8, 4096, device="meta")
    weight = torch.empty(V, 4096, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), Products() as products:
        assert fp32._by_blocks(hidden, weight).shape == (8, V)
    assert len(products.rows) == 10, "blocks that fit a CPU's cache would be 1,187"


def test_greedy_tokens_of_a_target_are_found_in_chunks_of_many_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        read.append(len(hidden))
        return hidden @ weight.t()

    monkeypatch.setattr(restricted_target, "project_fp32", project)
    for device, most in (("meta", 883), ("cpu", 110)):
        hidden, weight = torch.zeros(1000, 2, device=device), torch.zeros(V, 2, device=device)
        read.clear()
        draft = DraftVocabulary(torch.arange(4, device=device), V)
        assert draft.proposable(OnlineTarget(hidden, weight)).shape == (1000,)
        assert max(read) == most


def test_a_position_that_several_rounds_meet_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((20, 6), (50, 6), (50,)))
    positions = torch.randint(20, (70,), generator=generator)
    read: list[int] = []
    project = fp32.project_fp32

    def counted(hidden: torch.Tensor, *given: Any) -> torch.Tensor:
        read.append(len(hidden))
        return project(hidden, *given)

    monkeypatch.setattr(restricted_target, "project_fp32", counted)
    draft = DraftVocabulary(torch.arange(0, 50, 2), 50)
    target = OnlineTarget(hidden[positions], weight, bias=bias)
    expected = draft.holds((hidden @ weight.t() + bias).argmax(-1))[positions]
    assert 0 < expected.sum() < 70
    assert torch.equal(draft.proposable(target), expected)
    assert sum(read) == 70
    read.clear()
    assert torch.equal(draft.proposable(target, positions), expected)
    assert sum(read) == len(set(positions.tolist())) < 21
    assert draft.proposable(target.select(positions < 0), positions[:0]).shape == (0,)
