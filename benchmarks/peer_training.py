"""Training speed and memory of EAGLE-3 and DFlash beside speculators 0.9, in one run on one CPU core.

    python tests/interop/environments.py speculators               # once: the peer, in its own environment
    OMP_NUM_THREADS=1 python benchmarks/peer_training.py           # half an hour, 12 GB

Both train the same network on the same text of 1,024 tokens, one row without padding, in fp32, from the
same weights: a fresh certdraft drafter, whose tensors are loaded into theirs. The target is the embedded one;
for larger vocabularies one of its shapes with random weights. Features and last hidden states of the target
lie ready in memory on both sides: neither runs the target. A step is forward, backward, clipping and AdamW.

EAGLE-3: one layer, 3 target layers, unroll 3, full vocabulary. DFlash: 2 layers, blocks of 8, 64 anchors:
speculators' own ratio (512 of 8,192 tokens). The loss is forward KL with speculators' weights over depths
and its denominators. Rows:

| row | what |
|---|---|
| speculators sdpa, speculators eager | its two kinds of attention that train on a CPU; `kl_div`, eager |
| trace | certdraft, the target's 32 best tokens and the rest as one, as a trace holds them: our usual way |
| online | certdraft, KL over the full vocabulary from the target's last hidden states, as theirs is |
| … head trained, … head frozen | EAGLE-3's output layer: we train it, speculators does not, unless told to |

Speed: every row is a process of its own, and they take turns; a ratio is that of one round, in which each
row's time is that of its quickest step. Process time, because the machine may be shared. Memory: growth of
the largest resident size over that after set-up, in the first steps of these same fresh processes, so
gradients and AdamW's moments are in it. Both on a CPU: speculators' fused losses and its block-sparse
attention need a GPU. Its forward pass also counts accuracies for its logger, which cannot be turned off.

Before anything is timed, loss and gradient norm at the start are compared on 64 tokens: "online" and
speculators must agree, or nothing is written.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_training_speculators import CHECKED, Forward, serve
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

from certdraft.certificates import Head
from certdraft.data import load_target, load_tokenizer, target_config
from certdraft.decoding import device_name
from certdraft.drafters import BlockConfig, BlockDrafter, EagleConfig, EagleDrafter, Paths
from certdraft.losses import Chunked, ForwardKL, OnlineTarget, TargetBatch, depth_decay

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".cache" / "interop" / "speculators" / "venv"
LENGTH, KEPT = 1024, 32
FAMILIES: dict[str, dict[str, Any]] = {
    "eagle": {"layers": [1, 3, 5], "unroll": 3},
    "block": {"layers": [1, 5], "block_size": 8, "mask_token_id": 2040, "num_anchors": 64, "gamma": 4.0},
}


@dataclass(frozen=True)
class Row:
    """One contender.

    Args:
        name: in the report.
        peer: speculators, not certdraft.
        settings: what differs from the other rows of its family.
    """

    name: str
    peer: bool
    settings: dict[str, Any]


def rows(family: str, attentions: tuple[str, ...]) -> list[Row]:
    """The contenders of a family; which of speculators' kinds of attention take part."""
    found = []
    for train_head in (True, False) if family == "eagle" else (False,):
        head = f", head {'trained' if train_head else 'frozen'}" if family == "eagle" else ""
        for attention in attentions:
            settings = {"attention": attention, "train_head": train_head}
            found.append(Row(f"speculators {attention}{head}", True, settings))
        for said in ("trace", "online"):
            found.append(Row(said + head, False, {"said": said, "train_head": train_head}))
    return found


# ---- what both sides read


@torch.no_grad()
def prepare(folder: Path, vocab_size: int, seed: int) -> None:
    """Writes a target, a text with what it says there, and the drafters' first weights."""
    torch.manual_seed(seed)
    if vocab_size == target_config().vocab_size:
        target = load_target()
        source = inspect.getsource(argparse)
        ids = torch.tensor(load_tokenizer()(source)["input_ids"][:LENGTH])[None]
    else:
        config = target_config()
        config.vocab_size, config.dtype = vocab_size, torch.float32
        target = Qwen3ForCausalLM(config).eval()
        weight = target.get_input_embeddings().weight
        weight.mul_(3.0 / (weight.std() * math.sqrt(weight.shape[1])))  # logits of about ±3
        ids = torch.randint(vocab_size, (1, LENGTH))
    target.save_pretrained(folder)
    before_norm: list[Tensor] = []
    hook = target.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0]))
    out = target.model(ids, output_hidden_states=True)
    hook.remove()
    states, weight = out.last_hidden_state, target.get_output_embeddings().weight
    heads = [Head.from_logits(part @ weight.t(), KEPT) for part in states[0].split(64)]
    shared = {"input_ids": ids, "last": before_norm[0], "last_normed": states}
    for name in ("ids", "gap", "lse_gap"):
        shared[f"head_{name}"] = torch.cat([getattr(head, name) for head in heads])
    for family, settings in FAMILIES.items():
        features = torch.stack([out.hidden_states[layer + 1] for layer in settings["layers"]], -2)
        torch.save(shared | {"features": features}, folder / f"{family}-text.pt")
        torch.save(drafter(family, target).state_dict(), folder / f"{family}.pt")


