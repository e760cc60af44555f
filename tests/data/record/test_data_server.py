"""Recording from a real server process: the same trace as recorded here, whatever the network does."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.runs.traces import assert_same_trace
from oracles.servers.server_process import NO_PROXY, ServerProcess, serving

from certdraft.certificates import StrictGreedy, Typical, radius
from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    RecordingError,
    Server,
    ServerError,
    TargetError,
    TraceMeta,
    assemble,
    open_trace,
    pack,
    record_trace,
)
from certdraft.data.record.server import http_server as server_module
from certdraft.data.record.server import server_client as server_client_module

PROMPTS = 10
SETTINGS: dict[str, Any] = {"prompts": Prompts(max_prompt_tokens=100), "num_kept": 8, "shard_rows": 4}


@pytest.fixture(scope="session")
def process(target_dir: str) -> Iterator[ServerProcess]:
    with serving(target_dir) as running:
        yield running


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    file = tmp_path_factory.mktemp("server") / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "fox {"the " * (i % 5)}{i}"}}\n' for i in range(PROMPTS)))
    return Corpus(str(file), split="all")


@pytest.fixture(scope="session")
def record(target_dir: str, corpus: Corpus) -> Callable[..., TraceMeta]:
    def run(folder: Path, **changes: Any) -> TraceMeta:
        new = changes.pop("max_new_tokens", 6)
        inside = changes.pop("corpus_positions", False)
        generation = Generation(max_new_tokens=new, max_length=200, corpus_positions=inside)
        settings = {"corpus": corpus, "generation": generation, **SETTINGS, **changes}
        return record_trace(str(folder), target_dir, accelerator="cpu", **settings)

    return run


@pytest.fixture(scope="session")
def direct(tmp_path_factory: pytest.TempPathFactory, record: Callable[..., TraceMeta]) -> Path:
    folder = tmp_path_factory.mktemp("direct") / "trace"
    record(folder)
    return folder


@pytest.mark.parametrize("api", ["completions", "sglang"])
def test_the_trace_is_the_one_recorded_here(
    server: ServerProcess, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path, api: str
) -> None:
    meta = record(tmp_path / "t", server=server(api=api))
    assert_same_trace(tmp_path / "t", direct)
    here = open_trace(direct).meta
    names = ("target", "target_revision", "tokenizer_fingerprint", "vocab_size", "num_kept", "num_counted")
    assert [getattr(meta, name) for name in names] == [getattr(here, name) for name in names]
    assert (meta.dtype, meta.has_entropy, meta.versions["server"]) == ("server", False, "0.0-test")
    assert meta.accounting["recording"]["used"] == PROMPTS
    assert server.stats()["requests"] == PROMPTS + 1
    assert 2 <= server.stats()["most_at_once"] <= 5


@pytest.mark.parametrize("api", ["completions", "sglang"])
@pytest.mark.parametrize("max_new_tokens", [0, 6])
def test_steps_inside_the_prompt_are_asked_for_when_they_are_learned(
    server: ServerProcess, record: Callable[..., TraceMeta], tmp_path: Path, api: str, max_new_tokens: int
) -> None:
    inside = {"max_new_tokens": max_new_tokens, "corpus_positions": True}
    if not max_new_tokens:  # prompts are text that is read; a continuation is none
        file = tmp_path / "x.jsonl"
        file.write_text("".join(f'{{"text": "the lazy dog {i} jumps over the fox"}}\n' for i in range(5)))
        inside["corpus"] = Corpus(str(file), split="all")
    record(tmp_path / "here", **inside)
    record(tmp_path / "there", server=server(api=api), **inside)
    assert_same_trace(tmp_path / "there", tmp_path / "here", every_step=True)


def test_entropy_is_not_made_up(
    server: ServerProcess, record: Callable[..., TraceMeta], tmp_path: Path
) -> None:
    record(tmp_path / "t", server=server())
    trace = open_trace(tmp_path / "t")
    assert np.isnan(trace.columns(0).entropy).all()
    head = trace.row(0).head
    assert head.entropy is None
    assert (radius(head, StrictGreedy()) >= 0).all()
    with pytest.raises(ValueError, match="needs the entropy of p, and this head was stored without"):
        radius(head, Typical(0.1, 0.09))
    assert assemble(trace, pack(trace.lengths, 64), [0]).head.entropy is None
    untold = ~trace.row(0).loss_mask
    assert torch.equal(head.gap[untold], torch.zeros_like(head.gap[untold]))  # certifies nothing
    torch.testing.assert_close(head.p[untold], torch.full_like(head.p[untold], 1 / 304))


@pytest.mark.parametrize("fault", ["errors", "hangs", "cuts", "garbage"])
def test_lost_requests_are_asked_again(
    server: ServerProcess, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path, fault: str
) -> None:
    server.faults(**{fault: 5})
    record(tmp_path / "t", server=server(timeout_s=0.75 if fault == "hangs" else 60.0))
    assert_same_trace(tmp_path / "t", direct)
    asked = server.stats()["requests"] - (PROMPTS + 1 + 5)
    assert asked == 0 or (fault == "hangs" and asked > 0)  # a busy machine is late with other answers, too


def test_a_server_that_stays_down_loses_nothing(
    server: ServerProcess, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    rows, row_of = iter(range(PROMPTS)), server_client_module.row_of

    def down_after_six(*args: Any) -> Any:
        if next(rows) == 6:
            server.faults(errors=1000)
        return row_of(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_client_module, "row_of", down_after_six)
        with pytest.raises(
            ServerError, match=r"no whole answer in 3 attempts \(the last: HTTP 500: EngineCore"
        ):
            record(folder, server=server(retries=2, concurrency=1))
    assert (folder / ".recording" / "shard-00000.arrow.json").exists()
    assert not (folder / "trace.json").exists()
    server.faults()
    record(folder, server=server())
    assert server.stats()["requests"] == 3 + 1  # seven were there
    assert_same_trace(folder, direct)
    record(folder, server=Server(url="http://127.0.0.1:9"))  # a whole trace asks nobody


_RECORD = """
import sys
from certdraft.data import Corpus, Generation, Prompts, Server, record_trace
out, target, chats, url = sys.argv[1:]
record_trace(out, target, Corpus(chats, split="all"), Prompts(max_prompt_tokens=100),
             Generation(max_new_tokens=6, max_length=200), num_kept=8, shard_rows=4,
             server=Server(url, concurrency=1))
