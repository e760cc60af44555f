"""Run folders, exports and traces from somebody who means harm: nothing of theirs is run, nothing grows."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.conftest import Work
from oracles.runs import forked
from oracles.runs.outcomes import fails

from certdraft.data import load_target, load_tokenizer
from certdraft.drafters import Drafter, register_drafter
from certdraft.support import appearing_folder, write_text
from certdraft.train.commands.parsing.known_classes import refuse_foreign_classes


@pytest.fixture
def run(work: Work, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work.run, tmp_path / "run"))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file behind once it is imported, or a class of it is made."""
    ran = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return ran


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the settings in config.yaml and in the checkpoints, whose hashes are made anew."""
    for name in ("best", "last"):
        file = run / f"checkpoints/{name}.ckpt"
        content = torch.load(file, weights_only=True)
        settings = yaml.safe_load(content["certdraft"]["config"])
        change(settings)
        content["certdraft"]["config"] = yaml.safe_dump(settings)
        torch.save(content, file)
    (run / "checkpoints/SHA256SUMS").unlink()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    change(settings)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


PLACES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "loss": lambda settings, name: settings["model"]["init_args"].update(loss={"class_path": name}),
    "loss without class_path": lambda settings, name: settings["model"]["init_args"].update(loss=name),
    "loss as text": lambda settings, name: settings["model"]["init_args"].update(
        loss=f"{{class_path: {name}}}"
    ),
    "drafter": lambda settings, name: settings["model"]["init_args"].update(drafter={"class_path": name}),
    "model": lambda settings, name: settings.update(model={"class_path": name, "init_args": {}}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["evil_module.Evil", "os.system", "certdraft.support.files.os.system", "certdraft.support.files.Path"],
)
def test_foreign_classes_are_refused_before_anything_is_built(
    place: str, name: str, run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lambda settings: PLACES[place](settings, name))
    for command in (
        ("export", "--run", str(run), "--out", str(tmp_path / "export")),
        ("reproduce", "--run", str(run), "--runs_dir", str(tmp_path / "again")),
    ):
        said = fails(capsys, *command)
        assert f"names {name}, which is neither a class of certdraft nor registered here" in said
        assert "--trust_classes true" in said
    assert not evil.exists()
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "callback",
    [
        {"class_path": "evil_module.Evil"},
        "evil_module.Evil",
        {"class_path": "LambdaCallback", "init_args": {"on_train_start": "os.system"}},
    ],
)
def test_foreign_callbacks_are_refused(
    callback: Any, run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lambda settings: settings["trainer"].update(callbacks=[callback]))
    said = fails(capsys, "reproduce", "--run", str(run), "--runs_dir", str(tmp_path / "again"))
    assert "config.yaml: trainer.callbacks" in said
    assert not evil.exists()


def test_a_file_that_a_value_names_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "loss.txt").write_text("class_path: os.system")
    with pytest.raises(ValueError, match=r"model.loss.class_path names os\.system"):
        refuse_foreign_classes({"model": {"loss": str(tmp_path / "loss.txt")}}, "config.yaml")
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        refuse_foreign_classes(deep, "config.yaml")


def test_what_is_accepted() -> None:
    """Classes of certdraft, Lightning's callbacks, registered drafters, and texts that name no class."""
    settings = {
        "model": {"class_path": "certdraft.train.drafter_module.DrafterModule", "loss": "ForwardKL"},
        "loss": {"class_path": "certdraft.losses.ForwardKL"},
        "callbacks": [{"class_path": "pytorch_lightning.callbacks.EarlyStopping"}],
        "names": ["Qwen/Qwen3-8B", "chats.jsonl", "/tmp/traces/v1.2", "val/tau_expected", "1e-3", "q_proj"],
    }
    refuse_foreign_classes(settings, "config.yaml")
    refuse_foreign_classes({"class_path": "os.system"}, "config.yaml", trust=True)

    @register_drafter("of-this-test")
    class Own(Drafter):
        pass

    Own.__qualname__ = "Own"
    refuse_foreign_classes({"class_path": f"{Own.__module__}.Own"}, "config.yaml")


def test_trusted_classes_are_built(
    run: Path, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lambda settings: settings["trainer"].update(callbacks=[{"class_path": "evil_module.Evil"}]))
    again = ("reproduce", "--run", str(run), "--runs_dir", str(tmp_path / "again"), "--trust_classes", "true")
    assert "evil_module" in fails(capsys, *again)  # it is no callback
    assert evil.exists()


