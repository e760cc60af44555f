"""Features from a server: those recorded here, whatever happens to the files in between."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.runs.traces import assert_same_features, assert_same_trace
from oracles.servers.server_process import FOLDER, ServerProcess, serving

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    RecordingError,
    Server,
    ServerError,
    TargetError,
    TraceMeta,
    open_trace,
    record_trace,
)
from certdraft.data.record.server import server_client as server_client_module

LAYERS = (1, 0)  # not in the file's order
PROMPTS = 9


class Servers:
    """Two servers of one target, and the folder that they share with the recording."""

    def __init__(self, processes: tuple[ServerProcess, ServerProcess], root: Path) -> None:
        self.processes, self.root = processes, root
        self.urls = [process.url for process in processes]

    def faults(self, number: int = 0, **faults: Any) -> None:
        self.processes[number].faults(**faults)

    def requests(self, number: int = 0) -> int:
        return self.processes[number].stats()["requests"]

    def left(self) -> list[str]:
        return [file.name for file in self.root.rglob("*") if file.is_file()]

    def __call__(self, **changes: Any) -> Server:
        return self.processes[0](**changes)


@pytest.fixture(scope="module")
def processes(target_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    root = tmp_path_factory.mktemp("features")
    with serving(target_dir, root) as one, serving(target_dir, root) as other:
        yield Servers((one, other), root)


@pytest.fixture
def servers(processes: Servers, monkeypatch: pytest.MonkeyPatch) -> Servers:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for process in processes.processes:
        process.reset()
    return processes


@pytest.fixture(scope="module")
def record(target_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TraceMeta]:
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = [json.dumps({"text": f"fox {'the ' * (i % 5)}{i} jumps over"}) for i in range(PROMPTS)]
    file.write_text("\n".join(rows))

    def run(folder: Path, new: int = 6, **changes: Any) -> TraceMeta:
        settings = {
            "corpus": Corpus(str(file), split="all"), "feature_layers": LAYERS,
            "prompts": Prompts(prompt_tokens=8, max_prompt_tokens=100), "num_kept": 8, "shard_rows": 4,
            "generation": Generation(max_new_tokens=new, max_length=200),
        }  # fmt: skip
        return record_trace(str(folder), target_dir, accelerator="cpu", **settings | changes)

    return run


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory, record: Callable[..., TraceMeta]) -> Path:
    folder = tmp_path_factory.mktemp("direct") / "trace"
    record(folder)
    return folder


def assert_same(folder: Path, direct: Path) -> None:
    assert_same_trace(folder, direct)
    assert_same_features(folder, direct)


def test_they_are_those_recorded_here(
    servers: Servers, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path
) -> None:
    meta = record(tmp_path / "t", server=servers(check_features=True))
    assert (meta.feature_layers, meta.feature_size, meta.dtype) == (LAYERS, 32, "server")
    assert_same(tmp_path / "t", direct)
    trace = open_trace(tmp_path / "t")
    assert not trace.columns(0).hidden[-1].any()  # the server's model never read the last token
    assert trace.columns(0).hidden[:-1].any(axis=(1, 2)).all()
    assert servers.left() == []
    assert servers.requests() == PROMPTS + 2  # a test text, and its token ids


def test_of_given_text_every_token_has_them(
    servers: Servers, record: Callable[..., TraceMeta], tmp_path: Path
) -> None:
    record(tmp_path / "here", new=0)
    record(tmp_path / "there", new=0, server=servers())
    assert_same(tmp_path / "there", tmp_path / "here")
    assert open_trace(tmp_path / "there").columns(0).hidden[-1].any()


def test_two_servers_share_the_work(
    servers: Servers, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path
) -> None:
    record(tmp_path / "t", server=servers(replicas=(servers.urls[1],), concurrency=1))
    assert_same(tmp_path / "t", direct)
    shares = [servers.requests(0), servers.requests(1)]
    assert sum(shares) == PROMPTS + 4
    assert min(shares) > 3


def test_one_of_two_goes_down(
    servers: Servers, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    break_after(3, lambda: servers.faults(1, errors=1000), monkeypatch)
    record(tmp_path / "t", server=servers(replicas=(servers.urls[1],), retries=1, concurrency=1))
    assert_same(tmp_path / "t", direct)
    assert "no whole answer in 2 attempts (the last: HTTP 500: EngineCore died)" in capsys.readouterr().err
    assert servers.left() == []


def break_after(rows: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Act once this many rows have been answered."""
    counter, row_of = iter(range(10 * PROMPTS)), server_client_module.row_of

    def counted(*args: Any) -> Any:
        if next(counter) == rows:
            act()
        return row_of(*args)

    patch.setattr(server_client_module, "row_of", counted)


