"""A finished run, its export and a recorded trace, for commands that are killed, starved and misled."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracles.runs.tiny_runs import settings, tiny, write

from certdraft.train.commands.cli import main

__all__ = ["settings", "tiny", "write"]


@pytest.fixture(scope="session")
def other_file_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on another file system than the tests' own, where there is one; $TMPDIR of every command."""
    here, shm = tmp_path_factory.getbasetemp(), Path("/dev/shm")
    if not (os.access(shm, os.W_OK) and shm.stat().st_dev != here.stat().st_dev):
        yield tmp_path_factory.mktemp("tmpdir")
        return
    folder = Path(tempfile.mkdtemp(dir=shm))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Work:
    """What the commands under test start from.

    Args:
        run: folder of a finished run.
        export: its drafter, exported.
        trace: a trace of held-out text.
        corpus: prompts, as jsonl.
        target: folder of the target.
        config: of a run of 12 steps, without `runs_dir`.
    """

    run: Path
    export: Path
    trace: Path
    corpus: Path
    target: Path
    config: Path

    def command(self, name: str, out: Path) -> list[str]:
        """Arguments of a command whose results lie below `out`."""
        if name == "trace":
            return [
                "trace", "--out_dir", str(out / "trace"), "--target", str(self.target), "--corpus.source",
                str(self.corpus), "--generation.max_new_tokens", "24", "--batch_size", "4", "--shard_rows",
                "16", "--accelerator", "cpu",
            ]  # fmt: skip
        if name == "fit":
            return ["fit", "--config", str(self.config), "--runs_dir", str(out), "--ckpt_path", "last"]
        if name == "export":
            return ["export", "--run", str(self.run), "--out", str(out / "drafter")]
        if name == "certify":
            return [
                "certify", "--trace", str(self.trace), "--out", str(out / "certify"), "--protocol.coverage",
                "[2]",
            ]  # fmt: skip
        assert name == "evaluate"
        return [
            "evaluate", "--drafters", f"{{tiny: {self.export}}}", "--trace", str(self.trace), "--out",
            str(out / "evaluate"), "--device", "cpu", "--replay_documents", "4",
        ]  # fmt: skip


@pytest.fixture(scope="session")
def work(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    import yaml
    from oracles.runs.tiny_runs import run_settings

    folder = tmp_path_factory.mktemp("work")
    content = run_settings(tiny, folder / "runs")
    content["checkpoint"]["every_n_train_steps"] = 2
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(config)])
    (run,) = (folder / "runs/tiny").iterdir()
    made = Work(run, folder / "drafter", tiny / "validation", tiny / "corpus.jsonl", tiny / "target", config)
    main(made.command("export", folder))
    return made


@pytest.fixture
def start(work: Work, other_file_system: Path) -> Callable[[str, Path], Callable[[], None]]:
    """Makes a function that runs a command with its results below a folder, to be forked."""

    def make(name: str, out: Path) -> Callable[[], None]:
        def act() -> None:
            os.environ["TMPDIR"], tempfile.tempdir = str(other_file_system), None
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(work.command(name, out))

        return act

    return make
