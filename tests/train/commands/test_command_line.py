"""The command line as typed: help without torch, one-line errors with the nearest name, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles.runs.outcomes import fails

from certdraft.train.commands.cli import COMMANDS, guard, main
from certdraft.train.commands.devices import check_devices
from certdraft.train.commands.parsing.completion import options_of
from certdraft.train.commands.parsing.parser import check_syntax, explain, place_in_files

Write = Callable[..., str]


def test_help_version_and_typos_import_no_torch() -> None:
    code = (
        "import sys; from certdraft.train.commands.cli import main\n"
        "for args in ([], ['--help'], ['--version'], ['fitt'], ['--config', 'x']):\n"
        "    try: main(args)\n"
        "    except SystemExit as stop: print('exit', stop.code)\n"
        "assert not {'torch', 'pytorch_lightning', 'transformers', 'jsonargparse'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("usage:") == 2
    assert done.stdout.count("exit 2") == 2
    assert "did you mean 'fit'?" in done.stderr
    assert "the command comes first" in done.stderr


def test_help_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import sys; from certdraft.train.commands.cli import main\n"
        "try: main(['lint', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('torch' in sys.modules)"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert "--target" in first
    assert first.removesuffix("True\n") == second.removesuffix("False\n")
    assert second.endswith("False\n")


def test_both_scripts_are_this_program() -> None:
    for name in ("certdraft", "lightning"):
        script = Path(sys.executable).with_name(name)
        done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
        assert f"usage: {name} COMMAND" in done.stdout
    python = [sys.executable, "-m", "certdraft", "--version"]
    assert subprocess.run(python, capture_output=True, text=True, check=True).stdout.startswith("certdraft ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: certdraft {name}" in capsys.readouterr().out.replace(" [options]", "")


def test_help_of_fit_leads_with_what_a_run_sets(capsys: pytest.CaptureFixture[str]) -> None:
    """The Trainer's options come after ours, all of them behind --help=all."""
    texts = []
    for asked in ("--help", "--help=all"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", asked])
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    short, whole = texts
    order = [
        "--config",
        "--model.drafter",
        "--model.loss",
        "--model.optimizer.lr",
        "--data.seq_len",
        "--trainer.",
    ]
    places = [short.index(f"  {option}") for option in order]
    assert places == sorted(places)
    assert "--help=all" in short
    assert len(short.splitlines()) < 110
    assert "loss per token position" in short, "each with its meaning"
    assert "--trainer.limit_val_batches" in whole
    assert "--trainer.limit_val_batches" not in short
    assert {"--trainer.limit_val_batches", "--name"} <= set(options_of("fit"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_step", "3"], "did you mean '--trainer.max_steps'?"),
        (["--trainer.max_steps", "many"], "trainer.max_steps: expected int, got many"),
        (["--model.optimiser.lr", "1"], "DrafterModule has no option 'optimiser"),
        (["--model.optimizer.lrr", "1"], "OptimizerSettings has no option 'lrr'; did you mean 'lr'?"),
        (["--model.loss", "MarginDiscountCE"], "did you mean 'MarginDiscountedCE'?"),
        (["--model.loss.mm", "1"], "has no option 'mm'"),
        (["--model.loss", "nowhere.yaml"], "no such file: nowhere.yaml"),
        (["--model.drafter", "nowhere.yaml"], "model.drafter: no such file: nowhere.yaml"),
        (["--trainer.precision", "fp16"], "'bf16-mixed'"),
        (["--trainer.logger", "wandb"], "the config of that name is logger/wandb.yaml"),
        (["--model.loss", "ce-kl"], "the config of that name is loss/ce-kl.yaml"),
        (
            ["--model.drafter", "/"],
            "/ is a folder, not a class; the weights to begin with are `drafter.pretr",
        ),
        (["--ckpt_path", "/"], "/ is a folder; give the .ckpt file in it, or --ckpt_path last"),
        (
            ["--data.sequence_len", "1"],
            "TraceDataModule has no option 'sequence_len'; did you mean 'seq_len'?",
        ),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
    ],
)
def test_wrong_flags_name_the_nearest(
    arguments: list[str],
    expected: str,
    settings: dict[str, Any],
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings["model"]["loss"] = {"class_path": "PoolDiscountedCE"}
    assert expected in fails(capsys, "fit", "--config", write(settings), *arguments)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trainer": {"max_step": 3}}, "did you mean '--trainer.max_steps'?"),
        ({"trainr": {"max_steps": 3}}, "did you mean '--trainer.max_steps'?"),
        ({"model": {"optimizer": {"warmup": 3}}}, "did you mean 'warmup_steps'?"),
        ({"data": {"train": "nowhere"}}, "nowhere"),
        ({"trainer": {"max_steps": 0, "max_epochs": 1}}, "trainer.max_steps"),
    ],
)
def test_wrong_yaml_names_the_nearest(
    change: dict[str, Any],
    expected: str,
    settings: dict[str, Any],
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for key, value in change.items():
        settings[key] = {**settings.get(key, {}), **value}
    assert expected in fails(capsys, "fit", "--config", write(settings))
    assert not list(Path(settings["runs_dir"]).glob("*/*/checkpoints/*"))


def test_unreadable_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in fails(capsys, "fit", "--config", "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [b\nc: {")
    check_syntax([])
    for text, words in (
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- a\n", "holds a list"),
        ("a", "holds a str"),
    ):
        (tmp_path / "no-settings.yaml").write_text(text)
        said = fails(capsys, "fit", "--config", str(tmp_path / "no-settings.yaml"))
        assert f"no-settings.yaml: {words}; a config is `key: value` lines" in said
    for flag in ("--config", "--model.loss"):
        assert "broken.yaml:2:2: not valid YAML" in fails(capsys, "fit", flag, str(tmp_path / "broken.yaml"))


def test_what_is_missing_is_said_in_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, "fit")
    assert "no settings; give a config, as in `certdraft fit --config configs/demo.yaml`" in said
    said = fails(capsys, "fit", "--config", "demo", "--trainer.accelerator", "gpu")
    assert "sees no GPU here" in said
    assert "--trainer.accelerator cpu" in said
    said = fails(capsys, "evaluate", "--drafters", "x", "--trace", "y", "--out", "z")
    assert "drafters: expected a mapping, as in '{name: value}'" in said