"""


@contextmanager
def recording(folder: Path, target: str, chats: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has recorded its first shard; it does not outlive the block."""
    command = [sys.executable, "-c", _RECORD, str(folder), target, chats, url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=NO_PROXY)
    try:
        while not (folder / ".recording" / "shard-00000.arrow.json").exists():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_killed_while_asking(
    server: ServerProcess, record: Callable[..., TraceMeta], direct: Path, tmp_path: Path, target_dir: str,
    corpus: Corpus,
) -> None:  # fmt: skip
    folder = tmp_path / "t"
    with recording(folder, target_dir, corpus.source, server.url) as process:
        process.send_signal(signal.SIGKILL)
    record(folder, server=server())
    assert_same_trace(folder, direct)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_does_not_wait_for_answers(
    number: int, code: int, server: ServerProcess, record: Callable[..., TraceMeta], direct: Path,
    tmp_path: Path, target_dir: str, corpus: Corpus,
) -> None:  # fmt: skip
    folder = tmp_path / "t"
    with recording(folder, target_dir, corpus.source, server.url) as process:
        server.faults(hangs=1000, hang_s=600)
        time.sleep(0.2)
        process.send_signal(number)
        told = process.communicate(timeout=300)[1]  # half of the wait: a busy machine is not a failure
        assert process.returncode == code
        assert b"the same command goes on there" in told
    server.faults()
    record(folder, server=server())
    assert_same_trace(folder, direct)


