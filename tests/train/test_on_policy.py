"""On-policy rounds: what the drafter writes, where it counts, how the target judges it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from certdraft import losses as L
from certdraft.certificates import StrictGreedy, radius
from certdraft.data import Batch, TraceDataModule
from certdraft.drafters import BlockDrafter, CausalDrafter
from certdraft.train import DrafterModule
from certdraft.train.commands.cli import captured, main
from certdraft.train.on_policy import OnPolicySettings, Rounds, write_rounds
from certdraft.train.target_outputs import TargetSettings

DEPTH = 3
DRAFTER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}


@pytest.fixture
def batch(tiny: Path) -> Batch:
    data = TraceDataModule(str(tiny / "train"), str(tiny / "validation"), seq_len=64, batch_size=4)
    data.setup()
    return next(iter(data.val_dataloader()))


@pytest.fixture
def drafter() -> CausalDrafter:
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return CausalDrafter({**DRAFTER, **heads}, vocab_size=304)


def test_rounds_are_what_the_drafter_writes_alone(batch: Batch, drafter: CausalDrafter) -> None:
    written, rounds = write_rounds(drafter, batch, DEPTH)
    num = batch.input_ids.shape[1]
    documents = {int(d) for d in batch.document_ids[batch.loss_mask]}
    assert 0 < len(rounds.steps) <= len(documents)
    for steps, tokens in zip(rounds.steps.tolist(), rounds.tokens.tolist(), strict=True):
        row, first = divmod(steps[0], num)
        document = batch.document_ids[row, first]
        start = int((batch.document_ids[row] == document).nonzero()[0])
        text = batch.input_ids[row, start : first + 1].tolist()
        for token in tokens:  # one document by itself, token by token
            logits = drafter.logits(torch.tensor([text]))[0, -1]
            assert token == int(logits.argmax())
            text.append(token)
        assert written.input_ids[row, start : first + 1 + DEPTH].tolist() == text


def test_the_loss_mask_ends_with_the_round_and_nothing_else_changes(
    batch: Batch, drafter: CausalDrafter
) -> None:
    written, rounds = write_rounds(drafter, batch, DEPTH)
    flat = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    flat[rounds.steps.flatten() + 1] = True
    drafted = flat.view_as(batch.input_ids)
    assert torch.equal(written.input_ids[~drafted], batch.input_ids[~drafted])
    assert written.head is None
    assert bool(written.loss_mask.flatten()[rounds.steps[:, 0]].all())
    assert not bool((written.loss_mask & ~batch.loss_mask).any())
    places = torch.arange(flat.numel())
    documents = batch.document_ids.flatten()
    for steps in rounds.steps:
        after = (documents == documents[steps[0]]) & (places > steps[-1])
        assert not bool(written.loss_mask.flatten()[after].any())
        before = (documents == documents[steps[0]]) & (places <= steps[-1])
        assert torch.equal(written.loss_mask.flatten()[before], batch.loss_mask.flatten()[before])


def test_documents_too_short_for_a_round_stay(batch: Batch, drafter: CausalDrafter) -> None:
    written, rounds = write_rounds(drafter, batch, batch.input_ids.shape[1])
    assert not len(rounds.steps)
    assert torch.equal(written.input_ids, batch.input_ids)
    assert torch.equal(written.loss_mask, batch.loss_mask)


def test_rejected_counts_from_the_first_rejection() -> None:
    rounds = Rounds(torch.tensor([[1, 2, 3, 4], [6, 7, 8, 9]]), torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]))
    greedy = torch.tensor([[5, 0, 7, 0], [1, 2, 3, 4]])
    assert rounds.rejected(greedy, 11).tolist() == [-1, -1, 0, 1, 2, -1, -1, -1, -1, -1, -1]


def small_target(rejected: list[int]) -> tuple[torch.Tensor, L.TargetBatch]:
    torch.manual_seed(2)
    target = L.TargetBatch.from_logits(3 * torch.randn(len(rejected), 12), 6)
    return torch.randn(len(rejected), 12, requires_grad=True), replace(
        target, rejected=torch.tensor(rejected)
    )


@pytest.mark.parametrize("avoidable", [None, 0.2])
def test_the_loss_by_hand(avoidable: float | None) -> None:
    since = [-1, -1, 0, 1, 3]
    logits, target = small_target(since)
    found = L.OnPolicyKL(decay=0.5, avoidable=avoidable)(logits, target)
    p, q = target.logp.exp(), logits.softmax(-1)
    forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
    kappa = radius(p, StrictGreedy())
    for i, late in enumerate(since):
        weight = 1.0 if avoidable is None else min(1.0, float(kappa[i]) / avoidable)
        expected = forward[i] if late < 0 else 0.5**late * weight * reverse[i]
        torch.testing.assert_close(found[i], expected)


def test_without_rounds_it_is_its_accepted_part() -> None:
    logits, target = small_target([-1, 0])
    plain = replace(target, rejected=None)
    torch.testing.assert_close(L.OnPolicyKL()(logits, plain), L.ForwardKL()(logits, plain))


@pytest.mark.parametrize("online", [False, True])
def test_chunks_keep_what_was_rejected(online: bool) -> None:
    torch.manual_seed(3)
    hidden, weight, far = torch.randn(21, 8), torch.randn(12, 8), torch.randn(21, 8)
    rejected = torch.arange(21) % 4 - 1
    whole = replace(L.TargetBatch.from_logits(far @ weight.T, 6), rejected=rejected)
    target = L.OnlineTarget(far, weight, 6, rejected=rejected) if online else whole
    loss = L.OnPolicyKL(avoidable=0.1)
    expected = loss(hidden @ weight.T, whole)
    torch.testing.assert_close(L.Chunked(loss, "none", 8)(hidden, weight, target), expected)
    mask = rejected > 0
    masked = L.Chunked(loss, "none", 8)(hidden, weight, target, mask=mask)
    torch.testing.assert_close(masked[mask], expected[mask])


def with_rounds(settings: dict[str, Any], tiny: Path) -> dict[str, Any]:
    settings["model"] |= {
        "target": {"name": str(tiny / "target")},
        "on_policy": {"depth": DEPTH, "share": 0.7},
        "loss": {"class_path": "OnPolicyKL", "init_args": {"avoidable": 0.1}},
    }
    return settings


def rows(settings: dict[str, Any]) -> list[dict[str, str]]:
    (file,) = Path(settings["runs_dir"]).glob("*/*/metrics.csv")
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_fit_resumes_to_the_same_weights(
    settings: dict[str, Any], tiny: Path, write: Callable[..., str], tmp_path: Path
) -> None:
    settings["model"]["optimizer"]["final_lr"] = 1.0  # the same rate whatever max_steps is
    config, longer = write(with_rounds(settings, tiny)), ["--allow_change", "[trainer.max_steps]"]
    folders = []
    for name, parts in (("whole", [12]), ("halves", [7, 12])):
        for steps in parts:
            runs = ["--runs_dir", str(tmp_path / name), "--trainer.max_steps", str(steps)]
            main(["fit", "--config", config, *runs, "--ckpt_path", "last", *longer])
        folders.append(max((tmp_path / name).glob("**/last.ckpt")))
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    settings["runs_dir"] = str(tmp_path / "whole")
    accepted = [float(row["train/round_accepted"]) for row in rows(settings) if row["train/round_accepted"]]
    assert accepted
    assert all(0 <= value <= DEPTH for value in accepted)


def test_without_a_target_or_with_features_it_is_refused(
    settings: dict[str, Any], write: Callable[..., str]
) -> None:
    settings["model"]["on_policy"] = {"depth": DEPTH}
    code, _, complaint = captured(["fit", "--config", write(settings)])
    assert code == 2
    assert "set model.target.name" in complaint
    block = BlockDrafter()
    with pytest.raises(ValueError, match="read tokens only"):
        DrafterModule(block, target=TargetSettings(), on_policy=OnPolicySettings())
    for wrong in ({"depth": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(ValueError, match=r"on_policy\."):
            OnPolicySettings(**wrong)


def test_training_on_rounds_lowers_the_loss(batch: Batch, drafter: CausalDrafter, tiny: Path) -> None:
    module = DrafterModule(
        drafter, L.OnPolicyKL(), target=TargetSettings(str(tiny / "target")), on_policy=OnPolicySettings(2)
    )
    assert module.online is not None
    optimizer = torch.optim.AdamW(drafter.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        written, rounds = write_rounds(drafter, batch, 2)
        outputs = module.online.read(written)
        steps = written.steps()
        logits = drafter.logits(written.input_ids, written.position_ids, written.document_ids)
        judged = outputs.at(rounds.steps.flatten())[:].greedy.view_as(rounds.steps)
        given = replace(outputs.at(steps)[:], rejected=rounds.rejected(judged, logits[..., 0].numel())[steps])
        loss = L.reduce(module.loss(logits.flatten(0, 1)[steps], given))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
