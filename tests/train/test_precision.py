"""One precision for logits: what bf16-mixed may change is the network, never the last projection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from certdraft.data import Batch, TraceDataModule
from certdraft.drafters import CausalDrafter
from certdraft.losses import OnlineTarget
from certdraft.train import DrafterModule

Head = Callable[[CausalDrafter, Tensor], Tensor]


def validated(tiny: Path, head: Head | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Validation metrics under the autocast of bf16-mixed, with the drafter's head or another one."""
    torch.manual_seed(5)
    drafter = CausalDrafter(pretrained=str(tiny / "target"))
    if head is not None:
        monkeypatch.setattr(CausalDrafter, "head", head)
    data = TraceDataModule(str(tiny / "train"), str(tiny / "validation"), seq_len=64, batch_size=4)
    data.setup()
    module = DrafterModule(drafter).eval()
    module.on_validation_epoch_start()
    batches: list[Batch] = list(data.val_dataloader())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index, batch in enumerate(batches):
            module.validation_step(batch, index)
    assert module._sums is not None
    return module._sums.metrics()


def test_bf16_mixed_metrics_are_those_of_an_exact_head(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(self: CausalDrafter, hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return (hidden.double() @ self.head_weight.double().T).float()

    def rounded(self: CausalDrafter, hidden: Tensor) -> Tensor:
        return (hidden.bfloat16() @ self.head_weight.bfloat16().T).float()

    found = validated(tiny, None, monkeypatch)
    expected = validated(tiny, exact, monkeypatch)
    assert expected["coverage@1"] > 0.1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
    other = validated(tiny, rounded, monkeypatch)
    assert max(abs(other[name] - value) for name, value in expected.items()) > 1.5e-4  # the test can see it


def test_online_targets_stay_fp32_under_autocast() -> None:
    hidden, weight = torch.randn(5, 16), torch.randn(40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        target = OnlineTarget(hidden, weight, k=4)[:]
    assert target.logp is not None
    assert target.logp.dtype == torch.float32
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    torch.testing.assert_close(target.logp.double(), exact, atol=1e-5, rtol=1e-5)
    biased = OnlineTarget(hidden, weight, k=4, bias=torch.linspace(-9, 9, 40))[:]
    exact = (hidden.double() @ weight.double().T + torch.linspace(-9, 9, 40).double()).log_softmax(-1)
    assert torch.equal(biased.greedy, exact.argmax(-1))


def test_fp32_products_are_as_before_once_a_run_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA training multiplies in TF32; decoding in the same process must not."""
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    module = DrafterModule(CausalDrafter(config=sizes, vocab_size=32))
    trainer = SimpleNamespace(precision="32-true", datamodule=None, strategy=None)
    monkeypatch.setattr(type(module), "trainer", trainer)
    before = torch.get_float32_matmul_precision()
    module.setup("fit")
    torch.set_float32_matmul_precision("high")
    module.teardown("fit")
    assert torch.get_float32_matmul_precision() == before == "highest"
