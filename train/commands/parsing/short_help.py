"""Help of fit, validate and test: the options that most runs set, the Trainer's at its end."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from docstring_parser import parse

from certdraft.data import TraceDataModule
from certdraft.train.drafter_module import DrafterModule
from certdraft.train.optim import OptimizerSettings

_PARTS = (
    ("what is trained", "model", DrafterModule),
    ("optimiser", "model.optimizer", OptimizerSettings),
    ("texts", "data", TraceDataModule),
)
_RUN = {
    "config": "YAML, or a name that `certdraft configs` lists; later ones stand above earlier ones",
    "name": "of the run; the config's when not given",
    "runs_dir": "parent of all run folders (default: runs)",
    "ckpt_path": "last, best or a file: go on from there",
    "print_config": "print all settings as YAML and exit",
}
_TRAINER = {
    "max_steps": "optimiser steps",
    "accelerator": "cpu, gpu or auto",
    "devices": "how many, on each machine",
    "precision": "32-true or bf16-mixed",
    "val_check_interval": "batches between two validations",
    "accumulate_grad_batches": "batches of one step",
}


def short_help(prog: str) -> str:
    """Return the options that most runs set."""
    lines = [f"usage: {prog} --config CONFIG [--OPTION VALUE ...]", "", "run:"]
    for name, told in _RUN.items():
        lines += _entry(f"--{name}", told)
    for title, prefix, part in _PARTS:
        lines += ["", f"{title}:"]
        for name, told in _arguments(part):
            lines += _entry(f"--{prefix}.{name}", told)
    lines += ["", "Lightning's Trainer, among others:"]
    for name, told in _TRAINER.items():
        lines += _entry(f"--trainer.{name}", told)
    lines += ["", f"every option, the Trainer's too: {prog} --help=all"]
    return "\n".join(lines) + "\n"


def _arguments(part: type) -> Iterator[tuple[str, str]]:
    """Name and meaning of each argument of a class, with its default where that is a plain value."""
    parameters = inspect.signature(part).parameters
    meanings = {
        found.arg_name: " ".join((found.description or "").split())
        for text in (part.__doc__, part.__init__.__doc__)
        for found in parse(text or "").params
    }
    for name, parameter in parameters.items():
        default: Any = parameter.default
        plain = isinstance(default, bool | int | float | str)
        yield name, meanings.get(name, "") + (f" (default: {default})" if plain else "")


def _entry(option: str, told: str) -> list[str]:
    width = min(110, shutil.get_terminal_size().columns)
    wrapped = textwrap.wrap(told, max(40, width - 32)) or [""]
    first = [f"  {option:28}  {wrapped[0]}"] if len(option) <= 28 else [f"  {option}", f"{'':32}{wrapped[0]}"]
    return first + [f"{'':32}{line}" for line in wrapped[1:]]
