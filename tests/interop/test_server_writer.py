"""Recording from a real vLLM server: the trace is the one recorded from the same target here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interop.environments import ready
from interop.serving import served
from oracles.runs.traces import assert_same_trace

from certdraft.data import Corpus, Generation, Prompts, Server, ServerError, record_trace

KEPT = 8


@pytest.fixture(scope="module")
def url(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the embedded target."""
    if not ready("vllm"):
        pytest.skip("vllm is not installed; run `make interop`, which says why it could not be")
    words = [str(workspace.target_folder), "--max-model-len", "512", "--max-logprobs", str(KEPT)]
    with served(words, tmp_path_factory.mktemp("vllm") / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def settings(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both record: a few prompts of held-out text."""
    file = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    texts = [workspace.tokenizer.decode(prompt) for prompt in workspace.prompts]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "target": str(workspace.target_folder), "corpus": Corpus(str(file), split="all"),
        "prompts": Prompts(prompt_tokens=16, max_prompt_tokens=48), "num_kept": KEPT, "accelerator": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("new", [0, 24], ids=["the text's tokens", "the target's own"])
def test_the_trace_is_the_one_recorded_here(
    url: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    settings = settings | {"generation": Generation(max_new_tokens=new, max_length=200, loops="keep")}
    here = record_trace(str(tmp_path / "here"), **settings)
    there = record_trace(str(tmp_path / "there"), **settings, server=Server(url=url, concurrency=4))
    assert there.num_counted == here.num_counted > 50
    assert_same_trace(tmp_path / "there", tmp_path / "here")


def test_a_server_that_keeps_too_few_is_refused(
    url: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ServerError, match="max-logprobs"):
        record_trace(str(tmp_path / "t"), **settings | {"num_kept": 2 * KEPT}, server=Server(url=url))
    assert not (tmp_path / "t" / "trace.json").exists()
