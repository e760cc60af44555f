"""`certdraft bench` with a real vLLM: its counters, texts and τ against our loop's."""

import json
from pathlib import Path
from typing import Any

import pytest
from interop.cases import Case
from interop.environments import ENVIRONMENTS, ready

from certdraft.evaluation import run_bench

EAGLE = Case("eagle", "eagle3", 4)
OPTIONS = ["--enforce-eager", "--max-model-len", "512"]


def test_served_acceptance_is_our_loops(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 the texts are equal, and every round accepts what our loop accepts on the same text."""
    if not ready("vllm"):
        pytest.skip("vllm is not installed; run `make interop`, which says why it could not be")
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("HF_HUB_OFFLINE", "1"),
        ("OMP_NUM_THREADS", "1"),
    ):
        monkeypatch.setenv(name, value)
    file = tmp_path / "prompts.jsonl"
    texts = [workspace.tokenizer.decode(prompt) for prompt in workspace.prompts]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    drafter = workspace.export(EAGLE.family, EAGLE.format, EAGLE.num_tokens)
    run_bench(
        target=str(workspace.target_folder),
        drafter=str(drafter),
        python=str(ENVIRONMENTS / "vllm" / "venv" / "bin" / "python"),
        server_options=OPTIONS,
        prompts_files=[str(file)],
        requests=[1, 2],
        max_new_tokens=32,
        repetitions=2,
        chat=False,
        dtype="float32",
        out=str(tmp_path / "bench"),
    )
    data = json.loads((tmp_path / "bench" / "bench.json").read_text())
    failed = {check["check"]: check["says"] for check in data["checks"] if check["passed"] is False}
    assert set(failed) <= {"no drift"}  # other work on this machine is no fault of ours
    one, two = data["levels"]
    assert one["texts"]["equal"] == two["texts"]["equal"] == len(texts)
    assert data["own_loop"]["served_minus_own"]["value"] == 0
    assert one["tau"] == data["own_loop"]["tau"]
    assert one["accepted_by_position"] == pytest.approx(two["accepted_by_position"])
    assert data["servers"]["drafter"]["draft_length"] == EAGLE.num_tokens
    assert one["drafter"]["cached_prompt_tokens"] == one["plain"]["cached_prompt_tokens"] == 0
