"""Which weights each optimiser gets, and that two of them resume and are scheduled as one."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from certdraft.drafters import CausalDrafter
from certdraft.train import OptimizerSettings, optim

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": False,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def made(**settings: Any) -> tuple[CausalDrafter, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    drafter = CausalDrafter(config=SIZES, vocab_size=64)
    built = OptimizerSettings(**{"warmup_steps": 3, "lr": 1e-2} | settings).build(drafter, 10)
    return drafter, built["optimizer"], built["lr_scheduler"]["scheduler"]


def trained(drafter: CausalDrafter, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        ids = torch.arange(step, step + 12)[None] % 64
        optimizer.zero_grad()
        drafter.head(drafter.hidden(ids)).logsumexp(-1).mean().backward()
        optimizer.step()
        scheduler.step()


def test_decay_spares_vectors_and_embeddings() -> None:
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    drafter = CausalDrafter(config=sizes | heads, vocab_size=64)
    built = OptimizerSettings(weight_decay=0.1).build(drafter, 10)
    decayed, spared = built["optimizer"].param_groups
    names = {id(p): n for n, p in drafter.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all("proj" in names[id(p)] or "lm_head" in names[id(p)] for p in decayed["params"])
    assert {names[id(p)].split(".")[-2] for p in spared["params"]} >= {"embed_tokens", "norm", "q_norm"}
    with pytest.raises(ValueError, match="max_steps"):
        OptimizerSettings().build(drafter, -1)


def test_muon_gets_the_matrices_of_the_layers() -> None:
    drafter, optimizer, _ = made(method="muon", weight_decay=0.1)
    names = {id(p): n for n, p in drafter.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert len(groups) == 3
    assert all("proj" in name for name in groups[0])
    assert all("lm_head" in name for name in groups[1])
    assert not any("proj" in name or "lm_head" in name for name in groups[2])
    assert sum(map(len, groups)) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_moves_matrices_as_far_as_adamw_does() -> None:
    moved = []
    for method in ("adamw", "muon"):
        drafter, optimizer, scheduler = made(method=method, schedule="constant", warmup_steps=1)
        before = copy.deepcopy(drafter.state_dict())
        trained(drafter, optimizer, scheduler, range(4))
        changes = {n: (p - before[n]).square().mean().sqrt() for n, p in drafter.state_dict().items()}
        moved.append(torch.stack([change for n, change in changes.items() if "proj" in n]).mean())
        assert all(change > 0 for change in changes.values())
    assert 0.2 < float(moved[1] / moved[0]) < 5


@pytest.mark.parametrize("kept", ["proj", "norm"])
def test_muon_takes_drafters_of_which_one_kind_of_weight_is_trained(kept: str) -> None:
    """LoRA leaves matrices alone."""
    drafter = CausalDrafter(config=SIZES, vocab_size=64)
    for name, weight in drafter.named_parameters():
        weight.requires_grad = kept in name
    optimizer = OptimizerSettings(method="muon").build(drafter, 10)["optimizer"]
    assert [type(part).__name__ for part in optimizer.parts] == [{"proj": "Muon", "norm": "AdamW"}[kept]]


def test_one_schedule_moves_all_learning_rates() -> None:
    drafter, optimizer, scheduler = made(method="muon")
    rates = []
    for step in range(4):
        rates.append([group["lr"] for part in optimizer.parts for group in part.param_groups])
        trained(drafter, optimizer, scheduler, range(step, step + 1))
    for step, now in enumerate(rates):
        assert len({*now}) == 1
        assert now[0] == pytest.approx(1e-2 * min(1, (step + 1) / 3))


def test_muon_resumes_bit_by_bit() -> None:
    whole = made(method="muon")
    trained(*whole, range(6))
    first = made(method="muon")
    trained(*first, range(3))
    resumed = made(method="muon")
    resumed[0].load_state_dict(first[0].state_dict())
    for part, state in zip(resumed[1:], [x.state_dict() for x in first[1:]], strict=True):
        part.load_state_dict(copy.deepcopy(state))
    trained(*resumed, range(3, 6))
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(weight, resumed[0].state_dict()[name]), name


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_the_iteration_brings_singular_values_near_one_and_keeps_the_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonalised(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ found @ v.T
    assert (inner.diagonal() > 0.5).all()
    assert (inner.diagonal() < 1.5).all()
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-4


def test_muon_in_fp32_moves_as_torch_does_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for fast in (True, False):
        monkeypatch.setattr(optim, "has_bfloat16_products", lambda device, fast=fast: fast)
        weight = nn.Parameter(torch.randn(20, 32, generator=torch.Generator().manual_seed(1)))
        untouched = nn.Parameter(torch.ones(4, 4))
        muon = optim.Muon(
            [weight, untouched], lr=0.1, weight_decay=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        )
        for seed in range(3):
            weight.grad = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed))
            muon.step()
        assert torch.equal(untouched, torch.ones(4, 4))
        assert muon.state[weight].keys() == {"momentum_buffer"}
        moved.append(weight.detach().clone())
    start = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    difference = (moved[0] - moved[1]).norm() / (moved[0] - start).norm()
    assert 0 < difference < 0.02