def test_a_target_on_an_unreachable_hub_ends_fit_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from certdraft.train.commands.cli import main\n"
        "try: main(['fit', '--config', 'recipes/qwen3-8b/eagle3', *sys.argv[1:]])\n"
        "finally: print({'torch', 'pytorch_lightning'} & sys.modules.keys())"
    )
    empty = {"HF_HUB_CACHE": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": ""}

    def call(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **empty}, cwd=tmp_path
        )

    done = call()
    assert (done.returncode, done.stdout) == (2, "set()\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "data.record.target Qwen/Qwen3-8B: not a folder here" in done.stderr
    assert "hf download Qwen/Qwen3-8B --local-dir DIR" in done.stderr
    other = call("--data.record.target", "me/mine").stderr
    assert "data.record.target me/mine" in other
    # with a copy in the cache or a trace, nothing is refused before the settings are read
    (tmp_path / "models--Qwen--Qwen3-8B").mkdir()
    (tmp_path / "trace").mkdir()
    for args in ((), ("--data.record.target", "me/mine", "--data.train", "trace")):
        assert "has no option 'los'" in call("--model.los", "x", *args).stderr


def test_devices_that_are_not_there() -> None:
    """Ninety-nine processes on a laptop are not started."""
    cores = os.cpu_count() or 1
    for accelerator, devices in (("cpu", 1), ("auto", "auto"), ("cpu", 2), ("cpu", str(cores)), ("cpu", [0])):
        check_devices(accelerator, devices)
    for devices in (99 * cores, str(99 * cores)):
        with pytest.raises(ValueError, match=f"{devices} processes, and this machine has {cores} cores"):
            check_devices("cpu", devices)


def test_plain_commands_are_strict_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean '--draft_length'?" in fails(
        capsys, "export", "--run", "x", "--out", "y", "--draft_lenght", "3"
    )
    assert "x: no checkpoint there" in fails(capsys, "export", "--run", "x", "--out", "y")


