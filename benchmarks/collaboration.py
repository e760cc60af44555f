"""Collaborative arbitration on a real pair: SmolLM2-135M-Instruct, and a drafter fine-tuned on arithmetic.

    certdraft real                                        # fetches the target
    python benchmarks/collaboration.py --run runs/real    # about an hour on one core

The target is poor at arithmetic and answers simple questions; the drafter, four of its layers, is
fine-tuned by `certdraft fit` on 150 sums and differences, which it learns by heart, and on a few of the
target's own answers to other questions. No loss is masked and no answer spoiled. A policy is trained on
whether answers were right and measured on other problems: sums that the drafter has learned as well, and
questions that neither has seen.
The *null* pair has a noisy copy of the target as drafter: it is better at nothing.

Every finished stage is kept in RUN/collaboration; a killed run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from collaboration_problems import SKILL, SYSTEM, arithmetic, general
from transformers import PreTrainedModel

from certdraft.arbitration import (
    ArbitrationEnv,
    ArbitrationResult,
    ArbitrationSettings,
    Lockstep,
    Problem,
    as_text,
    load_policy,
    measure_arbitration,
    open_env,
    summarise,
    verify_all,
)
from certdraft.arbitration.arbitration_report import Arm
from certdraft.arbitration.tasks.problems import prompt_texts
from certdraft.data import eos_ids_of, load_target, load_tokenizer
from certdraft.evaluation import pooled_ratio, provenance
from certdraft.support import appearing_folder, write_json, write_text
from certdraft.train.commands.cli import main as certdraft
from certdraft.train.commands.export_command import export_run
from certdraft.train.commands.real import target_of
from certdraft.train.runs.run_folder import find_checkpoint

CONFIGS = Path("configs/collaboration")
NOISE = 0.1  # of each weight matrix of the null drafter, in units of its standard deviation
LONG = 64  # tokens: whether the target fails for want of room


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--null_seeds", type=int, help="of the null pair; as many when not given")
    parser.add_argument("--pairs", type=int, help="drafters; one per seed when not given")
    parser.add_argument("--steps", type=int, default=500, help="of each fine-tuning")
    parser.add_argument("--policy_steps", type=int, default=160)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/collaboration.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    name = args.target or target_of(args.run)
    work = args.run / "collaboration"
    work.mkdir(parents=True, exist_ok=True)
    target = str(stage(work / "target", lambda out: save_target(out, name)))
    policy_config = yaml.safe_load((CONFIGS / "policy.yaml").read_text())
    texts = ArbitrationSettings(**policy_config["model"]["init_args"]["texts"])
    asked = {part: arithmetic(part) for part in ("train", "policy", "test")}
    parts = {"train": general("train") + asked["train"]}  # the others are half arithmetic, half general
    parts |= {part: general(part)[: len(asked[part])] + asked[part] for part in ("policy", "test")}
    for part in ("policy", "test"):
        rows = [json.dumps(as_row(problem)) + "\n" for problem in parts[part]]
        write_text(work / f"{part}.jsonl", "".join(rows))
    stage(work / "corpus.jsonl", lambda file: write_corpus(file, target, texts, parts["train"]))
    seeds = {"pair": args.seeds, "null": args.null_seeds or args.seeds}
    results = {kind: measured_kind(kind, n, args, work, target, texts, parts) for kind, n in seeds.items()}
    alone = stage(work / "target-alone.json", lambda file: write_alone(file, target, texts, parts["test"]))
    write_report(args, work, name, texts, alone, results)


def measured_kind(
    kind: str, num_seeds: int, args: argparse.Namespace, work: Path, target: str,
    texts: ArbitrationSettings, parts: dict[str, list[Problem]],
) -> list[ArbitrationResult]:  # fmt: skip
    """Drafters, policies and measurements of the real or of the null pair, one measurement per seed."""
    seeds, pairs = range(1, num_seeds + 1), args.pairs or num_seeds
    drafters = [work / f"{kind}-drafter-{1 + (seed - 1) % pairs}" for seed in seeds]
    policies = [work / f"{kind}-policy-{seed}" for seed in seeds]
    files = [work / f"{kind}-result-{seed}.json" for seed in seeds]
    for seed, drafter, policy in zip(seeds, drafters, policies, strict=True):
        if kind == "pair":
            stage(drafter, partial(fine_tune, work=work, target=target, seed=seed, steps=args.steps))
        else:
            stage(drafter, partial(noisy_copy, target=target, seed=seed))
        given = {"work": work, "target": target, "drafter": drafter, "seed": seed, "steps": args.policy_steps}
        stage(policy, partial(train_policy, **given))
    for seed, drafter, policy, file in zip(seeds, drafters, policies, files, strict=True):
        given = {"target": target, "drafter": drafter, "texts": texts, "policy": policy, "seed": seed}
        stage(file, partial(write_result, parts=parts, **given))
    return [read_result(file) for file in files]


def stage(path: Path, make: Callable[[Path], None]) -> Path:
    """What `make` writes to a path, unless it is there; its CPU seconds are kept."""
    if not path.exists():
        start = time.process_time()
        print(f"== {path.name}", flush=True)
        make(path)
        file = path.parent / "seconds.json"
        seconds = json.loads(file.read_text()) if file.exists() else {}
        write_json(file, {**seconds, path.stem: round(time.process_time() - start)})
    return path


def as_row(problem: Problem) -> dict[str, str]:
    """A problem as `load_problems` reads it."""
    return {key: getattr(problem, key) for key in ("prompt", "answer", "check", "family")}


def write_corpus(file: Path, target: str, texts: ArbitrationSettings, problems: Sequence[Problem]) -> None:
    """Chats to fine-tune the drafter on: right results of arithmetic, the target's own words elsewhere."""
    asked = [problem for problem in problems if problem.family not in SKILL]
    answers = greedy_answers(target, texts, asked, 16)
    answers += [problem.answer for problem in problems if problem.family in SKILL]
    asked += [problem for problem in problems if problem.family in SKILL]
    rows = []
    for problem, answer in zip(asked, answers, strict=True):
        turns = [("system", SYSTEM), ("user", problem.prompt), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def greedy_answers(
    target: str, texts: ArbitrationSettings, problems: Sequence[Problem], tokens: int
) -> list[str]:
    """The target's own answers, all problems side by side."""
    tokenizer, model = load_tokenizer(target), load_target(target, dtype=torch.bfloat16)
    eos = torch.tensor(sorted(eos_ids_of(model, tokenizer)))
    rendered = prompt_texts(problems, tokenizer, texts.template, texts.system, texts.thinking)
    runner, written = Lockstep(model), []
    logits = runner.start(tokenizer(rendered, add_special_tokens=False)["input_ids"], 1)
    ended = torch.zeros(len(problems), dtype=torch.bool)
    for _ in range(tokens):
        written.append(torch.where(ended, eos[0], logits.argmax(-1)))
        ended |= torch.isin(written[-1], eos)
        if bool(ended.all()):
            break
        logits = runner.step(written[-1])
    return tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)