@pytest.mark.parametrize(
    ("faults", "api", "message"),
    [
        ({"max_logprobs": 5}, "completions", r"gives at most 5 alternatives a step, num_kept=8 are wanted; .*"
         "--max-logprobs 8.* num_kept=5"),
        ({"silent_cap": 6}, "completions", "at most 6 alternatives"),
        ({"silent_cap": 6}, "sglang", "at most 6 alternatives"),
        ({"shifted_ids": 2}, "completions", r"not that of .*: token 0 of a test text is \d+ there"),
        ({"shifted_ids": 2}, "sglang", "tokenizer is not that of"),
        ({"text_names": True}, "completions", "names tokens by their text"),
        ({"models": ["a", "b"]}, "completions", r"serves several models \(a, b\); name one as server.model"),
        ({"max_model_len": 9}, "completions", r"documents may reach \d+ tokens, but .* tiny with room for 9"),
        ({"key": "k"}, "completions", "the server needs a key"),
        ({"shape": {"choices": []}}, "completions", "another shape than server.api=completions gives"),
        ({"shape": {"id": 1}}, "completions", "lacks `choices`, which a trace needs"),
        ({"shape": {"id": 1}}, "sglang", "lacks `meta_info`"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_do_it_is_refused_before_any_work(
    server: ServerProcess,
    record: Callable[..., TraceMeta],
    tmp_path: Path,
    faults: dict,
    api: str,
    message: str,
) -> None:
    server.faults(**faults)
    with pytest.raises(ServerError, match=message):
        record(tmp_path / "t", server=server(api=api))
    assert server.stats()["requests"] <= 1
    assert not list((tmp_path / "t").glob("shard*"))


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ({"other_ids": True}, ServerError, r"chats\.jsonl:\d+: the server worked on other token ids \("),
        ({"worse_token": True}, ServerError, "it samples or penalises"),
        ({"raw_logits": True}, ServerError, "sum to .* raw logits"),
        ({"nan": True}, TargetError, r"chats\.jsonl:\d+, after token \d+ of the document: .* hold NaN"),
    ],
)
def test_wrong_answers_are_refused_with_row_and_place(
    server: ServerProcess,
    record: Callable[..., TraceMeta],
    tmp_path: Path,
    faults: dict,
    error: type,
    message: str,
) -> None:
    server.faults(**faults)
    with pytest.raises(error, match=message):
        record(tmp_path / "t", server=server())
    assert not list((tmp_path / "t").glob("shard*"))


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("null ids", r"chats\.jsonl:\d+: the server's answer has another shape .*None among the token ids"),
        ("text ids", r"chats\.jsonl:\d+: the server's answer has another shape .*'1' among the token ids"),
        ("-inf", r"chats\.jsonl:\d+, after token \d+ of the document: every log-probability .* is -inf"),
        ("deep", r"JSON is nested too deep to be an answer \(asked about chats\.jsonl:\d+\)"),
    ],
)
def test_spoiled_answers_are_refused_with_the_row(
    server: ServerProcess, record: Callable[..., TraceMeta], tmp_path: Path, spoiled: str, message: str
) -> None:
    server.faults(spoiled=spoiled)
    with pytest.raises(ServerError, match=message) as raised:
        record(tmp_path / "t", server=server(retries=1))
    assert "\n" not in str(raised.value)


def test_what_contradicts_a_server(record: Callable[..., TraceMeta], tmp_path: Path) -> None:
    with pytest.raises(
        RecordingError, match=r"need server\.features_dir, .*\nmkdir -p .*layers_1 && python -m vllm"
    ):
        record(tmp_path / "t", server=Server("http://127.0.0.1:9"), feature_layers=(0,))
    with pytest.raises(ValueError, match="must begin with http"):
        Server("localhost:8000")
    with pytest.raises(ServerError, match="NO_SUCH_KEY is not set"):
        record(tmp_path / "t", server=Server("http://127.0.0.1:9", api_key_variable="NO_SUCH_KEY"))
    with pytest.raises(
        ServerError, match=r"127\.0\.0\.1:9/v1/models: no whole answer in 2 attempts .*refused"
    ):
        record(tmp_path / "t", server=Server("http://127.0.0.1:9", retries=1, backoff_s=0))


def test_a_key_is_sent(
    server: ServerProcess, record: Callable[..., TraceMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults(key="k")
    monkeypatch.setenv("A_KEY", "k")
    record(tmp_path / "t", server=server(api_key_variable="A_KEY", model="tiny"))


def test_waiting_grows_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.random, "uniform", lambda low, high: high)
    server = Server("http://x", backoff_s=1.0)
    assert [server_module.wait_s(server, attempt) for attempt in (1, 2, 3, 7, 20)] == [1, 2, 4, 60, 60]
