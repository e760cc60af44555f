"""`certdraft doctor`: check this machine before a long run does."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "problem"]
_PACKAGES = (
    "torch", "pytorch-lightning", "transformers", "datasets", "peft", "jsonargparse", "safetensors", "wandb"
)  # fmt: skip
_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, its status, and what was found or is to be done."""

    what: str
    status: Status
    found: str


def doctor(
    target: str | None = None,
    fit_config: str | None = None,
    directory: str = "runs",
    as_json: bool = False,
    hub: bool = True,
) -> None:
    """Check versions, devices, disk, hub access and the names on PATH; exit code 1 when something will fail.

    Args:
        target: also check whether this target can be loaded: "embedded", a folder or a hub name.
        fit_config: also check whether `certdraft fit` would start with this config: classes and arguments,
            the traces it names or how they would be recorded, and whether drafter, target and traces fit
            together. No weights are read.
        directory: where runs will be written; its disk is checked.
        as_json: print JSON for programs.
        hub: try to reach the Hugging Face hub (one request, 5 seconds at most).

    Raises:
        SystemExit: code 1 when there is a problem.
    """
    findings = [*packages(), command_name(), *devices(), disk(Path(directory))]
    findings += [hub_access()] if hub else []
    findings += [target_access(target)] if target else []
    findings += [config_resolves(fit_config)] if fit_config else []
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    if any(finding.status == "problem" for finding in findings):
        raise SystemExit(1)


def packages() -> list[Finding]:
    """Python and the packages certdraft depends on, against the ranges it declares."""
    from packaging.requirements import Requirement

    declared = {r.name: r for r in map(Requirement, distribution("certdraft").requires or ()) if not r.marker}
    findings = [Finding("Python", "ok", platform.python_version())]
    for name in _PACKAGES:
        found = _version(name)
        if found is None:
            findings.append(
                Finding(name, "problem", f"not installed; pip install '{declared.get(name, name)}'")
            )
            continue
        wanted = declared.get(name)
        fits = wanted is None or wanted.specifier.contains(found, prereleases=True)
        text = found if fits else f"{found}, but certdraft is made for {wanted}"
        findings.append(Finding(name, "ok" if fits else "problem", text))
    if _version("lightning"):
        text = "the package `lightning` is installed too: its classes are not those of pytorch_lightning; " \
            "a config must not name lightning.pytorch.…"  # fmt: skip
        findings.append(Finding("lightning", "note", text))
    return findings


def command_name() -> Finding:
    """Which package owns the command `lightning` on PATH."""
    found = shutil.which("lightning")
    if found is None:
        return Finding("lightning command", "note", "not on PATH; `certdraft` is the same program")
    try:
        text = Path(found).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return Finding("lightning command", "note", f"{found} cannot be read: {error.strerror}")
    if "certdraft" in text:
        return Finding("lightning command", "ok", f"{found} is certdraft")
    return Finding(
        "lightning command", "note", f"{found} belongs to another package; type `certdraft` instead"
    )


def devices() -> list[Finding]:
    """Accelerators and cores."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [Finding("CPU", "ok", f"{cores} CPU cores, {torch.get_num_threads()} torch threads")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = "" if torch.cuda.is_bf16_supported() else ", no bfloat16"
        text = f"{facts.name}, {free / _GB:.1f} of {total / _GB:.1f} GB free{bf16}"
        findings.append(Finding(f"cuda:{index}", "ok", text))
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no device or driver"
        findings.append(Finding("CUDA", "note", f"none ({built}); targets beyond 1 B parameters want one"))
    return findings


def disk(directory: Path) -> Finding:
    """Free space where runs are written, and whether writing works."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / _GB
    if not os.access(place, os.W_OK):
        return Finding("disk", "problem", f"{place} is not writable; choose another with --runs_dir")
    text = f"{free:.0f} GB free at {place} (a trace takes about 0.2 GB per million tokens)"
    return Finding("disk", "ok" if free > 5 else "note", text)


def hub_access() -> Finding:
    """Whether the hub answers, and whether a token is set."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "note", "offline by HF_HUB_OFFLINE; only local folders and cached models load")
    host = constants.ENDPOINT.partition("//")[2].partition("/")[0]
    name, _, port = host.partition(":")
    start = time.monotonic()
    try:
        socket.create_connection((name, int(port or 443)), timeout=5).close()
    except OSError as error:
        text = (
            f"{host} is not reachable ({error.strerror or error}); local folders and cached models still load"
        )
        return Finding("hub", "note", text)
    token = "token set" if get_token() else "no token: gated models need `hf auth login`"
    return Finding("hub", "ok", f"{host} answers in {1000 * (time.monotonic() - start):.0f} ms, {token}")


def target_access(target: str) -> Finding:
    """Whether the target's config and tokenizer load; no weights are read."""
    from certdraft.data import load_tokenizer, target_config, tokenizer_fingerprint
    from certdraft.support import facts_of

    label = f"target {target}"

    def check() -> str:
        config = target_config(target)
        print_ = tokenizer_fingerprint(load_tokenizer(target))
        return f"{config.model_type}, vocabulary {facts_of(config).vocab_size:,}, tokenizer {print_[:12]}"

    return _attempt(label, check)


def config_resolves(config: str) -> Finding:
    """Whether `certdraft fit --config` would start: the file is accepted, and what it names fits together."""

    def check() -> str:
        import yaml

        from certdraft.train.commands.cli import captured
        from certdraft.train.commands.preflight import preflight

        code, settings, complaint = captured(["fit", "--config", config, "--print_config"])
        if code:
            raise ValueError(complaint.strip() or "refused")
        return "accepted; " + ", ".join(preflight(yaml.safe_load(settings)))

    return _attempt(f"config {config}", check)


def _attempt(label: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(label, "ok", check())
    except (OSError, ValueError) as error:
        return Finding(label, "problem", " ".join(str(error).split()))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    signs = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[red]✗[/]"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for finding in findings:
        table.add_row(signs[finding.status], finding.what, finding.found)
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    problems = sum(finding.status == "problem" for finding in findings)
    console.print(f"{problems} problem{'s' * (problems != 1)}" if problems else "ready")