def drafter(family: str, target: PreTrainedModel) -> EagleDrafter | BlockDrafter:
    """A fresh drafter of a family; no layer is warmed up alone, every step is a full one."""
    settings, vocab_size = FAMILIES[family], int(target.config.vocab_size)
    layers = tuple(settings["layers"])
    if family == "eagle":
        return EagleDrafter(EagleConfig(target_layer_ids=layers), unroll=settings["unroll"]).build(
            vocab_size, target
        )
    config = BlockConfig(
        num_hidden_layers=len(layers), target_layer_ids=layers,
        block_size=settings["block_size"], mask_token_id=settings["mask_token_id"],
    )  # fmt: skip
    return BlockDrafter(config, num_anchors=settings["num_anchors"]).build(vocab_size, target)


# ---- our half


def ours(folder: Path, settings: dict[str, Any]) -> tuple[nn.Module, Forward]:
    """A certdraft drafter and its forward pass, as `DrafterModule` does it."""
    family, target = settings["family"], load_target(str(folder))
    weight = target.get_output_embeddings().weight.detach()
    model = drafter(family, target)
    model.load_state_dict(torch.load(folder / f"{family}.pt"))
    if family == "eagle":
        model.lm_head.weight.requires_grad_(settings["train_head"])
    text, chunked = torch.load(folder / f"{family}-text.pt"), Chunked(ForwardKL())
    head = Head(*(text[f"head_{name}"] for name in ("ids", "gap", "lse_gap")), vocab_size=len(weight))

    def forward(checked: bool) -> tuple[Tensor, int]:
        num = CHECKED if checked else LENGTH
        paths = model.paths(
            text["input_ids"][:, :num],
            torch.arange(num)[None],
            torch.zeros(1, num, dtype=torch.long),
            torch.ones(1, num, dtype=torch.bool),
            text["features"][:, :num],
            every=checked,
        )
        if checked and family == "block":  # speculators draws no anchor from a text's last block
            kept = paths.steps[:, 0] < num - settings["block_size"]
            paths = Paths(*(part[kept] for part in paths))
        steps = paths.steps[paths.mask]
        said: TargetBatch | OnlineTarget = (
            OnlineTarget(text["last_normed"][0, steps], weight, KEPT)
            if settings["said"] == "online"
            else TargetBatch(head[steps])
        )
        step_weight = _weights(family, paths.mask)[paths.mask]
        hidden = paths.hidden[paths.mask]
        loss = chunked(hidden, model.head_weight, said, step_weight=step_weight, denominator=1.0)
        return loss, len(steps)

    return model, forward


def _weights(family: str, mask: Tensor) -> Tensor:
    """speculators' own: a sum of means over depths for EAGLE-3, a decay over all drafts for DFlash."""
    if family == "eagle":
        return mask / mask.sum(0)
    return depth_decay(mask.shape[1], FAMILIES["block"]["gamma"]) * mask / mask.sum()


# ---- the contest


class Worker:
    """A process that trains when told to; see `peer_training_speculators.serve`."""

    def __init__(self, row: Row, folder: Path, family: str, vocab_size: int) -> None:
        settings = FAMILIES[family] | row.settings | {"family": family, "vocab_size": vocab_size}
        python = PEER / "bin" / "python" if row.peer else sys.executable
        script = HERE / ("peer_training_speculators.py" if row.peer else "peer_training.py")
        half = [] if row.peer else ["--half"]
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        self.row, self.rounds = row, []
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [str(part) for part in (python, script, *half, folder, json.dumps(settings))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | quiet,
        )  # fmt: skip
        self.facts = self._answer()

    def steps(self, num: int) -> dict[str, Any]:
        """Trains for some steps."""
        self._process.stdin.write(f"{num}\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.row.name} has stopped:\n{self._errors.read()[-2000:]}")
        return json.loads(line)


