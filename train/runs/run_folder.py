"""Run folders: whose they are, what they hold, and whether a run may go on with today's settings.

runs/<name>/<time>/ holds config.yaml (resolved), command.txt and run.yaml (every command that worked on the
run, with versions and source state), checkpoints/ and metrics.csv. A resumed run goes on in its own folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from pytorch_lightning.utilities import rank_zero_only

from certdraft.train.runs.checkpoint_file import LAST, PREVIOUS, first_whole, read_checkpoint

# "pid:folder" of the process that named the run; read by the ranks that this process starts.
RUN_FOLDER_VARIABLE = "CERTDRAFT_RUN_FOLDER"

# What may change between the parts of one run: nothing that moves a weight.
FREE_KEYS = (
    "config", "ckpt_path", "weights_only", "name", "runs_dir", "allow_change", "checkpoint.*",
    "trainer.logger*", "trainer.callbacks*", "trainer.enable_*", "trainer.log_every_n_steps",
    "trainer.max_time", "trainer.profiler*", "trainer.num_sanity_val_steps", "trainer.default_root_dir",
    "trainer.barebones", "trainer.limit_val_batches", "trainer.limit_test_batches",
    "trainer.limit_predict_batches", "trainer.val_check_interval", "trainer.check_val_every_n_epoch",
    "trainer.detect_anomaly", "trainer.fast_dev_run", "trainer.plugins*", "trainer.model_registry",
    "model.init_args.validation.*", "data.init_args.test", "data.init_args.prefetch",
    "data.init_args.server.*",
)  # fmt: skip


class SettingsChanged(ValueError):
    """A checkpoint was to be continued with other settings than it was trained with."""


def new_run_folder(runs_dir: str | os.PathLike[str], name: str) -> Path:
    """Make a folder runs_dir/name/time that no other run uses; the other ranks of a job get its name.

    Jobs started by a cluster's launcher share no clock: their id takes the place of the time, and the folder
    may exist (see `refuse_other_run`).
    """
    parent, _, inherited = os.environ.get(RUN_FOLDER_VARIABLE, "").partition(":")
    if inherited and parent == str(os.getppid()) and is_other_rank():
        return Path(inherited)
    base = Path(runs_dir) / name
    base.mkdir(parents=True, exist_ok=True)
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":
        folder = base / f"job-{job}"
        folder.mkdir(exist_ok=True)
        return folder
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for count in itertools.count():
        folder = base / (f"{stamp}_{count}" if count else stamp)
        try:
            folder.mkdir(exist_ok=is_other_rank())
            return folder
        except FileExistsError:  # another run that began in the same second
            continue
    raise AssertionError


def is_other_rank() -> bool:
    """Whether this process is any rank of its job but the first."""
    return os.environ.get("LOCAL_RANK", "0") != "0" or getattr(rank_zero_only, "rank", 0) != 0


def pass_on(folder: Path) -> None:
    """Tell the processes this one starts, the other ranks, which folder the run has."""
    os.environ[RUN_FOLDER_VARIABLE] = f"{os.getpid()}:{folder}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; one that is still empty at the end is removed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another process; wait until it ends, or start a separate run "
            "(another --name, another --out, or no --ckpt_path)"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if {entry.name for entry in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def refuse_other_run(folder: Path, settings: Mapping[str, Any], resuming: bool) -> None:
    """Raise if a new run would mix with one that the folder holds already, as a job's folder may."""
    file = folder / "config.yaml"
    if file.exists() and not (resuming and not differences(read_yaml(file), settings)):
        raise ValueError(
            f"{folder} holds a run already{' of other settings' if resuming else ''}; go on with it by "
            "--ckpt_path last and its own config, or give this run another --name"
        )


def find_checkpoint(name_dir: str | os.PathLike[str], which: str = "last") -> Path | None:
    """The checkpoint of that kind of the newest run of one name; of a damaged `last` the one before it.

    Args:
        name_dir: runs_dir/name.
        which: "last", written every few steps, or "best" by the monitored metric.
    """
    names = (LAST, PREVIOUS) if which == "last" else (f"{which}.ckpt",)
    found = [path for name in names for path in Path(name_dir).glob(f"*/checkpoints/{name}")]
    if not found:
        return None
    newest = max(found, key=lambda path: (path.stat().st_mtime, path)).parent
    return first_whole(newest / name for name in names)


def run_folder(checkpoint: str | os.PathLike[str]) -> Path | None:
    """Return the run folder of a checkpoint, or None if the checkpoint was moved away."""
    folder = Path(checkpoint).parent
    return folder.parent if folder.name == "checkpoints" else None


def saved_config(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The resolved settings a checkpoint was trained with; empty when they are nowhere recorded."""
    folder = run_folder(checkpoint)
    if folder and (folder / "config.yaml").is_file():
        return read_yaml(folder / "config.yaml")
    return yaml.safe_load(_content(checkpoint).get("certdraft", {}).get("config", "")) or {}


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file} is damaged; restore it, or delete it to go on with the run: its checkpoints hold the "
            "same settings"
        )
    return settings


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Iterable[str] = FREE_KEYS
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: dotted key → (old, new). A missing key counts as None.

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
    """What a checkpoint holds, weights aside where it is sharded."""
    path = Path(checkpoint)
    file = path / "meta.pt" if path.is_dir() else path  # FSDP2 writes a folder
    return read_checkpoint(file, verify=False)


def refuse_changed(
    checkpoint: Path, new: Mapping[str, Any], allowed: Iterable[str] = (), only: str = ""
) -> None:
    """Raise unless this command has the settings the checkpoint was trained with.

    Args:
        checkpoint: what is to be continued or measured.
        new: settings of this command.
        allowed: patterns of keys that may differ, besides `FREE_KEYS`.
        only: prefix of the keys that matter.
    """
    old = saved_config(checkpoint)
    changed = differences(old, new, (*FREE_KEYS, *allowed)) if old else {}
    changed = {key: pair for key, pair in changed.items() if key.startswith(only)}
    if changed:
        instead = "Use the old values"
        if not only:
            instead += " to continue that run, leave --ckpt_path out to start a new one"
        rows = "".join(f"\n  {key}: {a!r} in the checkpoint, {b!r} now" for key, (a, b) in changed.items())
        raise SettingsChanged(
            f"{checkpoint} was trained with other settings:{rows}\n"
            f"{instead}, or permit a change that you mean: --allow_change '[{', '.join(changed)}]'."
        )