def test_a_larger_drafter_than_the_checkpoint_holds(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """400 GB would be allocated before the weights are compared."""

    def enlarge(settings: dict[str, Any]) -> None:
        sizes = settings["model"]["init_args"]["drafter"]["init_args"]["config"]
        sizes.update(hidden_size=16_384, intermediate_size=65_536, num_hidden_layers=24)

    rewrite(run, enlarge)
    said = fails(capsys, "export", "--run", str(run), "--out", str(tmp_path / "export"))
    assert "trained weights, but holds" in said


def test_evaluate_builds_registered_kinds_only(
    work: Work, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = Path(shutil.copytree(work.export, tmp_path / "export"))
    facts = json.loads((export / "drafter.json").read_text())
    config = json.loads((export / "config.json").read_text())
    evaluate = ("evaluate", "--drafters", f"{{a: {export}}}", "--trace", str(work.trace), "--device", "cpu")
    (export / "drafter.json").write_text(json.dumps(facts | {"family": "evil_module.Evil"}))
    assert "of family 'evil_module.Evil'" in fails(capsys, *evaluate, "--out", str(tmp_path / "out"))
    (export / "drafter.json").write_text(json.dumps(facts))
    code = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil_module.Evil", "AutoModel": "evil_module.Evil"},
    }
    (export / "config.json").write_text(json.dumps(config | code))
    shutil.copy(tmp_path / "evil_module.py", export)
    fails(capsys, *evaluate, "--out", str(tmp_path / "out"))
    assert not evil.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layers", [10**6, 10**12])
def test_lint_of_a_folder_with_too_many_layers_ends(
    layers: int, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = Path(shutil.copytree(work.export, tmp_path / "export"))
    config = json.loads((export / "config.json").read_text())
    for section in ({}, {"dflash_config": {"target_layer_ids": [0], "mask_token_id": 1, "block_size": 4}}):
        (export / "config.json").write_text(json.dumps(config | section | {"num_hidden_layers": layers}))
        begin = time.monotonic()
        said = fails(capsys, "lint", "--path", str(export))
        assert time.monotonic() - begin < 60
        assert f"num_hidden_layers: is {layers}, but the folder has" in said
        assert len(said) < 5000


def test_the_weights_of_an_export_are_as_readable_as_its_other_files(work: Work) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in work.export.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert {mode & 0o444 for mode in modes.values()} == {0o444 & ~umask}, modes


def dead_pid() -> int:
    pid = forked.start(lambda: None)
    assert forked.end(pid) == 0
    return pid


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Not what a living one is writing."""
    left = tmp_path / f".out.{dead_pid()}.partial"
    alive, other = tmp_path / f".out.{os.getppid()}.partial", tmp_path / ".out.notes.partial"
    for folder in (left, alive, other):
        folder.mkdir()
    (left / "half").write_text("of it")
    with appearing_folder(tmp_path / "out"):
        assert not left.exists()
    assert alive.exists()
    assert other.exists()
    assert (tmp_path / "out").is_dir()
    left, alive = tmp_path / f".[a].{dead_pid()}.tmp", tmp_path / f".[a].{os.getppid()}.tmp"
    left.touch()
    alive.touch()
    write_text(tmp_path / "[a]", "whole")
    assert not left.exists()
    assert alive.exists()


def test_a_folder_that_was_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement."""
    replaced = tmp_path / f".out.{dead_pid()}.replaced"
    replaced.mkdir()
    (replaced / "old").write_text("whole")
    with pytest.raises(ZeroDivisionError), appearing_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "out/old").read_text() == "whole"


@pytest.mark.parametrize("load", [load_target, load_tokenizer])
def test_code_in_a_target_is_not_run_whatever_is_answered(
    load: Callable[[str], Any], work: Work, evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask, and `yes |` would answer."""
    folder = Path(shutil.copytree(work.target, tmp_path / "target"))
    shutil.copy(tmp_path / "evil_module.py", folder)
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil_module.Evil")
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {key: "Evil", "auto_map": names}))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    with pytest.raises(ValueError, match="trust_remote_code|model type|custom code"):
        load(str(folder))
    assert not evil.exists()
