"""Layers of every drafter kind compile and shard one by one, and train as they do uncompiled and whole."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles.models.decoding_models import disturbed_drafter, tiny_qwen3
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from certdraft.data import Batch
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)
from certdraft.train.compiling import CompileLayers
from certdraft.train.on_policy import write_rounds
from certdraft.train.sharding import decoder_layers, shard

V, T = 40, 24
KINDS = ("causal", "eagle", "block", "dspark")
Gradients = dict[str, Tensor]


def drafter_of(kind: str) -> Drafter:
    """A small fresh drafter in full rounds, of two layers where it has a choice."""
    target = tiny_qwen3(0, V, layers=6)
    if kind == "causal":
        return disturbed_drafter(tiny_qwen3(0, V), 0.1).build(V).train()
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"num_hidden_layers": 2, "block_size": 4, "mask_token_id": V - 1}
    if kind == "eagle":
        sizes = EagleConfig(target_layer_ids=(1, 2))
        return EagleDrafter(sizes, unroll=3, short_until=0.0).build(V, target).train()
    if kind == "block":
        return BlockDrafter(BlockConfig(**blocks), short_until=0.0).build(V, target).train()
    return DSparkDrafter(DSparkConfig(**blocks, markov_rank=4), short_until=0.0).build(V, target).train()


def trained(drafter: Drafter) -> tuple[float, Gradients]:
    """Loss and whole gradients of a step on two packed rows; `num_anchors` takes every position."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V - 1, (2, T), generator=generator)
    documents = torch.arange(T).div(10, rounding_mode="floor").expand(2, -1)
    features = torch.randn(2, T, len(drafter.taps), 32, generator=generator) if drafter.taps else None
    places = torch.arange(T).remainder(10).expand(2, -1)
    paths = drafter.paths(ids, places, documents, torch.ones(2, T, dtype=torch.bool), features)
    labels = ids.roll(-1, 1).flatten()[paths.steps[paths.mask]]
    loss = torch.nn.functional.cross_entropy(drafter.head(paths.hidden[paths.mask]), labels)
    loss.backward()
    found = {}
    for name, weight in drafter.named_parameters():
        if weight.grad is not None:
            whole = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            found[name] = whole.detach().clone()
    return loss.item(), found


def check_equal(one: tuple[float, Gradients], two: tuple[float, Gradients], rtol: float = 1e-4) -> None:
    assert one[0] == pytest.approx(two[0], rel=rtol)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(two[1][name], gradient, rtol=0.0, atol=rtol * scale + 1e-7, msg=name)


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about itself
@pytest.mark.parametrize(
    ("kind", "backend"),
    [("eagle", "aot_eager"), ("block", "aot_eager")]
    + [pytest.param(kind, "inductor", marks=pytest.mark.slow) for kind in KINDS],
)
def test_compiled_layers_have_the_values_and_gradients(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    plain, compiled = drafter_of(kind), drafter_of(kind)
    assert len(decoder_layers(compiled)) == (1 if kind == "eagle" else 2)
    module: Any = type("M", (), {"drafter": compiled})()
    CompileLayers(backend).on_fit_start(None, module)  # type: ignore[arg-type]
    torch._dynamo.utils.counters.clear()
    check_equal(trained(plain), trained(compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch._dynamo.config.recompile_limit >= 64


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(kind: str, num: int, precision: str) -> Drafter:
    drafter = drafter_of(kind)
    mesh = init_device_mesh("cpu", (num, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(drafter, mesh, precision)
    return drafter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_layers_train_like_whole_ones(kind: str, group: None) -> None:
    drafter = sharded(kind, 1, "32-true")
    layers = decoder_layers(drafter)
    assert len(layers) == (1 if kind == "eagle" else 2)
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    check_equal(trained(drafter_of(kind)), trained(drafter))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_mixed_gathers_layers_in_bf16_and_adds_gradients_in_fp32(kind: str, group: None) -> None:
    drafter, seen = sharded(kind, 1, "bf16-mixed"), {}

    def look(module: torch.nn.Module, given: Any) -> None:
        seen.update({id(module): {parameter.dtype for parameter in module.parameters()}})

    layers: list[Any] = decoder_layers(drafter)
    assert layers
    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
        assert layer._get_fsdp_state()._mp_policy.reduce_dtype == torch.float32
    exact = trained(drafter_of(kind))[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = trained(drafter)
        expected, plain = trained(drafter_of(kind))
    assert seen == {id(layer.mlp): {torch.bfloat16} for layer in layers}
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    whole_drafter: Any = drafter
    assert whole_drafter._get_fsdp_state()._mp_policy.param_dtype is None
    assert loss == pytest.approx(expected, rel=1e-3)
    for name, gradient in exact.items():
        apart, rounded = ((x[name] - gradient).norm() / gradient.norm() for x in (gradients, plain))
        assert float(apart) < 1.5 * float(rounded) + 0.005, name


@pytest.mark.filterwarnings("ignore")
def test_sharded_drafters_write_rounds_and_train_on_them(group: None) -> None:
    found = []
    for drafter in (drafter_of("causal"), sharded("causal", 1, "32-true")):
        ids = torch.arange(40).view(2, 20) % V
        places, mask = torch.arange(20).expand(2, -1), torch.ones(2, 20, dtype=torch.bool)
        for seed in range(2):  # the second round follows a backward pass
            torch.manual_seed(seed)
            batch, rounds = write_rounds(drafter, Batch(ids, places, torch.zeros_like(ids), mask), 2)
            paths = drafter.paths(batch.input_ids, places, batch.document_ids, batch.loss_mask)
            (paths.hidden.square().sum() + drafter.head_weight.square().sum()).backward()
            found.append(rounds.tokens)
    for plain, over_ranks in zip(found[:2], found[2:], strict=True):
        assert torch.equal(plain, over_ranks)


def _rank(rank: int, folder: str, kind: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    found = trained(sharded(kind, 2, "32-true"))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_hold_half_each_and_train_alike(kind: str, tmp_path: Path) -> None:
    """Both read the same rows, so the mean gradient is that of one."""
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path), kind)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(300)
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    check_equal(trained(drafter_of(kind)), torch.load(tmp_path / "found.pt", weights_only=True))
