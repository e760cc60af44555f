"""`certdraft demo`: everything on the embedded target, from its text to an exported drafter."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import certdraft
from certdraft.data import Recording, load_target, load_tokenizer, open_trace, record_trace
from certdraft.decoding import BestFirst, Chain, CostAware
from certdraft.evaluation import run_evaluate, run_profile
from certdraft.train.commands import lightning_cli
from certdraft.train.commands.export_command import export_run
from certdraft.train.commands.preflight import recording_of
from certdraft.train.runs import run_folder

# Changes to the config: the baseline has another loss and no weights, the other drafter is the config's.
LOSSES = {"hard-ce": ("--model.loss", "HardCE", "--model.step_weights", "null"), "runner-up": ()}


def demo(
    out: str = "runs/demo",
    recipe: str | None = None,
    test_rows: int = 48,
    prompts: int = 10,
    draft_length: int = 4,
) -> Path:
    """Record a target, train two drafters on it, certify, decode, export: all of certdraft in minutes.

    The embedded target's greedy text is recorded, a drafter is trained with hard cross-entropy and one with
    the certificate-derived loss for best-first trees (same steps, seed and start), both are exported, loaded
    again, and compared on held-out text, by chain, by best-first tree and by a cost-aware tree. What an
    earlier demo finished is used again.

    Args:
        out: folder for traces, runs, exports and reports.
        recipe: config of both runs; the demo.yaml that ships with certdraft when not given.
        test_rows: most rows of the test split to record.
        prompts: prompts decoded for real.
        draft_length: draft tokens a round, written into the exports.

    Returns:
        Path of the report.
    """
    start, console = time.monotonic(), Console(stderr=True, highlight=False)
    transformers_logging.disable_progress_bar()  # a bar for each of a dozen tiny models
    transformers_logging.set_verbosity_error()
    folder = Path(out)
    file = Path(recipe) if recipe else Path(certdraft.__file__).parent / "configs" / "demo.yaml"

    exports = {}
    for number, (name, changes) in enumerate(LOSSES.items(), start=1):
        _say(console, number, f"train a drafter: {name}")
        exports[name] = folder / "exports" / name
        run = _fit(file, folder, name, changes)
        with console.status("exporting"):
            export_run(str(run), str(exports[name]), draft_length=draft_length, name=name, overwrite=True)

    _say(console, 3, "measure what drafting and verifying cost on this machine")
    cost = folder / "cost.json"
    target = _recording(run_folder.run_folder(run) or folder).target
    run_profile(
        str(exports["runner-up"]), target, str(cost), contexts=[32, 96],
        nodes=[0, 1, 2, 4, 8, 16, 32], repeats=12, device="cpu", overwrite=True,
    )  # fmt: skip

    _say(console, 4, "record the test text, and compare both drafters on it")
    recording = _recording(run_folder.run_folder(run) or folder)
    test = folder / "traces" / "test"
    _record_test(test, recording, test_rows)
    report = folder / "reports" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    page = run_evaluate(
        str(report), {name: str(path) for name, path in exports.items()}, str(test), recording.target,
        prompts=prompts, replay_documents=2 * prompts, device="cpu", title="certdraft demo",
        builders=[Chain(4), BestFirst(16, max_depth=8), CostAware(cost, budget=32)],
    )  # fmt: skip
    data = json.loads((report / "report.json").read_text(encoding="utf-8"))

    _say(console, 5, "draft for transformers' own generate() with the exported folder")
    same = assisted_equals_greedy(recording.target, exports["runner-up"], test)

    out_console = Console(highlight=False)
    out_console.print(decoders(data))
    out_console.print(_difference(data))
    out_console.print(_verdict(data, same))
    out_console.print(f"report    {page}\nexported  {exports['runner-up']}")
    out_console.print(f"took      {time.monotonic() - start:.0f} s")
    return page


def decoders(data: dict[str, Any]) -> Table:
    """Chain, tree and cost-aware tree side by side: acceptance length, draft tokens, speed."""
    bench = data["bench"]
    shown = Table(title=f"decoding {bench['prompts']} of its prompts, plainly: 1.00×")
    for title in ("loss", "decoder"):
        shown.add_column(title, no_wrap=True)
    for title in ("τ", "draft tokens a pass", "speed-up"):
        shown.add_column(title, justify="right")
    for row in bench["methods"]:
        numbers = [f"{row['tau']['value']:.2f}", f"{row['nodes_per_pass']:.1f}"]
        shown.add_row(row["drafter"], row["builder"], *numbers, f"{row['speedup']['value']:.2f}×")
    return shown


@torch.inference_mode()
def assisted_equals_greedy(
    target: str, drafter: Path, trace: Path, prompts: int = 2, tokens: int = 32
) -> bool:
    """Whether transformers writes the target's greedy text when the exported drafter assists it."""
    from transformers import AutoModelForCausalLM

    model: Any = load_target(target)
    assistant = AutoModelForCausalLM.from_pretrained(drafter)
    words = load_tokenizer(target)
    plain = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": words.pad_token_id or 0}
    rows = open_trace(trace)
    for index in range(min(prompts, len(rows))):
        row = rows.row(index)
        length = int(row.loss_mask.int().argmax()) + 1
        ids = row.input_ids[:length].long()[None]
        mask = torch.ones_like(ids)
        alone = model.generate(ids, attention_mask=mask, **plain)
        helped = model.generate(ids, attention_mask=mask, assistant_model=assistant, **plain)
        if not torch.equal(alone, helped):
            return False
    return True


