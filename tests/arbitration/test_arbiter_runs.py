"""A policy's training from YAML: configs, run folders, resuming, and what a policy carries to `arbitrate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import certdraft
from certdraft.arbitration import Arbiter, load_policy, never
from certdraft.train.commands.cli import main

CONFIGS = Path(certdraft.__file__).parent / "configs" / "arbiter"
RUNS = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_configs_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), "--print_config"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 0, err
    assert yaml.safe_load(out)["trainer"]["max_steps"] > 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly trained target and drafter: two steps of the shipped configs."""
    folder = tmp_path_factory.mktemp("pair")
    for name in ("target", "drafter"):
        main([
            "fit", "--config", str(CONFIGS / f"{name}.yaml"), "--runs_dir", str(folder / "runs"),
            "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1",
            "--trainer.val_check_interval=2", "--model.init_args.warmup_steps=1", "--data.init_args.rows=200",
            f"--model.init_args.export_dir={folder / name}",
            f"--data.init_args.tokenizer_dir={folder / 'tokenizer'}",
        ])  # fmt: skip
    return folder


def arguments(pair: Path, runs: Path, steps: int) -> list[str]:
    return [
        "fit", "--config", str(CONFIGS / "arithmetic.yaml"), "--runs_dir", str(runs), "--name", "policy",
        f"--model.init_args.target={pair / 'target'}",
        f"--model.init_args.drafter.init_args.pretrained={pair / 'drafter'}",
        f"--model.init_args.export_dir={runs / 'exported'}",
        "--model.init_args.label_steps=2", "--model.init_args.copies=3", "--data.init_args.batch_size=6",
        "--model.init_args.texts.max_new_tokens=6", "--data.init_args.train_problems=40",
        "--data.init_args.validation_problems=8", "--trainer.val_check_interval=2",
        "--checkpoint.every_n_train_steps=2", "--trainer.log_every_n_steps=1",
        "--trainer.num_sanity_val_steps=0", f"--trainer.max_steps={steps}",
    ]  # fmt: skip


def test_a_run_leaves_a_policy_and_resumes(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(arguments(pair, tmp_path, 4))
    (run,) = (tmp_path / "policy").iterdir()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {
        f"policy.{name}" for name in load_policy(run / "policy").state_dict()
    }
    exported = load_policy(tmp_path / "exported")
    assert exported.measured
    for name, value in exported.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"policy.{name}"])
    facts = json.loads((tmp_path / "exported" / "policy.json").read_text())
    assert facts["steps"] == 4
    assert facts["texts"]["max_new_tokens"] == 6
    rows = (run / "metrics.csv").read_text()
    for name in ("val/accuracy", "val/target_accuracy", "train/override_rate", "train/reward"):
        assert name in rows
    # a run that is stopped after two steps and resumed ends in the same weights
    halves = arguments(pair, tmp_path / "halves", 4)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "train")
    stop = {"class_path": "injected.Signal", "init_args": {"number": 15, "step": 2}}
    with pytest.raises(SystemExit):
        main([*halves, f"--trainer.callbacks={json.dumps([stop])}"])
    main([*halves, "--ckpt_path=last"])
    (run,) = (tmp_path / "halves" / "policy").iterdir()
    resumed = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 4
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_a_policy_carries_what_arbitrate_needs(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models, look-ahead, depth and length are those of the training unless they are given."""
    main(arguments(pair, tmp_path, 2))
    policy, out = tmp_path / "exported", tmp_path / "out.json"
    assert load_policy(policy).texts["look_ahead"] is True
    command = ["arbitrate", "--policy", str(policy), "--out", str(out), "--max_problems", "6"]
    main([*command, "--max_paths", "2"])
    found = json.loads(out.read_text())
    assert found["texts"] == load_policy(policy).texts
    assert (found["target"], found["drafter"]) == (str(pair / "target"), str(pair / "drafter"))
    assert "policy" in capsys.readouterr().out
    assert Arbiter(load_policy(policy)).look_ahead
    assert not Arbiter(load_policy(policy), look_ahead=False).look_ahead
    assert not Arbiter(never).look_ahead
    main([*command, "--max_paths", "2", "--texts.look_ahead", "false", "--texts.max_new_tokens", "6"])
    assert "look_ahead True there, False here" in capsys.readouterr().err
    facts = json.loads((policy / "policy.json").read_text())
    del facts["target"]
    (policy / "policy.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit):
        main(command)
    assert "give --target and --drafter" in capsys.readouterr().err


def test_a_pair_that_does_not_fit_is_refused(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [a for a in arguments(pair, tmp_path, 2) if "init_args.target" not in a]
    with pytest.raises(SystemExit):
        main([*settings, "--model.init_args.target=embedded"])
    assert "vocabulary" in capsys.readouterr().err


def test_a_group_of_one_is_refused(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments(pair, tmp_path, 2), "--model.init_args.copies=1"])
    assert "at least 2" in capsys.readouterr().err
