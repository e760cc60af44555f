"""One cell of the study: a lean training loop, its evaluation, and nothing that writes files.

The loop does what `DrafterModule` does under the Trainer, without the Trainer: same batches, same chunked
loss, same clipping, same optimiser (`tests/study` holds its weights against Lightning's). What is added: a
schedule of warm-up, constant rate and a decay, so that the small budget is a branch off the large one's
constant part; and step weights along draft paths for the budget-aware losses.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy import ndarray
from plan import DECAY, LOSSES, ROWS, SEQ_LEN, SIZES, TARGET_LAYERS, WARMUP, WEIGHTS
from trees import accepted_by_rank, pop_orders, target_passes

import certdraft
from certdraft.certificates import Coverage, StrictGreedy
from certdraft.data import (
    Batch,
    Recording,
    TraceDataModule,
    assemble,
    load_target,
    load_tokenizer,
    open_trace,
    pack,
)
from certdraft.data.record.recording import read_prompts
from certdraft.drafters import CausalDrafter
from certdraft.evaluation.measure.joined_steps import JoinedSteps
from certdraft.losses import Chunked, HardCE, Loss, StepWeights, TargetBatch
from certdraft.train.optim import OptimizerSettings

CLIP = 1.0
MARGIN_EDGES = (0.0, 0.1, 0.3, 0.6, 1.0 + 1e-6)
WIDTHS = (1, 2, 4, 8)
STATIC = {"chain-4": (1,) * 4, "4-ary": (4,) * 4, "static-4-2-2-1": (4, 2, 2, 1)}
BUDGETS = (8, 16, 32, 64)


# ---- drafters and batches


def fresh_drafter(size: str, seed: int, vocab_size: int, target: Any = None) -> CausalDrafter:
    """The drafter a run starts from: the embedded config, in the size wanted.

    Args:
        size: key of `SIZES`.
        seed: of what is drawn.
        vocab_size: the target's.
        target: its model; the embedded one when not given.
    """
    file = Path(certdraft.__file__).parent / "configs" / "drafter" / "embedded.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))["init_args"]["config"]
    target = target or load_target("embedded")
    torch.manual_seed(seed)
    drafter = CausalDrafter(config=config | {"num_hidden_layers": SIZES[size]}, init_from_target=True)
    drafter.build(vocab_size, target)
    for layer, theirs in enumerate(TARGET_LAYERS.get(size, ())):
        source = target.model.layers[theirs].state_dict()
        drafter.model.model.layers[layer].load_state_dict(source)
    return drafter.train()


def train_batches(folder: Path, seed: int) -> Iterator[Batch]:
    """Batches of the training trace without end, in the DataModule's order."""
    module = TraceDataModule(str(folder), str(folder), seq_len=SEQ_LEN, batch_size=ROWS, seed=seed)
    with contextlib.redirect_stderr(io.StringIO()):  # its summary, once a cell
        module.setup()
    loader = module.train_dataloader()
    while True:
        yield from loader


# ---- training


def factor(step: int, steps: int, decay: float = DECAY) -> float:
    """Learning rate of a step as a share of the peak: warm-up, constant, linear decay over the last part."""
    left = (steps - step) / max(1.0, decay * steps)
    return min((step + 1) / WARMUP, 1.0, left)


