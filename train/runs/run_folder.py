"""Run folders, and whether a checkpoint may be continued with today's settings.

runs/<name>/<time>/ holds config.yaml (resolved), command.txt (every command that worked on the run, with
versions and source state), checkpoints/ and metrics.csv. A run that is resumed goes on in its own folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

# "pid:folder" of the process that named the run; heeded by the ranks that this process starts.
RUN_FOLDER_VARIABLE = "CERTDRAFT_RUN_FOLDER"

# What may change between the parts of one run: nothing that moves a weight.
FREE_KEYS = (
    "config", "ckpt_path", "weights_only", "name", "runs_dir", "allow_change", "checkpoint.*",
    "trainer.logger*", "trainer.callbacks*", "trainer.enable_*", "trainer.log_every_n_steps",
    "trainer.max_time", "trainer.profiler*", "trainer.num_sanity_val_steps", "trainer.default_root_dir",
    "trainer.barebones", "trainer.limit_val_batches", "trainer.limit_test_batches",
    "trainer.limit_predict_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch",
    "trainer.detect_anomaly", "trainer.fast_dev_run", "trainer.plugins*", "trainer.model_registry",
    "model.init_args.validation.*", "data.init_args.num_workers", "data.init_args.pin_memory",
)  # fmt: skip


class SettingsChanged(ValueError):
    """A checkpoint was to be continued with other settings than it was trained with."""


def new_run_folder(runs_dir: str | os.PathLike[str], name: str) -> Path:
    """A folder runs_dir/name/time that no other run uses; the same one for all ranks of a job.

    Nothing is created. Jobs started by a cluster's launcher share no clock: their id stands for the time.
    """
    parent, _, inherited = os.environ.get(RUN_FOLDER_VARIABLE, "").partition(":")
    if inherited and parent == str(os.getppid()) and os.environ.get("LOCAL_RANK", "0") != "0":
        return Path(inherited)
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    stamp = f"job-{job}" if job and job != "none" else datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    base = Path(runs_dir) / name
    folder, count = base / stamp, 1
    while not job and folder.exists():
        folder, count = base / f"{stamp}_{count}", count + 1
    return folder


def pass_on(folder: Path) -> None:
    """Tells the processes this one starts, the other ranks, which folder the run has."""
    os.environ[RUN_FOLDER_VARIABLE] = f"{os.getpid()}:{folder}"


def find_checkpoint(name_dir: str | os.PathLike[str], which: str = "last") -> Path | None:
    """The newest checkpoint of that kind among the runs of one name.

    Args:
        name_dir: runs_dir/name.
        which: "last", written every few steps, or "best" by the monitored metric.
    """
    found = Path(name_dir).glob(f"*/checkpoints/{which}.ckpt")
    return max(found, key=lambda path: (path.stat().st_mtime, path), default=None)


def run_folder(checkpoint: str | os.PathLike[str]) -> Path | None:
    """The run folder a checkpoint lies in, or None for a checkpoint that was moved away."""
    folder = Path(checkpoint).parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def saved_config(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The resolved settings a checkpoint was trained with; empty when nobody wrote them down."""
    if folder := run_folder(checkpoint):
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return yaml.safe_load(_content(checkpoint).get("certdraft", {}).get("config", "")) or {}


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str] = FREE_KEYS
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted key → (old, new). A missing key counts as None.

    Args:
        old: settings of the checkpoint.
        new: settings of this command.
        free: patterns of keys that may differ.

    Examples:
        >>> differences({"trainer": {"max_steps": 5, "logger": True}}, {"trainer": {"max_steps": 9}})
        {'trainer.max_steps': (5, 9)}
    """
    from certdraft.evaluation import flatten_settings

    before, after = flatten_settings(old), flatten_settings(new)
    patterns = tuple(free)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(fnmatchcase(key, pattern) for pattern in patterns)
    }


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """Optimiser steps a checkpoint has behind it."""
    return int(_content(checkpoint).get("global_step", 0))


def _content(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, weights aside where it is sharded; empty where nothing is."""
    import torch

    path = Path(checkpoint)
    file = path / "meta.pt" if path.is_dir() else path  # FSDP2 writes a folder
    return torch.load(file, weights_only=True, map_location="cpu", mmap=True) if file.is_file() else {}


def refuse_changed(
    checkpoint: Path, new: Mapping[str, Any], allowed: Iterable[str] = (), only: str = ""
) -> None:
    """Raises unless this command has the settings the checkpoint was trained with.

    Args:
        checkpoint: what is to be continued or measured.
        new: settings of this command.
        allowed: patterns of keys that may differ, besides `FREE_KEYS`.
        only: prefix of the keys that matter.

    Raises:
        SettingsChanged: some differ; all of them are listed, with both values.
    """
    old = saved_config(checkpoint)
    changed = differences(old, new, (*FREE_KEYS, *allowed)) if old else {}
    changed = {key: pair for key, pair in changed.items() if key.startswith(only)}
    if changed:
        rows = "".join(f"\n  {key}: {a!r} in the checkpoint, {b!r} now" for key, (a, b) in changed.items())
        raise SettingsChanged(
            f"{checkpoint} was trained with other settings:{rows}\n"
            "Use the old values to continue that run, leave --ckpt_path out to start a new one, or permit a "
            f"change that you mean: --allow_change '[{', '.join(changed)}]'."
        )
