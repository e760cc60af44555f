"""The loss study: its replay and its training loop are the package's, and its command runs."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import certdraft
from certdraft.data import Corpus, Generation, Prompts, TraceDataModule, record_trace
from certdraft.decoding import BestFirst, StaticTree, greedy_ranks, replay
from certdraft.drafters import CausalDrafter
from certdraft.losses import MarginDiscountedCE
from certdraft.train import DrafterModule, OptimizerSettings

STUDY = Path(certdraft.__file__).parent / "benchmarks" / "study"
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """The study's modules, importable as they are when its command runs."""
    if not STUDY.is_dir():
        pytest.skip("benchmarks are not part of an installed package")
    sys.path.insert(0, str(STUDY))
    try:
        yield ModuleType("study")
    finally:
        sys.path.remove(str(STUDY))
        for name in ("cells", "plan", "trees", "run", "analyse"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the embedded target's text."""
    folder = tmp_path_factory.mktemp("study") / "train"
    record_trace(
        str(folder), corpus=Corpus(split="train", max_rows=8), prompts=Prompts(prompts_per_document=1),
        generation=Generation(max_new_tokens=16, corpus_positions=True), accelerator="cpu",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("sharpness", [0.3, 1.5])
def test_counting_finds_the_rounds_of_replay(study: ModuleType, sharpness: float) -> None:
    import cells
    import trees

    torch.manual_seed(1)
    drafter = CausalDrafter(config={**SIZES, "initializer_range": sharpness}, vocab_size=80).double().eval()
    prompt = torch.randint(80, (5,)).tolist()
    text: list[int] = []
    for step in range(40):  # likely tokens, so that paths get deep
        logits = drafter.logits(torch.tensor([prompt + text]))[0, -1]
        text.append(int(logits.topk(3).indices[(step * 7) % 3]))
    before = trees.pop_orders(drafter, prompt, text, budget=64, max_depth=8)
    deepest = 0
    for budget in (8, 16, 32, 64):
        accepted, done = (before < budget).sum(-1), 0
        rounds = replay(drafter, prompt, text, BestFirst(budget)).rounds
        for found in rounds:
            assert accepted[done] == found.accepted, (budget, done)
            done += found.committed
        assert trees.target_passes(accepted) == len(rounds)
        deepest = max(deepest, int(accepted.max()))
    assert deepest >= 2
    ranks = greedy_ranks(drafter, prompt, text)
    for widths in cells.STATIC.values():
        rounds = replay(drafter, prompt, text, StaticTree(widths)).rounds
        assert trees.target_passes(trees.accepted_by_rank(ranks, widths)) == len(rounds)
        short = replay(drafter, prompt, text[:2], StaticTree(widths)).rounds
        assert trees.target_passes(trees.accepted_by_rank(ranks[:2], widths)) == len(short)
    assert (trees.pop_orders(drafter, prompt, text[:1]) == 64).all()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning under a newer torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_lean_loop_gives_lightnings_weights(
    study: ModuleType, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cells

    monkeypatch.setattr(cells, "SEQ_LEN", 64)
    monkeypatch.setattr(cells, "ROWS", 2)
    drafter = cells.fresh_drafter("1-layer", 0, 2048)
    twin, before = copy.deepcopy(drafter), copy.deepcopy(drafter)
    settings = OptimizerSettings(lr=2e-3, schedule="linear", warmup_steps=3)
    monkeypatch.setattr(cells, "factor", lambda step, steps, decay: settings.factor(step, steps))
    run = cells.Run.start(drafter, "margin", 2e-3)
    run.train(cells.train_batches(trace, seed=5), 6, 6)

    twin.init_from_target = False  # it has been
    data = TraceDataModule(str(trace), str(trace), seq_len=64, batch_size=2, seed=5)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, gradient_clip_val=cells.CLIP, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(DrafterModule(twin, MarginDiscountedCE(), settings), data)
    moved = False
    for (name, mine), theirs, old in zip(
        run.drafter.named_parameters(), twin.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
        moved |= not torch.allclose(mine, old, atol=1e-3)
    assert moved


def test_schedule_and_branch(study: ModuleType, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget that branches off the large one's constant part is the small budget's own run."""
    import cells

    monkeypatch.setattr(cells, "SEQ_LEN", 64)
    monkeypatch.setattr(cells, "WARMUP", 2)
    assert [round(cells.factor(s, 10, 0.4), 2) for s in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]

    def run_of(steps: int) -> Any:
        return cells.Run.start(cells.fresh_drafter("1-layer", 0, 2048), "budget-ce", 2e-3)

    alone = run_of(5)
    alone.train(cells.train_batches(trace, 0), 5, 5, 0.4)
    data = cells.train_batches(trace, 0)
    trunk = run_of(9)
    trunk.train(data, 3, 9, 0.4)
    branch = trunk.branch()
    branch.train(data, 5, 5, 0.4)
    for mine, theirs in zip(branch.drafter.parameters(), alone.drafter.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_the_command_runs_and_resumes(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run

    command = ["run.py", "--tiny", "--out", str(tmp_path), "--sizes", "2-layer"]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    lines = {
        stage: [json.loads(x) for x in (tmp_path / "results" / f"{stage}.jsonl").read_text().splitlines()]
        for stage in ("tune", "train", "fine-tune")
    }
    assert [x["key"].split("/")[2] for x in lines["tune"]] == ["ce", "margin"]
    assert [(x["loss"], x["budget"]) for x in lines["train"]] == [
        ("ce", "small"), ("ce", "large"), ("margin", "small"), ("margin", "large"),
    ]  # fmt: skip
    assert len(lines["fine-tune"]) == 2
    counts = lines["train"][0]["counts"]
    assert sum(counts["tokens"]) > 0
    assert set(counts["passes"]) >= {"chain-4", "4-ary", "best-first-32"}
    run.main()  # nothing is left to do
    assert len((tmp_path / "results" / "train.jsonl").read_text().splitlines()) == 4

    import analyse

    page = tmp_path / "losses.md"
    page.write_text("before\n<!-- study 2-layer, large -->\n<!-- end study 2-layer, large -->\nafter\n")
    paths = {"--results": tmp_path / "results", "--page": page, "--figure": tmp_path / "figure.png"}
    monkeypatch.setattr(sys, "argv", ["analyse.py", *(str(x) for pair in paths.items() for x in pair)])
    analyse.main()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    rate = sum(map(sum, counts["covered"][0])) / sum(map(sum, counts["steps"]))
    groups = json.loads((tmp_path / "results" / "summary.json").read_text())["groups"]
    shown = [
        groups[f"2-layer, {b}"]["losses"]["ce"]["metrics"]["coverage@1"]["rate"] for b in ("small", "large")
    ]
    assert shown[0]["value"] == pytest.approx(rate)
    assert f"| ce | 1 | {shown[1]['value']:.3f} |" in text
