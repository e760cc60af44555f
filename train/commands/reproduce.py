"""`certdraft reproduce`: run a training run again from its record, and compare the weights."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certdraft.evaluation import RECORD_FILE, provenance, sha256
from certdraft.train.commands import cli
from certdraft.train.commands.parsing.known_classes import refuse_foreign_classes
from certdraft.train.runs.checkpoint_file import LAST, read_checkpoint
from certdraft.train.runs.run_folder import find_checkpoint, read_yaml
from certdraft.train.runs.run_record import installed_packages, record_of


def reproduce(run: str, runs_dir: str = "runs", dry_run: bool = False, trust_classes: bool = False) -> None:
    """Run a training run again from its own config, and compare the weights.

    What differs today (packages, sources, machine, traces) is printed first. Afterwards the trained weights
    of both runs are compared; on the same machine with the same packages they are equal, bit for bit.

    Args:
        run: folder of a finished run.
        runs_dir: parent of the new run's folder, NAME-again.
        dry_run: only print what has changed and which command would run.
        trust_classes: also build classes that are neither certdraft's nor registered: read the run's
            config.yaml first, building them runs their code.

    Raises:
        FileNotFoundError: no run, or no last checkpoint to compare with.
        ValueError: a run without a record, or of foreign classes; or one whose weights came out differently.
    """
    folder = Path(run)
    parts = record_of(folder)
    if not parts:
        raise ValueError(f"{folder} has no {RECORD_FILE}; give the folder of a run: runs/NAME/TIME")
    for line in changes(parts[-1]):
        print(f"changed: {line}", file=sys.stderr)
    settings = read_yaml(folder / "config.yaml")
    refuse_foreign_classes(settings, folder / "config.yaml", trust_classes)
    if not settings.keys() >= {"name", "trainer", "model", "data"}:
        raise ValueError(f"{folder / 'config.yaml'} is damaged: it does not hold all settings; restore it")
    name = f"{settings['name']}-again"
    command = ["fit", "--config", str(folder / "config.yaml"), "--name", name, "--runs_dir", runs_dir]
    if Path(str((settings["trainer"] or {}).get("default_root_dir"))) == folder:
        command += ["--trainer.default_root_dir", "null"]  # the old run's folder, filled in by the old run
    print(shlex.join(["certdraft", *command]), file=sys.stderr)
    if dry_run:
        return
    before = folder / "checkpoints" / LAST
    if not before.exists():
        raise FileNotFoundError(f"{before}: no such checkpoint, so nothing to compare with")
    cli.main(command)
    after = find_checkpoint(Path(runs_dir) / name)
    assert after is not None
    largest = largest_difference(before, after)
    if largest > 0:
        raise ValueError(
            f"the weights of {after} differ from those of {before}, at most by {largest:.3g}; see the "
            "lines that begin with `changed` above, or set trainer.deterministic in the config"
        )
    print(f"reproduced: {after} has the weights of {before}, bit for bit")


def changes(part: Mapping[str, Any]) -> list[str]:
    """What differs from when a part ran: packages, sources, machine, traces. One line each."""
    facts, installed = provenance(), installed_packages()
    lines = [
        f"{name} is {installed.get(name, 'not installed')}, was {old}"
        for name, old in part["packages"].items()
        if installed.get(name) != old
    ]
    for name, old in (("python", platform.python_version()), ("source", facts["source"])):
        if part[name] != old:
            lines.append(f"{name} is {old}, was {part[name]}")
    if part["machine"] != facts["machine"]:
        lines.append(f"the machine is {facts['machine']}, was {part['machine']}")
    for name, trace in part["data"].items():
        file = Path(trace["path"]) / "trace.json"
        if not file.is_file():
            lines.append(f"the {name} trace {trace['path']} is gone; a config that can record makes it again")
        elif sha256(file) != trace["sha256"]:
            lines.append(f"the {name} trace {trace['path']} was recorded again since")
    return lines


def largest_difference(first: Path, second: Path) -> float:
    """The largest absolute difference between the weights of two checkpoints.

    Raises:
        ValueError: they do not hold the same tensors, or stopped at different steps.
    """
    a, b = read_checkpoint(first), read_checkpoint(second)
    if a["global_step"] != b["global_step"] or a["state_dict"].keys() != b["state_dict"].keys():
        raise ValueError(
            f"{first} (step {a['global_step']}) and {second} (step {b['global_step']}) are not of one run"
        )
    pairs = ((a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)