def _fit(config: Path, folder: Path, name: str, changes: Sequence[str]) -> Path:
    """The last checkpoint of a training run as the command line starts it."""
    traces = {"train": folder / "traces" / "train", "validation": folder / "traces" / "validation"}
    typed = ["--config", str(config), "--name", name, "--runs_dir", str(folder), *changes]
    typed += [f"--data.{split}={path}" for split, path in traces.items()]
    try:
        lightning_cli.run("fit", [*typed, "--ckpt_path", "last"], "certdraft fit")
    except run_folder.SettingsChanged:  # the earlier demo was another one
        lightning_cli.run("fit", typed, "certdraft fit")
    found = run_folder.find_checkpoint(folder / name, "last")
    assert found is not None
    return found


def _recording(run: Path) -> Recording:
    """The settings with which the run's traces were recorded."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return recording_of(settings["data"]["init_args"]["record"])


def _record_test(folder: Path, recording: Recording, rows: int) -> None:
    corpus = replace(recording.corpus, split="test", max_rows=rows)
    generation = replace(recording.generation, corpus_positions=False)
    made = replace(recording, corpus=corpus, generation=generation)
    record_trace(str(folder), **{f.name: getattr(made, f.name) for f in fields(made)}, accelerator="cpu")


def _difference(data: dict[str, Any]) -> str:
    """Paired comparisons: low-margin coverage, where the text has such positions, and every τ."""
    lines = []
    for row in data["comparisons"]:
        kind, _, builder = row["quantity"].partition("/")
        found = row["difference"]
        if kind == "low_margin_coverage@4":
            name, scale, unit, digits = "coverage@4 where the margin is below 0.1", 100, " points", 1
        elif kind == "tau":
            name, scale, unit, digits = f"τ {builder}", 1, "", 3
        else:
            continue
        low, middle, high = (f"{scale * found[key]:+.{digits}f}" for key in ("low", "value", "high"))
        lines.append(f"  {name}: {middle}{unit} [{low}, {high}]")
    first = data["comparisons"][0]
    title = f"{first['drafter']} − {first['baseline']}, 95 % intervals over the same texts"
    return "\n".join(["", title, *lines])


def _verdict(data: dict[str, Any], same: bool) -> str:
    bench = data["bench"]
    texts = sum(row["equal_texts"] for row in bench["methods"])
    of = bench["prompts"] * len(bench["methods"])
    steps = sum(
        b["steps"] for b in next(iter(data["drafters"].values()))["acceptance"]["rules"][0]["buckets"]
    )
    return (
        f"lossless  {texts} of {of} speculative texts equal the target's own greedy text, "
        f"generate(assistant_model) {'too' if same else 'DOES NOT'}\n"
        f"certified 0 certified steps were rejected, of {steps:,} steps and every rule"
    )


def _say(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/5 {text}[/bold]")