@dataclass
class Run:
    """A drafter in training.

    Attributes:
        drafter: the model.
        loss: per-step loss.
        optimizer: made by `OptimizerSettings`, as in training proper.
        lr: peak learning rate.
        weights: of the steps; None = all alike.
        step: optimiser steps done.
        seconds: CPU seconds spent in them.
    """

    drafter: CausalDrafter
    loss: Loss
    optimizer: torch.optim.Optimizer
    lr: float
    weights: StepWeights | None = None
    step: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, drafter: CausalDrafter, loss: str, lr: float) -> Run:
        """A run at step 0."""
        made = OptimizerSettings(lr=lr, schedule="constant", warmup_steps=0).build(drafter, 1)
        return cls(
            drafter, LOSSES[loss](), made["optimizer"], lr, WEIGHTS[loss]() if loss in WEIGHTS else None
        )

    def branch(self) -> Run:
        """A copy that trains on by itself."""
        twin = copy.deepcopy(self.drafter)
        made = OptimizerSettings(lr=self.lr, schedule="constant", warmup_steps=0).build(twin, 1)["optimizer"]
        made.load_state_dict(self.optimizer.state_dict())
        return Run(twin, self.loss, made, self.lr, self.weights, self.step, self.seconds)

    def train(self, batches: Iterator[Batch], until: int, steps: int, decay: float = DECAY) -> None:
        """Steps up to number `until` of a run of `steps`."""
        chunked = Chunked(self.loss)
        begin = time.process_time()
        while self.step < until:
            batch = next(batches)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor(self.step, steps, decay)
            self.update(batch, chunked)
            self.step += 1
        self.seconds += time.process_time() - begin

    def update(self, batch: Batch, chunked: Chunked) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        steps = batch.steps()
        hidden = self.drafter.hidden(batch.input_ids, batch.position_ids, batch.document_ids)
        hidden = hidden.flatten(0, 1)[steps]
        assert batch.head is not None
        target = TargetBatch(batch.head[batch.loss_mask])
        weight = nll = None
        if self.weights is not None:
            if self.weights.needs_nll:
                nll = Chunked(HardCE(), "none")(hidden.detach(), self.drafter.head_weight.detach(), target)
            weight = self.weights(target, batch.loss_mask, batch.document_ids, nll)
        chunked(hidden, self.drafter.head_weight, target, step_weight=weight).backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), CLIP)
        self.optimizer.step()


# ---- evaluation


@dataclass
class Split:
    """A held-out trace, read once.

    Attributes:
        batches: its documents in order, packed, with the document of every counted step.
        texts: prompt, greedy continuation and document of the texts that are replayed.
        unit: source file of each document, numbered: what is resampled.
    """

    batches: list[tuple[Batch, ndarray]]
    texts: list[tuple[list[int], list[int], int]]
    unit: ndarray


