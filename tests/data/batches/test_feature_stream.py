"""Features streamed from a server process: the batches of a trace that stores them, at any resume."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.servers.server_process import ServerProcess, serving
from transformers import Qwen3ForCausalLM

from certdraft.data import Generation, Prompts, Server, ServerError, TraceDataModule, record_trace
from certdraft.data.batches.feature_stream import FeatureStream

LAYERS = [1, 0]  # not in the file's order
DOCUMENTS = 12


@pytest.fixture(scope="module")
def process(target_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(target_dir, tmp_path_factory.mktemp("features")) as running:
        yield running


@pytest.fixture(scope="module")
def traces(target_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trace that stores features, and the same without."""
    folder = tmp_path_factory.mktemp("traces")
    record(folder / "stored", target_dir, feature_layers=tuple(LAYERS))
    record(folder / "plain", target_dir)
    return folder


def record(folder: Path, target: str, **changes: Any) -> None:
    rows = [{"prompt": f"fox {'the ' * (i % 5)}{i}"} for i in range(DOCUMENTS)]
    record_trace(
        str(folder), target, rows=rows, prompts=Prompts(max_prompt_tokens=100), num_kept=8,
        generation=Generation(max_new_tokens=12, max_length=200), accelerator="cpu", **changes,
    )  # fmt: skip


def module(trace: Path, server: Server | None = None, **changes: Any) -> TraceDataModule:
    settings = {"seq_len": 24, "batch_size": 2, "feature_layers": LAYERS, "seed": 3} | changes  # splits most
    more = {} if server is None else {"server": server}
    made = TraceDataModule(str(trace), str(trace), **settings, **more)
    made.setup()
    return made


def assert_same_batch(one: Any, other: Any) -> None:
    for name in ("input_ids", "position_ids", "document_ids", "loss_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert one.features.dtype == other.features.dtype == torch.bfloat16
    read = other.features.flatten(2).any(-1)  # a trace has zeros for the last token of a text, never read
    assert read[other.loss_mask].all()
    torch.testing.assert_close(one.features[read], other.features[read], rtol=2**-6, atol=2e-3)


def test_batches_are_those_of_a_trace_that_stores_them(server: ServerProcess, traces: Path) -> None:
    streaming, stored = module(traces / "plain", server()), module(traces / "stored")
    assert streaming.meta.feature_layers == stored.meta.feature_layers == tuple(LAYERS)
    for loader in ("train_dataloader", "val_dataloader"):
        pairs = list(zip(getattr(streaming, loader)(), getattr(stored, loader)(), strict=True))
        assert len(pairs) > 2
        for one, other in pairs:
            assert one.features.abs().sum() > 0
            assert_same_batch(one, other)
    streaming.teardown()
    assert not [file for file in server.root.rglob("*") if file.is_file()]


def test_a_resumed_run_sees_the_batches_that_follow(server: ServerProcess, traces: Path) -> None:
    first = module(traces / "plain", server())
    loader = first.train_dataloader()
    batches = iter(loader)
    next(batches)
    state, rest = loader.state_dict(), list(batches)
    first.teardown()
    again = module(traces / "plain", server())
    resumed = again.train_dataloader()
    resumed.load_state_dict(state)
    for one, other in zip(resumed, rest, strict=True):
        assert_same_batch(one, other)
    again.teardown()


def test_no_more_is_asked_for_than_the_coming_batches_need(server: ServerProcess, traces: Path) -> None:
    data = module(traces / "plain", server(), batch_size=1, prefetch=1)
    loader = data.val_dataloader()
    before = server.stats()["requests"]
    batches = iter(loader)
    next(batches)
    data._streams[0]._pool.submit(int).result()  # what was handed out before it has begun
    most = [len(data.validation_packing.row(row)) for row in range(3)]
    assert most[0] <= server.stats()["requests"] - before <= sum(most) < len(data.validation_trace)
    assert server.stats()["most_at_once"] <= 3
    batches.close()
    data.teardown()


def test_lost_requests_and_files_are_asked_for_again(server: ServerProcess, traces: Path) -> None:
    data = module(traces / "plain", server())
    loader = data.train_dataloader()
    server.faults(errors=3, cuts=1, file="half", file_faults=2)
    for one, other in zip(loader, module(traces / "stored").train_dataloader(), strict=True):
        assert_same_batch(one, other)
    data.teardown()


def test_a_server_that_stays_down_ends_it_with_a_way_on(server: ServerProcess, traces: Path) -> None:
    data = module(traces / "plain", server(retries=1))
    loader = data.train_dataloader()
    server.faults(errors=1000)
    with pytest.raises(
        ServerError, match=r"next batch: .*no whole answer in 2 attempts .*--ckpt_path last: .* same batches$"
    ) as e:
        list(loader)
    assert "\n" not in str(e.value)
    data.teardown()


def test_a_server_of_other_weights_is_refused(
    server: ServerProcess, target_dir: str, make_target: Callable[..., Qwen3ForCausalLM], tmp_path: Path
) -> None:
    shutil.copytree(target_dir, tmp_path / "other")
    make_target(seed=8).save_pretrained(tmp_path / "other")
    record(tmp_path / "t", str(tmp_path / "other"))
    data = module(tmp_path / "t", server())
    with pytest.raises(ServerError, match=r"trace's at \d+ of \d+ positions .* other weights than"):
        data.train_dataloader()
    data.teardown()


def test_what_a_stream_needs(server: ServerProcess, traces: Path) -> None:
    with pytest.raises(ValueError, match=r"name the layers as data\.feature_layers"):
        module(traces / "plain", server(), feature_layers=None)
    trace = module(traces / "plain", server()).train_trace
    for wrong in ({"features_dir": None}, {"api": "sglang"}):
        with pytest.raises(ValueError, match=r"data\.server\.features_dir"):
            FeatureStream(trace, (0,), replace(server(), **wrong))
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        FeatureStream(trace, (7,), server())
