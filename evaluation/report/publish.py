"""Reports as W&B runs: tables, figures, the page, and what was measured with which files; exports on the hub.

Nothing is sent unless this is called, and WANDB_MODE=offline keeps everything on the disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certdraft.drafters import lint_export
from certdraft.evaluation.report.provenance import read_parts
from certdraft.support import hub_answers, hub_endpoint

_KINDS = {"report.json": "evaluation", "certify.json": "certificates", "compare.json": "comparison"}
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT = "run.yaml"  # names this machine and its paths
_CARD, _PLACE = "README.md", "PATH_OF_THIS_FOLDER"  # stands in a card until its place is known
Rows = tuple[Sequence[str], list[list[Any]]]


def headline_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers a sweep ranks decoders by, of the report's last drafter under its first decoder.

    Returns:
        "eval/tau" (replayed), "eval/coverage@4"; with a target also "eval/tau_decoded", "eval/speedup" and
        "eval/tokens_per_s".
    """
    name, entry = list(report["drafters"].items())[-1]
    found = {f"eval/coverage@{row['m']}": row["all"]["value"] for row in entry["acceptance"]["coverage"]}
    if entry["lengths"]:
        found["eval/tau"] = next(iter(entry["lengths"].values()))["tau"]["value"]
    methods = [m for m in (report["bench"] or {"methods": []})["methods"] if m["drafter"] == name]
    for key, label in (("tau", "tau_decoded"), ("speedup", "speedup"), ("tokens_per_s", "tokens_per_s")):
        if methods:
            found[f"eval/{label}"] = methods[0][key]["value"]
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def tables(report: Mapping[str, Any]) -> dict[str, Rows]:
    """Return report.json as tables of plain numbers: name → (columns, rows).

    "coverage" has one row per drafter and m; "by_margin" one per drafter, rule and margin bucket, with the
    number of steps and the certified and realised shares; "lengths" one per drafter and decoder; "decoding"
    the same, timed.
    """
    coverage, margins, lengths = [], [], []
    for name, entry in report["drafters"].items():
        for row in entry["acceptance"]["coverage"]:
            low = row["low_margin"] or {"value": None}
            coverage.append([name, row["m"], *_interval(row["all"]), low["value"]])
        for rule in entry["acceptance"]["rules"]:
            for bucket in rule["buckets"]:
                realised = (bucket["realised"] or {"value": None})["value"]
                shares = [bucket["steps"], bucket["certified"], realised]
                margins.append([name, rule["rule"], bucket["low"], bucket["high"], *shares])
        for builder, row in entry["lengths"].items():
            lengths.append([name, builder, *_interval(row["tau"]), row["nodes_per_pass"]])
    found: dict[str, Rows] = {
        "coverage": (("drafter", "m", "coverage", "low", "high", "low_margin_coverage"), coverage),
        "by_margin": (
            ("drafter", "rule", "margin_low", "margin_high", "steps", "certified", "realised"),
            margins,
        ),
        "lengths": (("drafter", "decoder", "tau", "low", "high", "nodes_per_pass"), lengths),
    }
    if report["bench"]:
        rows = [
            [m["drafter"], m["builder"], *_interval(m["tau"]), *_interval(m["speedup"])]
            + [m["tokens_per_s"]["value"]]
            for m in report["bench"]["methods"]
        ]
        columns: tuple[str, ...] = ("drafter", "decoder", "tau", "low", "high")
        columns += ("speedup", "speedup_low", "speedup_high", "tokens_per_s")
        found["decoding"] = (columns, rows)
    return found


def publish(
    folder: str,
    project: str = "certdraft",
    export: str | None = None,
    run: str | None = None,
    name: str | None = None,
    hub: str | None = None,
    private: bool = True,
) -> None:
    """Send a report to W&B, or an exported drafter to the Hugging Face hub.

    To W&B go the report's tables and figures, the page, and the drafter with what it was made from. With
    WANDB_MODE=offline, or without an account, nothing leaves the machine: `wandb sync` sends it later. With
    `hub` the drafter's folder is uploaded, model card included, and W&B is not asked.

    Args:
        folder: folder of a report that `certdraft evaluate`, `certify` or `compare` wrote; with `hub` that of
            an exported drafter.
        project: W&B project.
        export: folder of the exported drafter; becomes an artifact of type "model".
        run: folder of the training run it came from: its settings become the W&B run's, its traces are named
            in the artifact's lineage.
        name: of the W&B run; the folder's name when not given.
        hub: repository "USER/NAME" of the hub that the drafter is uploaded to.
        private: whether a repository that does not exist yet is made a private one.

    Raises:
        FileNotFoundError: no report in `folder`, no export, no run.
        ValueError: the hub cannot be reached or refuses, or the export is one that engines read wrongly.
    """
    if hub is not None:
        publish_to_hub(Path(export or folder), hub, private)
        return
    import wandb

    place = Path(folder)
    kind, report = _read(place)
    settings = _settings(run)
    with wandb.init(
        project=project,
        name=name or place.name,
        job_type=kind,
        dir=place,
        config=settings,
        reinit="create_new",
    ) as active:
        logged: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in sorted(place.glob("*.png"))}
        for page in sorted(place.glob("*.html")):
            logged[page.stem] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
        if kind == "evaluation":
            logged |= {n: wandb.Table(columns=list(c), data=rows) for n, (c, rows) in tables(report).items()}
            logged |= headline_metrics(report)
        active.log(logged)
        lineage = _traces(run, report)
        for trace in lineage:
            _use(active, wandb.Artifact(f"trace-{trace['sha256'][:12]}", "dataset", metadata=trace), trace)
        if export is not None:
            drafter = wandb.Artifact(
                f"drafter-{Path(export).name}", "model", metadata=_facts(export, lineage)
            )
            drafter.add_dir(export)
            active.log_artifact(drafter)
    print(f"published {place} to the W&B project {project}", file=sys.stderr)