def read_split(folder: Path, recording: Recording, replayed: int | None = None) -> Split:
    """A held-out split; `replayed` texts, spread evenly, are used for trees, all when None."""
    trace = open_trace(folder)
    packing = pack(trace.lengths, SEQ_LEN, in_order=True)
    batches = []
    for first in range(0, packing.num_rows, 16):
        rows = np.arange(first, min(first + 16, packing.num_rows))
        batch = assemble(trace, packing, rows)
        document = packing.pieces[batch.document_ids.clamp(min=0).numpy(), 0]
        batches.append((batch, document[batch.loss_mask.numpy()]))
    prompts, _ = read_prompts(recording, load_tokenizer("embedded"), show_progress=False)
    files = {prompt.ids.tobytes(): prompt.where for prompt in prompts}
    names, texts = [], []
    for index in range(len(trace)):
        row = trace.row(index)
        begin = int(row.loss_mask.int().argmax()) + 1
        names.append(files[row.input_ids[:begin].int().numpy().tobytes()])
        ids = row.input_ids.tolist()
        if len(ids) > begin + 1:
            texts.append((ids[:begin], ids[begin:], index))
    if replayed is not None and replayed < len(texts):
        texts = [texts[i * len(texts) // replayed] for i in range(replayed)]
    return Split(batches, texts, np.unique(names, return_inverse=True)[1])


@torch.inference_mode()
def evaluate(
    drafter: CausalDrafter, split: Split, certify: bool = True, trees: bool = True
) -> dict[str, Any]:
    """Counts per source file, from which every rate and interval is made.

    Returns:
        steps [U, margin bucket], covered [width, U, bucket], certified [rule, U], log q(g) and KL [U]; and of
        the replayed texts tokens [U], passes [U] by policy, accepted draft tokens from every start [U].
    """
    drafter.eval()
    units, buckets = int(split.unit.max()) + 1, len(MARGIN_EDGES) - 1
    steps = np.zeros((units, buckets), int)
    covered = np.zeros((len(WIDTHS), units, buckets), int)
    certified = np.zeros((2, units), int)
    kl, logq_g = np.zeros(units), np.zeros(units)
    ranks: list[list[int]] = [[] for _ in split.unit]
    for batch, document in split.batches:
        hidden = drafter.hidden(batch.input_ids, batch.position_ids, batch.document_ids)[batch.loss_mask]
        assert batch.head is not None
        head = batch.head[batch.loss_mask]
        for first in range(0, len(hidden), 2048):
            rows = slice(first, first + 2048)
            logits, part, where = drafter.head(hidden[rows]), head[rows], split.unit[document[rows]]
            own = logits.gather(-1, part.greedy[:, None])
            rank = ((logits >= own).sum(-1) - 1).numpy()
            bucket = np.digitize(TargetBatch(part).margin.numpy(), MARGIN_EDGES[1:-1])
            np.add.at(steps, (where, bucket), 1)
            for i, width in enumerate(WIDTHS):
                np.add.at(covered[i], (where, bucket), rank < width)
            np.add.at(logq_g, where, (own[:, 0] - logits.logsumexp(-1)).double().numpy())
            for at, value in zip(document[rows].tolist(), rank.tolist(), strict=True):
                ranks[at].append(value)
            if certify:
                seen = JoinedSteps.from_logits(logits, part)
                np.add.at(kl, where, seen.kl.numpy())
                for i, rule in enumerate((Coverage(4), StrictGreedy())):
                    np.add.at(certified[i], where, seen.certified(rule)[0].numpy())
    tokens = np.zeros(units, int)
    passes = {name: np.zeros(units, int) for name in STATIC}
    starts = {}
    if trees:
        starts = {f"best-first-{budget}": np.zeros(units, int) for budget in BUDGETS}
        passes |= {name: np.zeros(units, int) for name in starts}
    for prompt, text, index in split.texts:
        unit = split.unit[index]
        tokens[unit] += len(text)
        for name, widths in STATIC.items():
            passes[name][unit] += target_passes(accepted_by_rank(ranks[index][: len(text)], widths))
        if trees:
            before = pop_orders(drafter, prompt, text, max(BUDGETS))
            for budget in BUDGETS:
                accepted = (before < budget).sum(-1)
                passes[f"best-first-{budget}"][unit] += target_passes(accepted)
                starts[f"best-first-{budget}"][unit] += int(accepted.sum())
    drafter.train()
    found: dict[str, Any] = {
        "steps": steps.tolist(),
        "covered": covered.tolist(),
        "log_q": logq_g.round(3).tolist(),
        "tokens": tokens.tolist(),
        "passes": {name: count.tolist() for name, count in passes.items()},
        "accepted_from_every_start": {name: count.tolist() for name, count in starts.items()},
    }
    return found | ({"certified": certified.tolist(), "kl": kl.round(3).tolist()} if certify else {})


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The rates of `evaluate`'s counts, over the whole split."""
    steps, covered = np.array(found["steps"]), np.array(found["covered"])
    rates = {}
    for i, width in enumerate(WIDTHS):
        rates[f"coverage@{width}"] = covered[i].sum() / steps.sum()
        rates[f"low_margin_coverage@{width}"] = covered[i][:, 0].sum() / steps[:, 0].sum()
    if "certified" in found:
        rates["certified@4"] = np.sum(found["certified"][0]) / steps.sum()
        rates["certified_strict"] = np.sum(found["certified"][1]) / steps.sum()
        rates["kl_nats"] = np.sum(found["kl"]) / steps.sum()
    rates["nll_nats"] = -np.sum(found["log_q"]) / steps.sum()
    for name, count in found["passes"].items():
        rates[f"tau/{name}"] = np.sum(found["tokens"]) / np.sum(count)
    return {name: round(float(value), 5) for name, value in rates.items()}