def test_exit_codes_of_failures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def act(error: BaseException) -> Callable[[], None]:
        def raise_it() -> None:
            raise error

        return raise_it

    cases = [
        (ValueError("rows: none"), 2, "certdraft x: error: rows: none\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            2,
            "no space left on the disk while writing a.bin",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "b"), 2, "no such file or folder: b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ValueError(
                "Does not validate against any of the Union subtypes\nSubtypes: [A, B]\nErrors:\n  - no hub\n"
                "  - Expected a <class 'NoneType'>\nGiven value type: <dict>\nGiven value: Namespace()"
            ),
            2,
            "certdraft x: error: no hub\n",
        ),
    ]
    for error, code, text in cases:
        with pytest.raises(SystemExit) as exit_:
            guard(act(error), "certdraft x")
        assert exit_.value.code == code
        assert text in capsys.readouterr().err
    asked, ignored = signal.default_int_handler, signal.SIG_IGN
    for before, after, code in ((asked, ignored, 130), (asked, asked, 1), (ignored, ignored, 1)):
        handlers = iter((before, after))
        with monkeypatch.context() as patch:
            patch.setattr(signal, "getsignal", lambda _, handlers=handlers: next(handlers))
            with pytest.raises(SystemExit) as exit_:
                guard(act(SystemExit(1)), "certdraft x")
        assert exit_.value.code == code
    with pytest.raises(KeyError):  # a bug keeps its traceback
        guard(act(KeyError("x")), "certdraft x")
    monkeypatch.setenv("CERTDRAFT_DEBUG", "1")
    with pytest.raises(ValueError, match="rows"):
        guard(act(ValueError("rows")), "certdraft x")


def test_a_complaint_names_the_file_and_line_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# drafterr\nname: x\nmodel:\n  drafterr: x\n  optimizer: {lr: fast}\n")
    args = ["--config", str(file)]
    assert place_in_files("model: no option 'drafterr'", args) == f"{file}:4: "
    assert place_in_files("model.optimizer.lr: expected a float", args) == f"{file}:5: "
    assert place_in_files("model.optimizer.betas: expected floats", args) == ""
    typed = [*args, "--model.optimizer.lr", "fast"]
    assert place_in_files("model.optimizer.lr: expected a float", typed) == "", "typed, not read"


def test_a_class_whose_module_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reason, and no class of ours that sounds alike."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_failing.py").write_text("import my_missing_package\n")
    (tmp_path / "my_whole.py").write_text("")
    (tmp_path / "my_losses.py").write_text("class Best: ...\n")
    for name, words in (
        ("my_absent.Best", "there is no module my_absent where Python looks"),
        ("my_failing.Best", "importing my_failing fails: No module named 'my_missing_package'"),
        ("my_whole.HardCEE", "did you mean 'HardCE'"),
    ):
        said = explain(f"Unexpected import path format: {name}")
        assert words in said
        assert ("did you mean" in said) is (name == "my_whole.HardCEE")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "demo", "--model.loss", "my_losses.Bst", "--print_config"])
    assert "no class 'my_losses.Bst'; did you mean 'my_losses.Best'?" in capsys.readouterr().err


def test_explain_keeps_the_deepest_complaint() -> None:
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'certdraft.losses.PoolDiscountedCE':
        Parser key "m":
          Expected a <class 'int'>. Got value: x
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    assert explain(message) == "model.m: expected int, got x"
    assert explain("something\n  else") == "something else" or "something" in explain("something\n  else")


def test_a_closed_pipe_is_no_error() -> None:
    """As in `certdraft --help | head -1`."""
    call = "from certdraft.train.commands.cli import main; main(['--help'])"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-c", call], stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