def publish_to_hub(export: Path, repo: str, private: bool = True) -> str:
    """Upload an export in one commit, with a card that names the repository in its commands.

    Args:
        export: folder that `certdraft export` wrote; hidden files and run.yaml, which names this machine,
            stay here.
        repo: "USER/NAME" or "ORGANISATION/NAME"; made when it does not exist.
        private: for a repository that is made now.

    Returns:
        The commit's address.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for file in ("drafter.json", _CARD):
        if not (export / file).is_file():
            raise FileNotFoundError(
                f"{export / file}: no such file; give a folder that `certdraft export` wrote"
            )
    if not _REPO.fullmatch(repo):
        raise ValueError(f"--hub {repo!r} is no repository of the hub; give USER/NAME")
    if found := [finding for finding in lint_export(export) if finding.severity == "error"]:
        raise ValueError(f"{export} is not published: {found[0]} (`certdraft lint {export}` lists all)")
    if not hub_answers():
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no answer within five seconds"
        raise ValueError(f"the hub {hub_endpoint()} cannot be reached ({why}); nothing was uploaded")
    card = (export / _CARD).read_text(encoding="utf-8").replace(_PLACE, repo).encode()
    files = sorted(path for path in export.rglob("*") if path.is_file())
    names = {path: path.relative_to(export) for path in files}
    operations = [
        CommitOperationAdd(name.as_posix(), card if name.as_posix() == _CARD else str(path))
        for path, name in names.items()
        if name.as_posix() != _KEPT and not any(part.startswith(".") for part in name.parts)
    ]
    api = HfApi(endpoint=hub_endpoint(), library_name="certdraft")
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        done = api.create_commit(repo, operations, commit_message="Drafter exported by certdraft")
    except LocalTokenNotFoundError:
        raise ValueError(f"no token for {hub_endpoint()}: `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"the hub refuses to write to {repo} ({status}): `hf auth login` with a token that has write "
                "access there, or set HF_TOKEN"
            ) from None
        raise ValueError(f"the hub answers {status} for {repo}: {str(error).splitlines()[0]}") from None
    print(f"published {export} as {done.repo_url}", file=sys.stderr)
    return done.commit_url


def _read(place: Path) -> tuple[str, dict[str, Any]]:
    for file, kind in _KINDS.items():
        if (place / file).is_file():
            return kind, json.loads((place / file).read_text(encoding="utf-8"))
    raise FileNotFoundError(f"{place}: no {', '.join(_KINDS)} there; give the folder of a report")


def _settings(run: str | None) -> dict[str, Any]:
    if run is None:
        return {}
    import yaml

    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file; give the folder of a training run, runs/NAME/TIME")
    return {"cli": yaml.safe_load(config.read_text(encoding="utf-8"))}


def _traces(run: str | None, report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The traces a result is based on: of the run, then of the report; each with its hash."""
    parts = read_parts(Path(run)) if run else []
    found = [{"use": use, **trace} for use, trace in parts[-1]["data"].items()] if parts else []
    facts = report.get("provenance", {})
    if "sha-256 of trace.json" in facts:
        found.append({"use": "test", "path": facts["trace"], "sha256": facts["sha-256 of trace.json"]})
    return found


def _use(active: Any, artifact: Any, trace: Mapping[str, str]) -> None:
    """Puts a trace.json into the run's lineage; W&B cannot offline, and gets only the hash."""
    file = Path(trace["path"]) / "trace.json"
    if active.offline or not file.is_file():
        active.config.update({f"trace_{trace['use']}": trace["sha256"]})
        return
    artifact.add_file(str(file))
    active.use_artifact(artifact)


def _facts(export: str, lineage: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    file = Path(export) / "drafter.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give a folder that `certdraft export` wrote")
    return {**json.loads(file.read_text(encoding="utf-8")), "traces": [dict(trace) for trace in lineage]}


def _interval(value: Mapping[str, float]) -> list[float]:
    return [value["value"], value["low"], value["high"]]