@pytest.mark.parametrize("fault", ["errors", "missing"])
def test_a_server_that_stays_down_loses_nothing(
    servers: Servers, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, fault: str,
) -> None:  # fmt: skip
    broken = {"errors": 1000} if fault == "errors" else {"file": "missing"}
    with monkeypatch.context() as patch:
        break_after(5, lambda: servers.faults(**broken), patch)
        with pytest.raises(ServerError, match="run the same command again to go on"):
            record(tmp_path / "t", server=servers(retries=1, concurrency=1))
    assert servers.left() == []
    servers.faults()
    record(tmp_path / "t", server=servers())
    assert servers.requests() <= PROMPTS - 5 + 2
    assert_same(tmp_path / "t", direct)


@pytest.mark.parametrize("fault", ["missing", "half"])
def test_lost_files_are_asked_for_again(
    servers: Servers, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, fault: str,
) -> None:  # fmt: skip
    break_after(3, lambda: servers.faults(file=fault, file_faults=2), monkeypatch)
    record(tmp_path / "t", server=servers(concurrency=1))
    assert_same(tmp_path / "t", direct)
    assert servers.requests() == PROMPTS - 4 + 2
    assert servers.left() == []


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"file": "missing"}, ServerError, "was not written; see the server's log, its disk may be full"),
        ({"file": "half"}, ServerError, "is not whole"),
        ({"file": "stuck"}, ServerError, "has not written .* within server.timeout_s=2; see its log"),
        ({"file": "unlocked"}, ServerError, "another folder than .* or .* use_synchronization_lock false"),
        ({"file": "elsewhere"}, ServerError, "'/etc/passwd' as file of features"),
        ({"file": "keys"}, ServerError, "holds kv, token_ids, not token_ids and hidden_states"),
        ({"file": "tokens"}, ServerError, "are not the .* of its answer"),
        ({"file": "shape"}, ServerError, r"bfloat16 of shape \(\d+, 1, 32\), wanted .* \(\d+, 2, 32\)"),
        ({"file": "long"}, ServerError, "is longer than"),
        ({"file": "nan"}, TargetError, "token 4 of the document: the server's features hold NaN"),
        ({"features": {"layers": [0, 1]}}, ServerError, "layer 1 .* those of layer 0; start the server"),
        ({"features": {"folder": "/dev/shm/layers_2_3"}, "file": "unlocked"}, ServerError,
         r"to '/dev/shm/layers_2_3'; for feature_layers=\[1, 0\] that folder must be called 'layers_1_2'"),
        ({"features": None}, ServerError, "gives no features; start it with\nmkdir -p .*/layers_1_2 && "),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) and "file" in value else None,
)  # fmt: skip
def test_what_is_wrong_is_refused_before_any_work(
    servers: Servers,
    record: Callable[..., TraceMeta],
    tmp_path: Path,
    faults: dict,
    error: type,
    message: str,
) -> None:
    if faults.get("features", ()) is None:
        body = json.dumps({}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{servers.urls[0]}/faults", body)).close()
    else:
        servers.faults(**{key: dict(value) if key == "features" else value for key, value in faults.items()})
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        record(tmp_path / "t", server=servers(retries=1, timeout_s=2.0, check_features=True))
    assert time.monotonic() - begin < 30
    assert not list((tmp_path / "t").glob("shard*"))
    assert servers.left() == []


def test_another_model_of_that_size_is_refused(
    servers: Servers, record: Callable[..., TraceMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = server_client_module.target_features

    def of_other_weights(*args: Any) -> np.ndarray:
        return np.roll(outputs(*args), 1, axis=-1)

    monkeypatch.setattr(server_client_module, "target_features", of_other_weights)
    with pytest.raises(ServerError, match="it serves other weights than `target` names"):
        record(tmp_path / "t", server=servers(check_features=True))


def test_files_of_a_killed_recording_are_deleted_and_no_others(
    servers: Servers, record: Callable[..., TraceMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = servers.root / FOLDER
    files = server_client_module.FeatureFiles(str(servers.root), LAYERS, 32, tmp_path / "t", 1.0)
    (folder / f"cmpl-{files.name()}-0-01234567.safetensors").write_bytes(b"half")
    (folder / f"cmpl-{files.name()}-0-01234567.safetensors.lock").touch()
    (folder / "cmpl-another-0-01234567.safetensors").write_bytes(b"other")
    record(tmp_path / "t", server=servers())
    assert servers.left() == ["cmpl-another-0-01234567.safetensors"]


def test_settings_that_contradict_each_other(
    servers: Servers, record: Callable[..., TraceMeta], tmp_path: Path
) -> None:
    with pytest.raises(RecordingError, match=r"without server\.url\. .*\n.*layers_1_2 && python -m vllm"):
        record(tmp_path / "t", server=servers(url=None))
    with pytest.raises(RecordingError, match="only vLLM's server"):
        record(tmp_path / "t", server=servers(api="sglang"))
    with pytest.raises(RecordingError, match="is not a folder that this process may write"):
        record(tmp_path / "t", server=servers(features_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="has layers 0 to 1"):
        record(tmp_path / "t", server=servers(), feature_layers=(2,))
    with pytest.raises(ValueError, match="each address once"):
        servers(replicas=(servers.urls[0],))
