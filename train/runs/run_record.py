"""run.yaml, the record of a run for programs; and `certdraft reproduce`, which runs it again and compares.

A run has one part per command that worked on it. A part says what was typed, from which sources, with which
packages, on which machine and on which traces (the sha-256 of each trace.json, which holds the hashes of its
shards). With config.yaml beside it that is all a run depends on.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from certdraft.evaluation import RECORD_FILE, provenance, read_parts, sha256, write_atomic

# What the numbers of a run depend on; the rest of the environment is listed in no record.
_PACKAGES = (
    "certdraft", "torch", "pytorch-lightning", "transformers", "tokenizers", "datasets", "peft",
    "safetensors", "numpy", "jsonargparse", "triton",
)  # fmt: skip


def write_part(folder: Path, traces: Mapping[str, str | Path]) -> None:
    """Appends this process's command to the run's record: run.yaml, and command.txt for people.

    Args:
        folder: the run's folder.
        traces: "train", "validation" → folder of the trace.
    """
    facts = provenance()
    part = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "source": facts["source"],
        "machine": facts["machine"],
        "python": platform.python_version(),
        "packages": _installed(),
        "data": {
            name: {"path": str(path), "sha256": sha256(Path(path) / "trace.json")}
            for name, path in traces.items()
        },
    }
    parts = [*read_parts(folder), part]
    write_atomic(folder / RECORD_FILE, yaml.safe_dump({"parts": parts}, sort_keys=False))
    with (folder / "command.txt").open("a", encoding="utf-8") as stream:
        stream.write("\n".join(f"{label}: {text}" for label, text in facts.items()) + "\n\n")


def changes(part: Mapping[str, Any]) -> list[str]:
    """What is not as it was when a part ran: packages, sources, traces. One line each."""
    facts, installed = provenance(), _installed()
    said = [
        f"{name} is {installed.get(name, 'not installed')}, was {old}"
        for name, old in part["packages"].items()
        if installed.get(name) != old
    ]
    for name, old in (("python", platform.python_version()), ("source", facts["source"])):
        if part[name] != old:
            said.append(f"{name} is {old}, was {part[name]}")
    if part["machine"] != facts["machine"]:
        said.append(f"the machine is {facts['machine']}, was {part['machine']}")
    for name, trace in part["data"].items():
        file = Path(trace["path"]) / "trace.json"
        if not file.is_file():
            said.append(f"the {name} trace {trace['path']} is gone; a config that can record makes it again")
        elif sha256(file) != trace["sha256"]:
            said.append(f"the {name} trace {trace['path']} was recorded anew since")
    return said


def reproduce(run: str, runs_dir: str = "runs", dry_run: bool = False) -> None:
    """Run a training run again from its own config, and compare the weights.

    What differs today (packages, sources, machine, traces) is said first. Afterwards the trained weights of
    both runs are compared; on the same machine with the same packages they are equal, bit for bit.

    Args:
        run: folder of a finished run.
        runs_dir: parent of the new run's folder, NAME-again.
        dry_run: only say what has changed and which command would run.

    Raises:
        FileNotFoundError: no run, or no last checkpoint to compare with.
        ValueError: a run without a record; or one whose weights came out differently.
    """
    from certdraft.train.commands import cli
    from certdraft.train.runs import run_folder

    folder = Path(run)
    parts = read_parts(folder)
    if not parts:
        raise ValueError(f"{folder} has no {RECORD_FILE}; give the folder of a run: runs/NAME/TIME")
    for line in changes(parts[-1]):
        print(f"changed: {line}", file=sys.stderr)
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    name = f"{settings['name']}-again"
    command = ["fit", "--config", str(folder / "config.yaml"), "--name", name, "--runs_dir", runs_dir]
    if Path(str((settings["trainer"] or {}).get("default_root_dir"))) == folder:
        command += ["--trainer.default_root_dir", "null"]  # the old run's folder, filled in by the old run
    print(shlex.join(["certdraft", *command]), file=sys.stderr)
    if dry_run:
        return
    before = folder / "checkpoints" / "last.ckpt"
    if not before.exists():
        raise FileNotFoundError(f"{before}: no such checkpoint, so nothing to compare with")
    cli.main(command)
    after = run_folder.find_checkpoint(Path(runs_dir) / name)
    assert after is not None
    largest = largest_difference(before, after)
    if largest > 0:
        raise ValueError(
            f"the weights of {after} differ from those of {before}, at most by {largest:.3g}; see the "
            "lines that begin with `changed` above, or set trainer.deterministic in the config"
        )
    print(f"reproduced: {after} has the weights of {before}, bit for bit")


def largest_difference(first: Path, second: Path) -> float:
    """The largest absolute difference between the weights of two checkpoints.

    Raises:
        ValueError: they do not hold the same tensors, or stopped at different steps.
    """
    import torch

    a, b = (torch.load(path, weights_only=True, map_location="cpu") for path in (first, second))
    if a["global_step"] != b["global_step"] or a["state_dict"].keys() != b["state_dict"].keys():
        raise ValueError(
            f"{first} (step {a['global_step']}) and {second} (step {b['global_step']}) are not of one run"
        )
    pairs = ((a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
