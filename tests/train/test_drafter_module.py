"""DrafterModule against definitions written out plainly, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from certdraft.certificates import Head
from certdraft.data import TraceDataModule, load_target, open_trace
from certdraft.drafters import CausalDrafter
from certdraft.losses import TargetBatch
from certdraft.losses import target as losses_target
from certdraft.support import project_fp32
from certdraft.train import DrafterModule, OptimizerSettings, ValidationSettings
from certdraft.train.commands.cli import main
from certdraft.train.runs.run_callbacks import step_seed
from certdraft.train.target_outputs import TargetSettings
from certdraft.train.validation import ValidationSums, chain_rounds

Write = Callable[..., str]


def metrics_rows(settings: dict[str, Any]) -> list[dict[str, str]]:
    (file,) = Path(settings["runs_dir"]).glob("*/*/metrics.csv")
    with file.open() as stream:
        return list(csv.DictReader(stream))


def batches(tiny: Path, seq_len: int = 64) -> list[Any]:
    data = TraceDataModule(str(tiny / "train"), str(tiny / "validation"), seq_len=seq_len, batch_size=4)
    data.setup()
    return list(data.val_dataloader())


def test_validation_metrics_against_their_definitions(tiny: Path) -> None:
    torch.manual_seed(5)
    drafter = CausalDrafter(pretrained=str(tiny / "target"))
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    module = DrafterModule(drafter, validation=ValidationSettings(depth=3)).eval()
    module.on_validation_epoch_start()
    counts: dict[str, float] = dict.fromkeys(
        ("steps", "low", "low4", "tokens", "rounds", "kl", 1, 2, 4, 8), 0.0
    )
    for index, batch in enumerate(batches(tiny)):
        with torch.no_grad():
            module.validation_step(batch, index)
            logq = (
                drafter.logits(batch.input_ids, batch.position_ids, batch.document_ids)
                .double()
                .log_softmax(-1)
            )
        for row in range(len(batch.input_ids)):
            before, ahead = None, 0  # document of the last step, draft tokens left in the round
            for t in range(batch.input_ids.shape[1]):
                if not batch.loss_mask[row, t]:
                    before = None
                    continue
                head, q = batch.head[row, t], logq[row, t]
                greedy, p = int(head.greedy), head.p.double()
                rank = int((q >= q[greedy]).sum())
                low = float(p[0] - p[1]) < 0.1
                counts["steps"] += 1
                for m in (1, 2, 4, 8):
                    counts[m] += rank <= m
                counts["low"] += low
                counts["low4"] += low and rank <= 4
                own, rest = q[head.ids].exp(), 1 - q[head.ids].exp().sum()
                tail = head.tail_mass.double()
                counts["kl"] += float((p * (p / own).log()).sum() + torch.xlogy(tail, tail / rest))
                if int(batch.document_ids[row, t]) != before:
                    before, ahead = int(batch.document_ids[row, t]), 0
                    counts["rounds"] += 1
                    ahead = 3
                elif ahead < 0:
                    counts["rounds"] += 1
                    ahead = 3
                counts["tokens"] += 1
                ahead = ahead - 1 if rank == 1 and ahead > 0 else -1
    assert module._sums is not None
    found = module._sums.metrics()
    assert counts["low"] > 20
    expected = {f"coverage@{m}": counts[m] / counts["steps"] for m in (1, 2, 4, 8)}
    expected |= {
        "low_margin_coverage@4": counts["low4"] / counts["low"],
        "kl_nats": counts["kl"] / counts["steps"],
        "tau_expected": counts["tokens"] / counts["rounds"],
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert found["certified@4"] <= found["coverage@4"]
    assert 1 < found["tau_expected"] < 4


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 5))
def test_chain_rounds_against_the_loop_on_paper(hits: list[bool], depth: int) -> None:
    rounds = done = 0
    while done < len(hits):
        accepted = 0
        while accepted < depth and done + accepted < len(hits) and hits[done + accepted]:
            accepted += 1
        done, rounds = done + accepted + 1, rounds + 1
    assert chain_rounds(np.array(hits), depth) == rounds


def test_sums_add_up_over_batches() -> None:
    sums = ValidationSums(ValidationSettings(depth=2))
    hits = torch.tensor([[True, True, True, False, True, True]])
    sums.add_rounds(hits[..., None], torch.tensor([[4, 4, 4, 4, -1, 7]]))
    sums.add_rounds(hits[:, :1, None], torch.tensor([[0]]))
    found = dict(zip(sums.names, sums.sums.tolist(), strict=True))
    assert (found["tokens"], found["rounds"]) == (6, 4)  # 3 + 1 | 1 | 1
    assert sums.metrics() == {}


def test_a_tie_is_a_miss_and_nan_is_an_error() -> None:
    head = Head.from_probs(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]), 5)
    sums = ValidationSums(ValidationSettings(widths=(1, 4, 5), certified_width=2))
    assert not sums.add_steps(torch.zeros(1, 5), TargetBatch(head)).item()
    assert sums.add_steps(torch.tensor([[1.0, 0, 0, 0, 0]]), TargetBatch(head)).item()
    found = sums.metrics()
    assert [found[f"coverage@{m}"] for m in (1, 4, 5)] == [0.5, 0.5, 1.0]
    assert found["certified@2"] <= 0.5
    with pytest.raises(ValueError, match="diverged"):
        sums.add_steps(torch.tensor([[1.0, float("nan"), 0, 0, 0]]), TargetBatch(head))


def test_online_target_and_trace_give_the_same_loss(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[int] = []

    def counted(hidden: Tensor, *weights: Tensor | None) -> Tensor:
        projected.append(len(hidden))
        return project_fp32(hidden, *weights)

    monkeypatch.setattr(losses_target, "project_fp32", counted)
    config = CausalDrafter(pretrained=str(tiny / "target"))
    running = TargetSettings(str(tiny / "target"), num_kept=32)
    plain, chunked, online, online_whole = (
        DrafterModule(config, chunk_tokens=0),
        DrafterModule(config, chunk_tokens=7),
        DrafterModule(config, target=running),
        DrafterModule(config, chunk_tokens=0, target=running),
    )
    assert not [name for name, _ in online.named_parameters() if "online" in name]
    batch = batches(tiny, seq_len=256)[0]  # whole documents: a cut one lacks the context it was recorded with
    losses = []
    for module in (plain, chunked, online, online_whole):
        module.eval()
        module.log_dict = lambda values, **_: losses.append(values["train/loss_nats"].item())  # type: ignore[method-assign]
        module._trainer = type(
            "T",
            (),
            {
                "world_size": 1,
                "accumulate_grad_batches": 1,
                "global_step": 0,
                "log_every_n_steps": 1,
                "optimizers": [type("O", (), {"param_groups": [{"lr": 1.0}]})],
            },
        )()
        module.training_step(batch, 0)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2:] == pytest.approx([losses[0]] * 2, rel=1e-3)  # the trace stores gaps in fp16
    assert sum(projected) == batch.loss_mask.sum() < batch.loss_mask.numel()  # the running target's lm_head


def test_learning_rate_warms_up_and_ends_at_max_steps(settings: dict[str, Any], write: Write) -> None:
    settings["trainer"] |= {"log_every_n_steps": 1, "max_steps": 6, "limit_val_batches": 0}
    settings["model"]["optimizer"] = {"lr": 0.4, "warmup_steps": 2, "schedule": "linear", "final_lr": 0.5}
    main(["fit", "--config", write(settings)])
    rates = [float(row["train/lr"]) for row in metrics_rows(settings) if row["train/lr"]]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.35, 0.3, 0.25])


def test_fit_learns_saves_and_describes_itself(
    settings: dict[str, Any], write: Write, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["trainer"] |= {"max_steps": 40, "val_check_interval": 20}
    settings["model"]["optimizer"]["lr"] = 1e-2
    main(["fit", "--config", write(settings)])
    (folder,) = Path(settings["runs_dir"], "tiny").iterdir()
    rows = metrics_rows(settings)
    loss = [float(row["train/loss_nats"]) for row in rows if row["train/loss_nats"]]
    assert loss[-1] < 0.9 * loss[0]
    coverage = [float(row["val/coverage@4"]) for row in rows if row["val/coverage@4"]]
    assert max(coverage) > 0.2  # 4 of 304 tokens by chance
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["optimizer"]["betas"] == [0.9, 0.95], "defaults are written out"
    assert "packages: certdraft" in (folder / "command.txt").read_text()
    said = capsys.readouterr().err
    assert "training: 40/40 steps" in said
    assert "tokens/s" in said
    assert f"best: {folder / 'checkpoints' / 'best.ckpt'}, val/tau_expected " in said
    assert said.splitlines()[-1] == f"next: certdraft export {folder}"

    main(["validate", "--config", write(settings), "--ckpt_path", "best"])
    assert "val/tau_expected" in capsys.readouterr().out
    ask = ["validate", "--config", write(settings), "--ckpt_path", "best", "--model.step_weights"]
    main([*ask, "LowMarginWeights"])  # how it was trained does not matter here
    assert "val/tau_expected" in capsys.readouterr().out

    from certdraft.drafters import load_drafter, read_facts

    out = folder / "export"
    main(["export", "--run", str(folder), "--out", str(out), "--draft_length", "3"])
    facts = read_facts(out)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert facts["draft_length"] == 3
    assert facts["facts"]["loss"].startswith("Mixture")
    assert facts["facts"]["training"]["steps"] == best["global_step"]
    assert facts["facts"]["metrics"]["tau_expected"] == pytest.approx(max(
        float(row["val/tau_expected"]) for row in rows if row["val/tau_expected"]
    ), rel=1e-5)  # fmt: skip
    weights = dict(load_drafter(out).named_parameters())
    for name, value in best["state_dict"].items():
        if (key := name.removeprefix("drafter.")) in weights:
            assert torch.equal(weights[key], value)


def test_same_seed_same_start_whatever_the_loss(
    settings: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are compared from one initialisation, whatever was drawn before."""
    settings["trainer"] |= {"max_steps": 1}
    settings["model"]["optimizer"] |= {"lr": 0.0}
    states = []
    for loss in ("HardCE", "MarginDiscountedCE"):
        draws = len(states)  # recording a trace first, for example, draws random numbers
        monkeypatch.setattr(TraceDataModule, "prepare_data", lambda self, n=draws: torch.rand(n))
        main(["fit", "--config", write(settings), "--name", loss, "--model.loss", loss])
        (file,) = Path(settings["runs_dir"], loss).glob("*/checkpoints/last.ckpt")
        states.append(torch.load(file, weights_only=True)["state_dict"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_wandb_offline_beside_metrics_csv(settings: dict[str, Any], write: Write) -> None:
    settings["trainer"] |= {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2}
    logger = [
        "--trainer.logger",
        "WandbLogger",
        "--trainer.logger.offline",
        "true",
        "--trainer.logger.project",
        "t",
    ]
    main(["fit", "--config", write(settings), *logger])
    (folder,) = Path(settings["runs_dir"], "tiny").iterdir()
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert metrics_rows(settings)
    assert (folder / "checkpoints" / "last.ckpt").exists()


def test_mismatches_are_refused_with_both_sides(
    settings: dict[str, Any], write: Write, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(**model: Any) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", write({**settings, "model": {**settings["model"], **model}})])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    fresh = settings["model"]["drafter"]
    sized = {**fresh, "init_args": {"config": {**fresh["init_args"]["config"], "vocab_size": 300}}}
    assert "vocabulary of 300" in (said := refusal(drafter=sized))
    assert "304" in said

    other = tmp_path / "other"
    shutil.copytree(tiny / "target", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    mine = open_trace(tiny / "train").meta.tokenizer_fingerprint
    drafter = {"class_path": "CausalDrafter", "init_args": {"pretrained": str(other)}}
    assert mine[:12] in (said := refusal(drafter=drafter))
    assert "tokenizer" in said
    assert mine[:12] in refusal(target={"name": str(other)})
    assert "needs the 65 most probable" in refusal(
        loss={"class_path": "RunnerUpForgivingCE", "init_args": {"m": 65}}
    )


def test_seeds_depend_on_every_part() -> None:
    seeds = {
        step_seed(*parts) for parts in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_target_stays_frozen_and_outside(tiny: Path) -> None:
    target = load_target(str(tiny / "target"))
    assert not any(p.requires_grad for p in target.parameters())
    module = DrafterModule(
        CausalDrafter(pretrained=str(tiny / "target")), target=TargetSettings(str(tiny / "target")),
        optimizer=OptimizerSettings(),
    )  # fmt: skip
    module.train()
    assert module.online is not None
    assert not module.online.model.training
