"""The price of relaxed acceptance: speed gained against quality lost, by rule and threshold.

    certdraft real
    python benchmarks/relaxing.py --run runs/real --drafter eagle3      # about 10 minutes on two idle cores

Held-out prompts are decoded with one drafter and one tree under each acceptance rule. Strict acceptance is
the lossless end: every other rule is paired with it, prompt by prompt. Quality is measured by the target:
the log-probability (nats) it gives to the tokens that were committed, in an fp32 head along the text, and the
share of texts that differ from the greedy text. Greedy text has a high log-probability by construction, so
the loss says how far a rule leaves the target's preferred text, not how good the text is to a reader.
Sums of two numbers that the target is asked for in words show whether answers that can be checked get worse.

Methods take turns prompt by prompt; intervals are 95 % bootstrap over prompts. `--figure FILE.png` draws what
is stored: speed against quality, strict acceptance at the left end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from certdraft.arbitration.tasks.problems import Problem
from certdraft.arbitration.tasks.verifiers import verify
from certdraft.certificates import Additive, Multiplicative, Rule, TopM, Typical
from certdraft.data import eos_ids_of, load_target, load_tokenizer
from certdraft.decoding import (
    Acceptor,
    BestFirst,
    Chain,
    DecodeResult,
    Relaxed,
    Strict,
    TargetRunner,
    decode,
    device_name,
)
from certdraft.drafters import load_drafter
from certdraft.evaluation import compare_ratios, pooled_ratio, read_questions
from certdraft.evaluation.report.figure_style import canvas, marks
from certdraft.support import project_fp32, text_body, write_json
from certdraft.train.commands.real import held_out_prompts, target_of

RULES: tuple[Rule, ...] = (
    *(Additive(t) for t in (0.05, 0.1, 0.2, 0.3)),
    *(Multiplicative(a) for a in (0.8, 0.5, 0.2)),
    *(TopM(m, alpha=0.2) for m in (3, 5)),
    Typical(epsilon=0.1, delta=0.09),
    Typical(epsilon=0.09, delta=0.3),
)


@dataclass
class Sums:
    """What one rule did, a number per prompt."""

    tokens: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def add(self, result: DecodeResult, seconds: float, log_prob: float) -> None:
        self.tokens.append(sum(r.committed for r in result.rounds))
        self.passes.append(len(result.rounds))
        self.seconds.append(seconds)
        self.log_prob.append(log_prob)
        self.texts.append(result.tokens)

    def against(self, strict: Sums) -> dict[str, Any]:
        """Paired with strict acceptance, which is the lossless end."""
        return {
            "tau": vars(pooled_ratio(self.tokens, self.passes)),
            "speed": vars(
                compare_ratios((self.tokens, self.seconds), (strict.tokens, strict.seconds), "ratio")
            ),
            "log_prob_per_token": vars(
                compare_ratios((self.log_prob, self.tokens), (strict.log_prob, strict.tokens))
            ),
            "changed_texts": sum(a != b for a, b in zip(self.texts, strict.texts, strict=True)),
            "right_answers": vars(pooled_ratio(self.right, [1.0] * len(self.right))),
            "right_answers_gained": vars(
                compare_ratios((self.right, [1.0] * len(self.right)), (strict.right, [1.0] * len(self.right)))
            ),
        }


def sums(count: int, seed: int = 0) -> list[Problem]:
    """Sums of two numbers of two digits, asked for in words."""
    draw = random.Random(seed)
    pairs = [(draw.randint(11, 99), draw.randint(11, 99)) for _ in range(count)]
    return [Problem(f"What is {a} plus {b}?", str(a + b), "number") for a, b in pairs]


@torch.inference_mode()
def log_prob(target: Any, prompt: list[int], text: list[int]) -> float:
    """Log-probability (nats) of `text` after `prompt` under the target."""
    ids = torch.tensor([[*prompt, *text[:-1]]])
    hidden = text_body(target)(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
    head = target.get_output_embeddings()
    logits = project_fp32(hidden, head.weight, head.bias)
    return float(logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum())


def draw(path: Path, rules: dict[str, Any]) -> None:
    """Speed over strict acceptance against the log-probability lost a token, a line a family of rules."""
    families: dict[str, list[tuple[str, Any]]] = {}
    for rule in RULES:
        families.setdefault(type(rule).__name__.lower(), []).append((str(rule), rules[str(rule)]))
    with canvas(path, size=(6.8, 4.2)) as axes:
        plot = axes[0, 0]
        plot.axhline(1, color="#999999", lw=0.8)
        plot.plot(0, 1, "D", color="#000000", ms=7, label="strict (lossless)")
        for index, (family, members) in enumerate(families.items()):
            lost = [(-d["log_prob_per_token"]["value"]) for _, d in members]
            speed = [d["speed"] for _, d in members]
            below = [s["value"] - s["low"] for s in speed]
            above = [s["high"] - s["value"] for s in speed]
            plot.errorbar(
                lost, [s["value"] for s in speed], yerr=[below, above], lw=1, elinewidth=0.8, capsize=2,
                label=family, **marks(index),
            )  # fmt: skip
            for x, s, (rule, _) in zip(lost, speed, members, strict=True):
                settings = ", ".join(re.findall(r"=([\d.]+)", rule))
                plot.annotate(settings, (x, s["value"]), (4, 4), textcoords="offset points", fontsize=6.5)
        plot.set_xlabel("log-probability lost a token, under the target (nats)")
        plot.set_ylabel("speed over strict acceptance")
        plot.legend(loc="best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--drafter", default="eagle3")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--sums", type=int, default=60, help="sums asked for, with at most 32 tokens")
    parser.add_argument("--nodes", type=int, default=16, help="of the best-first tree; 0 is a chain of 4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/relaxing.json"))
    parser.add_argument("--figure", type=Path, help="only draw what is stored in --out, as this PNG")
    args = parser.parse_args()
    if args.figure:
        return draw(args.figure, json.loads(args.out.read_text(encoding="utf-8"))["rules"])
    name = args.target or target_of(args.run)
    target, tokenizer = load_target(name, dtype=torch.bfloat16), load_tokenizer(name)
    drafter = load_drafter(args.run / "exports" / args.drafter, target=target, dtype="bfloat16").eval()
    runner = TargetRunner(target, drafter.taps)
    builder = BestFirst(args.nodes, max_depth=7) if args.nodes else Chain(4)
    acceptors: dict[str, Acceptor] = {"strict": Strict(), **{str(rule): Relaxed(rule) for rule in RULES}}
    found = {label: Sums() for label in acceptors}
    eos = eos_ids_of(target, tokenizer)

    def rendered(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        prompt: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return list(prompt["input_ids"])

    for number, question in enumerate(read_questions(str(held_out_prompts()), args.prompts)):
        ids, labels = rendered(question.turns[0]), list(acceptors)
        turn = number % len(labels)
        for label in labels[turn:] + labels[:turn]:
            start = time.perf_counter()
            result = decode(runner, drafter, ids, builder, acceptors[label], args.tokens, eos)
            seconds = time.perf_counter() - start
            found[label].add(result, seconds, log_prob(target, ids, result.tokens))
        print(f"{number + 1} of {args.prompts} prompts", flush=True)
    for number, problem in enumerate(sums(args.sums)):
        ids = rendered(problem.prompt)
        for label, acceptor in acceptors.items():
            answer = decode(runner, drafter, ids, builder, acceptor, 32, eos).tokens
            text = tokenizer.decode(answer, skip_special_tokens=True)
            found[label].right.append(float(verify(problem, str(text))))
        print(f"{number + 1} of {args.sums} sums", flush=True)
    strict = found["strict"]
    data = {
        "command": f"python benchmarks/relaxing.py --drafter {args.drafter} --prompts {args.prompts} "
        f"--tokens {args.tokens} --nodes {args.nodes} --sums {args.sums}",
        "date": date.today().isoformat(),
        "device": device_name(runner.device),
        "target": Path(name).name,
        "builder": repr(builder),
        "prompts": args.prompts,
        "sums": args.sums,
        "strict_tokens_per_s": vars(pooled_ratio(strict.tokens, strict.seconds)),
        "strict_log_prob_per_token": vars(pooled_ratio(strict.log_prob, strict.tokens)),
        "rules": {label: sums.against(strict) for label, sums in found.items()},
    }
    write_json(args.out, data)
    print(json.dumps(data["rules"], indent=1))


if __name__ == "__main__":
    main()