def contest(
    folder: Path, family: str, vocab_size: int, contenders: list[Row], rounds: int, steps: int
) -> dict[str, Any]:
    """All rows of a family at one vocabulary."""
    workers, found = [], {}
    try:
        for row in contenders:
            worker = Worker(row, folder, family, vocab_size)
            workers.append(worker)
            first = worker.steps(steps)
            found[row.name] = worker.facts | {
                "drafts_a_step": first["drafts"],
                "losses_nats": [round(loss, 5) for loss in first["losses_nats"]],
                "peak_mb": round(first["peak_bytes"] / 1e6, 1),
            }
            print(f"  {row.name}: {found[row.name]['peak_mb']} MB", flush=True)
        check(found)
        for _ in range(rounds):
            for worker in workers:
                worker.rounds.append(min(worker.steps(steps)["seconds"]))
    finally:
        for worker in workers:
            worker.stop()
    for worker in workers:
        best = min(worker.rounds)
        facts = found[worker.row.name]
        facts["seconds_a_step"] = spread(worker.rounds)
        facts["text_tokens_per_cpu_s"] = round(LENGTH / best)
        facts["drafts_per_cpu_s"] = round(facts["drafts_a_step"] / best)
        print(f"  {worker.row.name}: {facts['text_tokens_per_cpu_s']} tokens/s", flush=True)
    times = {worker.row.name: worker.rounds for worker in workers}
    return {"rows": found, "ratios": ratios(found, times)}


def check(found: dict[str, Any]) -> None:
    """Refuses rows that do not minimise the same thing with the same weights."""
    for name, facts in found.items():
        if name.startswith("trace"):  # sees the rest of the vocabulary as one class: a lower loss
            continue
        same = next(f for n, f in found.items() if n.startswith("speculators") and _head(n) == _head(name))
        for key, value in same["start"].items():
            if not math.isclose(facts["start"][key], value, rel_tol=1e-4):
                raise RuntimeError(f"{name}: {key} is {facts['start'][key]}, speculators' is {value}.")
        if facts["parameters"] != same["parameters"]:
            raise RuntimeError(
                f"{name}: {facts['parameters']} parameters, speculators has {same['parameters']}."
            )


def _head(name: str) -> str:
    return name.partition(", ")[2]


def ratios(found: dict[str, Any], times: dict[str, list[float]]) -> dict[str, Any]:
    """Each of our rows over the quicker, and over the lighter, of speculators' two with the same head; and as
    either ships: ours trained over theirs frozen."""
    result = {}
    for name in found:
        if name.startswith("speculators"):
            continue
        heads = {"same head": _head(name)}
        if _head(name) == "head trained":
            heads["as shipped"] = "head frozen"
        for kind, head in heads.items():
            theirs = [n for n in found if n.startswith("speculators") and _head(n) == head]
            quick = min(theirs, key=lambda n: min(times[n]))
            light = min(theirs, key=lambda n: found[n]["peak_mb"])
            speed = [their / our for our, their in zip(times[name], times[quick], strict=True)]
            result.setdefault(name, {})[kind] = {
                "tokens_per_s": spread(speed) | {"of_best": round(min(times[quick]) / min(times[name]), 3)},
                "quicker": quick,
                "peak_memory": round(found[name]["peak_mb"] / found[light]["peak_mb"], 3),
                "lighter": light,
            }
    return result


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "largest": round(max(values), 4),
    }


def peer_versions() -> dict[str, str]:
    """Of the peer's environment.

    Raises:
        SystemExit: it is not there.
    """
    sys.path.insert(0, str(HERE.parent / "tests" / "interop"))
    from environments import ready

    if not ready("speculators"):
        raise SystemExit(
            "peer_training.py: the peer's environment is missing or of another recipe; make it first: "
            "python tests/interop/environments.py speculators"
        )
    code = "from importlib.metadata import version as v; import json; print(json.dumps({n: v(n) for n in "
    code += "('speculators', 'torch', 'transformers')}))"
    text = subprocess.run([PEER / "bin" / "python", "-c", code], check=True, capture_output=True, text=True)
    return json.loads(text.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--half"]:
        torch.set_num_threads(1)
        model, forward = ours(Path(sys.argv[2]), json.loads(sys.argv[3]))
        serve(model.train(), forward)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 32_768, 151_936], help="V")
    parser.add_argument("--rounds", type=int, default=7, help="at the first vocabulary; 2 at others")
    parser.add_argument("--steps", type=int, default=3, help="of a round; the quickest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "peer_training.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    theirs, load = peer_versions(), os.getloadavg()
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/peer_training.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": device_name(),
        "load_average_at_start": [round(value, 2) for value in load],
        "versions": {
            "certdraft": {name: version(name) for name in ("certdraft", "torch", "transformers")},
            "speculators": theirs,
        },
        "seed": args.seed,
        "text_tokens": LENGTH,
        "settings": FAMILIES,
        "vocabularies": {},
    }
    for place, vocab_size in enumerate(args.vocab):
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), vocab_size, args.seed)
            for family in FAMILIES:
                print(f"{family}, V = {vocab_size}", flush=True)
                rounds = args.rounds if place == 0 else min(args.rounds, 2)
                contenders = rows(family, ("sdpa", "eager") if place == 0 else ("sdpa",))
                found[family] = contest(
                    Path(folder), family, vocab_size, contenders, rounds, args.steps if place == 0 else 2
                )
        report["vocabularies"][str(vocab_size)] = found
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({v: {f: x["ratios"] for f, x in r.items()} for v, r in report["vocabularies"].items()}))


if __name__ == "__main__":
    main()
