"""Features from a real vLLM server: those recorded from the same target here.

The server is started by the line that certdraft prints, with its connector's copies made fit for a CPU.
Prompts are read in pieces (32 tokens a step), and a second recording finds them in the prefix cache.
"""

import json
import shlex
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.environments import ready
from interop.serving import served
from oracles.runs.traces import assert_same_features, assert_same_trace

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    Recording,
    Server,
    ServerError,
    TraceDataModule,
    record_trace,
)
from certdraft.data.record.server.serve_command import layers_folder, serve_command

KEPT = 8
LAYERS = (6, 1, 7)  # of 8; the last one before the final norm
CPU = '"CpuHiddenStatesConnector", "kv_connector_module_path": "cpu_hidden_states"'


@pytest.fixture(scope="module")
def settings(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    pieces = [workspace.tokenizer.decode(prompt) for prompt in workspace.prompts[:4]]
    texts = [" ".join((pieces[i:] + pieces[:i]) * 8) for i in range(4)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "target": str(workspace.target_folder), "corpus": Corpus(str(file), split="all"),
        "prompts": Prompts(prompt_tokens=160, max_prompt_tokens=200), "num_kept": KEPT,
        "feature_layers": LAYERS, "accelerator": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not ready("vllm"):
        pytest.skip("vllm is not installed; run `make interop`, which says why it could not be")
    folder = tmp_path_factory.mktemp("vllm")
    recording = Recording(
        settings["target"], generation=Generation(max_length=240), num_kept=KEPT, feature_layers=LAYERS
    )
    make, line = serve_command(recording, str(folder)).split(" && ")
    assert make == f"mkdir -p {folder / layers_folder(LAYERS)}"
    (folder / layers_folder(LAYERS)).mkdir()
    words = shlex.split(line.replace('"ExampleHiddenStatesConnector"', CPU))
    assert words[:4] == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert CPU in words[-1]
    words += ["--max-num-batched-tokens", "32", "--max-num-seqs", "4"]
    engines = str(Path(__file__).with_name("engines"))
    with served(words[4:], folder / "server.log", PYTHONPATH=engines) as url:
        yield Server(url, concurrency=4, features_dir=str(folder), check_features=True)


@pytest.mark.parametrize("new", [24, 0], ids=["the target's own", "the text's tokens"])
def test_they_are_those_recorded_here(
    server: Server, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = settings | {"generation": Generation(max_new_tokens=new, max_length=240, loops="keep")}
    here = record_trace(str(tmp_path / "here"), **settings)
    for name in ("there", "cached"):
        there = record_trace(str(tmp_path / name), **settings, server=server)
        assert there.num_counted == here.num_counted > 50
        assert_same_trace(tmp_path / name, tmp_path / "here")
        assert_same_features(tmp_path / name, tmp_path / "here")
    assert not list(Path(server.features_dir or "").glob("layers*/*"))
    if new:  # prompts whose own top-k entries are asked for are not looked up in the cache
        assert cache_hits(server) > 0


def test_batches_stream_what_a_trace_would_store(
    server: Server, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = settings | {"generation": Generation(max_new_tokens=24, max_length=239, loops="keep")}
    record_trace(str(tmp_path / "stored"), **settings)
    record_trace(str(tmp_path / "plain"), **settings | {"feature_layers": ()})
    data = []
    for name, more in (("stored", {}), ("plain", {"server": server})):
        path = str(tmp_path / name)
        data.append(
            TraceDataModule(path, path, seq_len=160, batch_size=2, feature_layers=list(LAYERS), **more)
        )
        data[-1].setup()
    stored, streamed = (list(module.train_dataloader()) for module in data)
    for one, other in zip(stored, streamed, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        read = one.features.flatten(2).any(-1)  # a trace has zeros for the last token of a text, never read
        torch.testing.assert_close(one.features[read], other.features[read], rtol=2**-6, atol=1e-3)
    data[1].teardown()
    assert not list(Path(server.features_dir or "").glob("layers*/*"))


def cache_hits(server: Server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def test_other_layers_than_it_extracts_are_refused(
    server: Server, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = Path(server.features_dir or "")
    (folder / layers_folder((0, 1, 7))).mkdir()
    changes = {"feature_layers": (0, 1, 7), "generation": Generation(max_new_tokens=24, max_length=240)}
    with pytest.raises(ServerError, match=f"that folder must be called '{layers_folder((0, 1, 7))}'"):
        record_trace(str(tmp_path / "t"), **settings | changes, server=server)