def write_alone(file: Path, target: str, texts: ArbitrationSettings, problems: Sequence[Problem]) -> None:
    """The target's verdicts with room for long answers."""
    verdicts = verify_all(problems, greedy_answers(target, texts, problems, LONG))
    write_json(file, verdicts)


def save_target(out: Path, name: str) -> None:
    """The target in bf16 safetensors, which load in a second; a GGUF file is dequantised at every load."""
    model = load_target(name, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):  # of the file that it was dequantised from
        del model.config.quantization_config
    write_model(out, model, name)


def write_model(out: Path, model: PreTrainedModel, tokenizer: str) -> None:
    """A folder that `load_target` reads."""
    with appearing_folder(out) as folder:
        model.save_pretrained(folder)
        load_tokenizer(tokenizer).save_pretrained(folder)


def fine_tune(out: Path, work: Path, target: str, seed: int, steps: int) -> None:
    """A drafter, by `certdraft fit`, exported."""
    certdraft([
        "fit", "--config", str(CONFIGS / "drafter.yaml"), "--runs_dir", str(work / "runs"),
        f"--name={out.name}", f"--seed_everything={seed}", f"--data.seed={seed}",
        f"--data.train={work / 'traces' / 'train'}", f"--data.validation={work / 'traces' / 'validation'}",
        f"--data.record.target={target}", f"--data.record.corpus.source={work / 'corpus.jsonl'}",
        f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={max(1, steps // 2)}",
        "--ckpt_path=last",
    ])  # fmt: skip
    checkpoint = find_checkpoint(work / "runs" / out.name, "last")
    export_run(str(checkpoint), str(out), name=f"arithmetic-drafter-{seed}")


def noisy_copy(out: Path, target: str, seed: int) -> None:
    """A drafter that knows nothing the target does not know."""
    model = load_target(target)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    write_model(out, model.bfloat16(), target)


def train_policy(out: Path, work: Path, target: str, drafter: Path, seed: int, steps: int) -> None:
    """A policy of a pair, by `certdraft fit`."""
    certdraft([
        "fit", "--config", str(CONFIGS / "policy.yaml"), "--runs_dir", str(work / "runs"),
        f"--name={out.name}", f"--seed_everything={seed}", f"--data.init_args.seed={seed}",
        f"--model.init_args.target={target}", f"--model.init_args.drafter.init_args.pretrained={drafter}",
        f"--model.init_args.export_dir={out}",
        f"--data.init_args.source={work / 'policy.jsonl'}",
        f"--data.init_args.test_source={work / 'test.jsonl'}",
        f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={max(1, steps // 2)}",
    ])  # fmt: skip


@lru_cache(maxsize=1)
def environment(target: str, drafter: Path, texts: ArbitrationSettings) -> ArbitrationEnv:
    """Target and drafter; what was explored for one policy is there for the next one of the same pair."""
    return open_env(target, str(drafter), texts, dtype="bfloat16")


def write_result(
    file: Path, target: str, drafter: Path, texts: ArbitrationSettings, policy: Path,
    parts: dict[str, list[Problem]], seed: int,
) -> None:  # fmt: skip
    """All arms on the test problems; the baselines are matched on the policy's own problems."""
    env = environment(target, drafter, texts)
    result = measure_arbitration(env, load_policy(policy), parts["test"], parts["policy"], seed=seed)
    plain = asdict(result)
    plain["any_path"] = result.any_path.tolist()
    for arm in plain["arms"].values():
        arm |= {key: value.tolist() for key, value in arm.items() if isinstance(value, torch.Tensor)}
    write_json(file, plain)


def read_result(file: Path) -> ArbitrationResult:
    """The result that `write_result` wrote."""
    plain = json.loads(file.read_text())
    arms = {
        name: Arm(**{key: torch.tensor(v) if isinstance(v, list) else v for key, v in arm.items()})
        for name, arm in plain.pop("arms").items()
    }
    return ArbitrationResult(arms=arms, **plain | {"any_path": torch.tensor(plain["any_path"])})


def only(result: ArbitrationResult, families: Sequence[str]) -> ArbitrationResult:
    """The problems of some families; effects of single overrides are not kept apart by family."""
    kept = torch.tensor([family in families for family in result.families])
    columns = ("right", "tokens", "passes", "overrides", "mismatches")
    arms = {name: Arm(*(getattr(arm, key)[kept] for key in columns)) for name, arm in result.arms.items()}
    names = [family for family in result.families if family in families]
    return replace(result, arms=arms, any_path=result.any_path[kept], families=names)


def steps_of(runs: Path) -> int:
    """Optimiser steps of the newest checkpoint; fewer than asked where a run was stopped."""
    checkpoint = torch.load(find_checkpoint(runs, "last"), weights_only=True, mmap=True)
    return int(checkpoint["global_step"])


def write_report(
    args: argparse.Namespace, work: Path, target: str, texts: ArbitrationSettings, alone: Path,
    pairs: dict[str, list[ArbitrationResult]],
) -> None:  # fmt: skip
    """Store and print the tables: all problems, the skill, elsewhere."""
    families = pairs["pair"][0].families
    groups = {
        "all problems": sorted(set(families)),
        "arithmetic": sorted(set(families) & set(SKILL)),
        "elsewhere": sorted(set(families) - set(SKILL)),
    }
    long = json.loads(alone.read_text())
    data: dict[str, Any] = {
        "command": f"python benchmarks/collaboration.py --seeds {args.seeds} --pairs "
        f"{args.pairs or args.seeds} --null_seeds {args.null_seeds or args.seeds} --steps {args.steps} "
        f"--policy_steps {args.policy_steps}",
        "steps that each drafter was trained": [
            steps_of(work / "runs" / f"pair-drafter-{1 + n}") for n in range(args.pairs or args.seeds)
        ],
        "target": Path(target).name,
        "texts": asdict(texts),
        "CPU seconds of each stage, one thread": json.loads((work / "seconds.json").read_text()),
        f"target alone, {LONG} tokens": {},
    }
    for group, members in groups.items():
        verdicts = [float(right) for right, f in zip(long, families, strict=True) if f in members]
        data[f"target alone, {LONG} tokens"][group] = vars(pooled_ratio(verdicts, [1.0] * len(verdicts)))
    for name, results in pairs.items():
        data[name] = {"all problems": summarise(results)}
        for group, members in list(groups.items())[1:]:
            data[name][group] = summarise([only(result, members) for result in results])
        for group, summary in data[name].items():
            print(f"\n{name}: {group}\n{as_text(summary)}")
    write_json(args.out, data | {"provenance": provenance()})


if __name__ == "__main__":
    main()
