"""`certdraft sweep`: check a W&B sweep file, and run it here without W&B.

The same YAML serves `wandb sweep` with `wandb agent`, which need an account, and this command, which needs
none. Both turn a point of the sweep into the same arguments.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from certdraft.support import write_json
from certdraft.train.runs.run_folder import held

_KEYS = {
    "program", "command", "method", "metric", "parameters", "name", "description", "early_terminate",
    "project", "entity", "run_cap",
}  # fmt: skip
_DISTRIBUTIONS = {"uniform", "log_uniform_values", "int_uniform", "q_uniform", "q_log_uniform_values"}
_PROGRAMS = ("lightning", "certdraft")
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # YAML 1.1 reads 1e-5 as a word


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file.

    Attributes:
        path: where it was read.
        method: "grid", "random" or "bayes".
        metric: name of the metric, as the runs log it.
        maximize: whether more is better.
        parameters: option → its W&B description: `value`, `values`, or `min` and `max` with a distribution.
        command: argument list with W&B's macros.
        run_cap: most runs; None without a limit.
    """

    path: Path
    method: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]
    command: tuple[str, ...]
    run_cap: int | None = None

    def points(self, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """The points to try: the whole grid, or `count` random draws (also for W&B's Bayesian method).

        Args:
            count: most points; `run_cap` when not given.
            seed: of the draws.

        Raises:
            ValueError: the grid was asked of a range, or no count was given for draws.
        """
        count = self.run_cap if count is None else count
        if self.method == "grid":
            if ranges := [name for name, spec in self.parameters.items() if not _choices(spec)]:
                raise ValueError(f"{self.path}: a grid needs `values` for {', '.join(ranges)}, not a range")
            grid = product(*(_choices(spec) for spec in self.parameters.values()))
            return [dict(zip(self.parameters, point, strict=True)) for point in grid][:count]
        if count is None:
            raise ValueError(
                f"{self.path}: method {self.method} has no end; say how many runs: --count 10, or run_cap"
            )
        rng = random.Random(seed)
        return [{name: _draw(spec, rng) for name, spec in self.parameters.items()} for _ in range(count)]

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """The arguments after the program's name, as W&B's agent passes them for a point."""
        flags = [f"--{name}={value}" for name, value in point.items()]
        words = [word for word in self.command if word != "${env}"][1:]
        return [part for word in words for part in (flags if word == "${args}" else [word])]


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file."""
    file = Path(path)
    try:
        content = _numbers(yaml.safe_load(file.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a sweep is a mapping with method, metric, parameters and command")
    if unknown := sorted(content.keys() - _KEYS):
        raise ValueError(f"{file}: no sweep has the key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    if content.get("method") not in ("grid", "random", "bayes"):
        raise ValueError(f"{file}: method is {content.get('method')!r}; give grid, random or bayes")
    metric = content.get("metric") or {}
    if not isinstance(metric.get("name"), str) or metric.get("goal") not in ("maximize", "minimize"):
        raise ValueError(f"{file}: metric needs a name and a goal, maximize or minimize; got {metric}")
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{file}: parameters is empty; name at least one option to vary")
    for name, spec in parameters.items():
        _check_parameter(file, name, spec)
    command = tuple(str(word) for word in content.get("command") or ())
    command = tuple(str(content.get("program")) if word == "${program}" else word for word in command)
    words = [word for word in command if word != "${env}"]
    if not words or words[0] not in _PROGRAMS or "${args}" not in words:
        raise ValueError(
            f"{file}: command must call {' or '.join(_PROGRAMS)} (also as ${{program}}) and pass ${{args}} "
            'on, as in ["${env}", lightning, fit, --config, configs/demo.yaml, "${args}"]; the other macros '
            "write options in ways this program does not read"
        )
    cap = content.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ValueError(f"{file}: run_cap is {cap!r}; give a number of runs, at least 1")
    maximize = metric["goal"] == "maximize"
    return Sweep(file, content["method"], metric["name"], maximize, parameters, command, cap)


def sweep(
    file: str,
    out: str | None = None,
    count: int | None = None,
    seed: int = 0,
    wandb: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Run a W&B sweep file on this machine, one run after another, without W&B.

    With an account: `wandb sweep FILE`, then `wandb agent ID` on as many machines as you like. Here: every
    point is checked against the options of the command before the first run starts. A sweep that was cut off
    goes on with the same `--out`: finished runs are kept.

    Args:
        file: the sweep, as in configs/sweeps.
        out: folder for the runs and sweep.json; runs/sweeps/NAME/TIME if not given.
        count: most runs; for random and bayes (which is a random search here) this or the file's `run_cap` is
            needed.
        seed: of random draws.
        wandb: send the runs to W&B where their config has its logger; otherwise its files stay in the runs'
            folders, for `wandb sync`.
        dry_run: only print the commands, after checking them.

    Returns:
        Path of sweep.json, or None for a dry run.

    Raises:
        FileNotFoundError: no such sweep.
        ValueError: a wrong key, an option the command does not have, another sweep's folder, or failed runs.
    """
    plan = read_sweep(file)
    points = plan.points(count, seed)
    for point in points:
        _check_command(plan, point)
    if dry_run:
        for point in points:
            print(shlex.join(["certdraft", *plan.arguments(point)]))
        return None
    folder = Path(out or f"runs/sweeps/{plan.path.stem}/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        rows = _run_all(plan, points, folder, {} if wandb else {"WANDB_MODE": "offline"})
    _print_table(plan, rows)
    print(f"sweep: {folder / 'sweep.json'}", file=sys.stderr)
    if failed := [row for row in rows if row["exit_status"]]:
        raise ValueError(
            f"{len(failed)} of {len(rows)} runs failed; the first is {failed[0]['folder']}. Their messages "
            f"are above; `certdraft sweep --file {plan.path} --out {folder}` repeats the failed runs only"
        )
    return folder / "sweep.json"


def _run_all(
    plan: Sweep, points: list[dict[str, Any]], folder: Path, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Run the points that no earlier part of the sweep finished; the rows of sweep.json."""
    record = folder / "sweep.json"
    rows: list[dict[str, Any]] = []
    if record.exists():
        rows = _finished(record, plan)
    elif any(entry.name != ".lock" for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and no sweep's; name another folder with --out")
    for number, point in enumerate(points, start=1):
        if any(row["point"] == point for row in rows):
            continue
        print(f"[{number}/{len(points)}] {_label(point)}", file=sys.stderr)
        where = folder / f"run-{number:03d}"
        status = _run(plan.arguments(point), where, environment)
        if status == 130:
            raise KeyboardInterrupt
        value = best_value(where, plan.metric, plan.maximize) if status == 0 else None
        rows.append({"point": point, plan.metric: value, "exit_status": status, "folder": str(where)})
        write_json(record, {"sweep": str(plan.path), "metric": plan.metric, "runs": rows})
    return rows


def best_value(folder: Path, metric: str, maximize: bool) -> float | None:
    """The best value of a metric in a run's metrics.csv or report.json; None when it was never measured."""
    values: list[float] = []
    for file in folder.rglob("metrics.csv"):
        with file.open(newline="", encoding="utf-8") as stream:
            values += [float(row[metric]) for row in csv.DictReader(stream) if row.get(metric)]
    for file in folder.rglob("metrics.json"):
        found = json.loads(file.read_text(encoding="utf-8")).get(metric)
        values += [float(found)] if found is not None else []
    values = [value for value in values if math.isfinite(value)]
    return (max if maximize else min)(values, default=None)


def _check_parameter(file: Path, name: str, spec: Any) -> None:
    if not isinstance(spec, dict) or not spec.keys() & {"value", "values", "min"}:
        raise ValueError(f"{file}: parameter {name} needs `value`, `values`, or `min` and `max`; got {spec}")
    if any(value is None for value in _choices(spec)):
        raise ValueError(
            f"{file}: parameter {name} has the value null, which W&B passes on as the word None; leave it out"
        )
    if not _choices(spec):
        distribution = spec.get("distribution", "uniform")
        ends = [spec.get("min"), spec.get("max")]
        if not all(isinstance(end, int | float) for end in ends) or distribution not in _DISTRIBUTIONS:
            raise ValueError(
                f"{file}: parameter {name} needs numbers min, max and a distribution out of "
                f"{', '.join(sorted(_DISTRIBUTIONS))}; got {spec}"
            )


def _numbers(content: Any) -> Any:
    """The content of a YAML file, with numbers such as 1e-5 as numbers."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_numbers(value) for value in content]
    return float(content) if isinstance(content, str) and _FLOAT.fullmatch(content) else content


def _choices(spec: Mapping[str, Any]) -> list[Any]:
    return list(spec["values"]) if "values" in spec else [spec["value"]] if "value" in spec else []


def _draw(spec: Mapping[str, Any], rng: random.Random) -> Any:
    if choices := _choices(spec):
        return rng.choice(choices)
    low, high = spec["min"], spec["max"]
    whole = isinstance(low, int) and isinstance(high, int)
    distribution = spec.get("distribution", "int_uniform" if whole else "uniform")
    if "log" in distribution:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
    else:
        value = rng.uniform(low, high + 1 if distribution == "int_uniform" else high)
    if distribution == "int_uniform":
        return min(int(value), high)
    return round(value / spec["q"]) * spec["q"] if distribution.startswith("q_") else value


def _check_command(plan: Sweep, point: Mapping[str, Any]) -> None:
    """Raise unless the command itself accepts the point."""
    from certdraft.train.commands.cli import captured

    code, _, complaint = captured([*plan.arguments(point), "--print_config"])
    if code:
        raise ValueError(f"{plan.path}: the point {_label(point)} is refused: {complaint.strip()}")


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Exit code of one run in its own process, its results under `folder`."""
    place = ["--out", str(folder)] if arguments[0] == "evaluate" else ["--runs_dir", str(folder)]
    try:
        command = [sys.executable, "-m", "certdraft", *arguments, *place]
        return subprocess.run(command, env={**os.environ, **environment}).returncode
    except KeyboardInterrupt:
        return 130


def _finished(record: Path, plan: Sweep) -> list[dict[str, Any]]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}); move it away to run the sweep again") from error
    if Path(content["sweep"]).name != plan.path.name or content["metric"] != plan.metric:
        raise ValueError(f"{record} belongs to the sweep {content['sweep']}; name another folder with --out")
    return [row for row in content["runs"] if row["exit_status"] == 0]


def _label(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in point.items())


def _ranked(plan: Sweep, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    sign = -1 if plan.maximize else 1
    measured = [row for row in rows if row[plan.metric] is not None]
    yield from sorted(measured, key=lambda row: sign * row[plan.metric])
    yield from (row for row in rows if row[plan.metric] is None)


def _print_table(plan: Sweep, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.path.stem}: best {plan.metric} of each run")
    for name in plan.parameters:
        table.add_column(name.replace("model.", "").replace("init_args.", ""), overflow="fold")
    table.add_column(plan.metric, justify="right")
    for row in _ranked(plan, rows):
        value = row[plan.metric]
        shown = f"{value:.4f}" if value is not None else f"failed ({row['exit_status']})"
        table.add_row(*(str(row["point"][name]) for name in plan.parameters), shown)
    Console().print(table)
