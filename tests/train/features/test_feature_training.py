"""Training of drafters that read the target: loss by definition, gradients, exact resuming, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.runs.feature_training import data_of, loss_of, make
from torch import Tensor

from certdraft.data import load_target
from certdraft.drafters import CausalDrafter, EagleConfig, EagleDrafter
from certdraft.losses import (
    DepthWeights,
    HardCE,
    PrefixWeights,
    RunnerUpForgivingCE,
    StepWeights,
    prefix_weights,
)
from certdraft.train import DrafterModule
from certdraft.train.accumulation import Accumulation
from certdraft.train.commands.cli import main
from certdraft.train.drafter_setup import fit_to_target
from certdraft.train.target_outputs import TargetSettings, recorded

Write = Callable[..., str]


@pytest.mark.parametrize("weights", [None, DepthWeights(2.0), PrefixWeights(3, 0.5)], ids=str)
@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_loss_is_the_weighted_mean_over_paths(
    family: str, progress: float, weights: StepWeights | None, tiny: Path, trace: Path
) -> None:
    """From the trace and online, chunked and not: one number, written out path by path."""
    data = data_of(tiny)
    drafter = make(family)
    drafter.at(progress)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    torch.manual_seed(11)
    paths = drafter.paths(
        batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
    )
    assert paths.mask.shape[1] == (1 if progress < 0.5 else 3)
    total = weight = 0.0
    greedy = batch.head.greedy.flatten()
    for hidden, steps, mask in zip(paths.hidden, paths.steps, paths.mask, strict=True):
        num = int(mask.sum())
        nll = [-drafter.head(hidden[d]).double().log_softmax(-1)[greedy[steps[d]]].item() for d in range(num)]
        each = {"None": [1.0] * num}.get(str(weights))
        if isinstance(weights, DepthWeights):
            each = [2.718281828459045 ** (-d / 2) for d in range(num)]
        elif isinstance(weights, PrefixWeights):
            each = prefix_weights(torch.tensor(nll).neg().exp(), smoothing=0.5).tolist()
        total += sum(w * loss for w, loss in zip(each, nll, strict=True))
        weight += sum(each)
    online = TargetSettings(str(tiny / "target"))
    for settings in ({}, {"chunk_tokens": 0}, {"chunk_tokens": 5}, {"target": online}):
        module = DrafterModule(drafter, HardCE(), step_weights=weights, **settings)
        module._layers = data.meta.feature_layers
        assert loss_of(module, batch) == pytest.approx(
            total / weight, rel=2e-3 if "target" in settings else 1e-5
        )


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_losses_get_the_depth_of_every_draft_token(
    family: str, chunk_tokens: int, tiny: Path, trace: Path
) -> None:
    """A list of candidates by depth trains each depth with its own loss; a causal drafter refuses it."""
    data = data_of(tiny)
    drafter = make(family)
    drafter.at(1.0)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    torch.manual_seed(11)
    paths = drafter.paths(
        batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
    )
    total = 0.0
    for depth, m in enumerate((8, 2, 1)):
        inside = paths.mask[:, depth]
        target = recorded(batch, (), ()).at(paths.steps[inside, depth])
        total += RunnerUpForgivingCE(m)(drafter.head(paths.hidden[inside, depth]), target).sum().item()
    module = DrafterModule(drafter, RunnerUpForgivingCE([8, 2, 1]), chunk_tokens=chunk_tokens)
    module._layers = data.meta.feature_layers
    assert loss_of(module, batch) == pytest.approx(total / int(paths.mask.sum()), rel=1e-4)
    causal = DrafterModule(CausalDrafter(pretrained=str(tiny / "target")), RunnerUpForgivingCE([8, 2, 1]))
    with pytest.raises(ValueError, match="list by draft depth"):
        loss_of(causal, batch)


@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_training_begins_with_short_rounds(family: str, tiny: Path, trace: Path) -> None:
    """Half of it by default, as many tokens a step as ever; validation always sees full rounds; a published
    drafter is past that."""
    drafter = make(family)
    fit_to_target(drafter, None, data_of(tiny))
    batch = next(iter(data_of(tiny).val_dataloader()))
    run = (batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features)
    long = drafter.paths(*run)
    drafter.at(0.49)
    short = drafter.paths(*run)
    assert (short.mask.shape[1], long.mask.shape[1]) == (1, 3)
    assert torch.equal(short.hidden[:, 0], long.hidden[:, 0]) == (family == "eagle")  # blocks: fewer masks
    if family != "eagle":
        assert len(short.mask) == (2 if family == "block" else 3) * len(long.mask)
    assert drafter.paths(*run, every=True).mask.shape[1] == 3
    drafter.at(0.5)
    assert drafter.paths(*run).mask.shape[1] == 3
    assert make(family, short_until=0.0).short_until == 0.0
    with pytest.raises(ValueError, match=r"short_until is 1.0.*\[0, 1\)"):
        make(family, short_until=1.0)


@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_killed_and_resumed_runs_end_alike(
    family: str, settings: dict[str, Any], write: Write, tiny: Path, trace: Path, tmp_path: Path
) -> None:
    """Anchors are drawn from the step's seed, the draft vocabulary from the trace."""
    config = {"target_layer_ids": [0]}
    if family == "eagle":
        init = {"config": config | {"draft_vocab_size": 200}, "unroll": 2, "max_lost_coverage": 0.5}
        settings["model"]["drafter"] = {"class_path": "EagleDrafter", "init_args": init}
    else:
        init = {"config": config | {"num_hidden_layers": 1, "block_size": 4}, "num_anchors": 3}
        kind = {"block": "BlockDrafter", "dspark": "DSparkDrafter"}[family]
        settings["model"]["drafter"] = {"class_path": kind, "init_args": init}
    init["short_until"] = 0.1  # the first step, of five as of eight
    factors = [
        {"class_path": "DepthWeights", "init_args": {"gamma": 4.0}},
        {"class_path": "LowMarginWeights", "init_args": {"threshold": 0.2}},
    ]
    settings["model"]["step_weights"] = {"class_path": "ProductWeights", "init_args": {"factors": factors}}
    for split in ("train", "validation"):
        settings["data"][split] = str(tiny / f"{split}-features")
    ends = []
    for name, stops in (("straight", [8]), ("stopped", [5, 8])):
        for stop in stops:
            run = settings | {
                "runs_dir": str(tmp_path / name),
                "trainer": settings["trainer"] | {"max_steps": 8},
            }
            arguments = ["fit", "--config", write(run)]
            if stop != 8:
                arguments += ["--trainer.max_steps", str(stop)]
            elif len(stops) > 1:
                arguments += ["--ckpt_path", "last", "--allow_change", '["trainer.max_steps"]']
            main([*arguments, "--model.optimizer.schedule", "constant"])
        (file,) = (tmp_path / name).glob("tiny/*/checkpoints/last.ckpt")
        ends.append(torch.load(file, weights_only=True))
    one, two = ends
    assert one["global_step"] == two["global_step"] == 8
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert not any("embed" in name for name in one["state_dict"]), "the target stays out of the checkpoint"
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_what_does_not_fit_is_refused(tiny: Path, trace: Path) -> None:
    plain = data_of(tiny, suffix="")
    with pytest.raises(ValueError, match=r"holds no features and lacks \[0\].*--model.target.name"):
        fit_to_target(make("eagle"), None, plain)
    other = EagleDrafter(EagleConfig(target_layer_ids=(1,)))
    with pytest.raises(ValueError, match="layers 0 to 1, of which 0 to 0"):
        fit_to_target(other, None, plain)
    with pytest.raises(ValueError, match="misses too many.*missed: "):
        fit_to_target(make("eagle", draft_vocab_size=3), None, data_of(tiny))
    with pytest.raises(ValueError, match="give a trace to count in"):
        make("eagle", draft_vocab_size=30).build(304, load_target(str(tiny / "target")))


def test_gradients_reach_every_trained_weight(
    tiny: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tiny)
    batch = next(iter(data.val_dataloader()))
    for family in ("eagle", "block", "dspark"):
        drafter = make(family)
        fit_to_target(drafter, None, data)
        module = DrafterModule(drafter.train())
        module._layers = data.meta.feature_layers
        total: list[Tensor] = []
        monkeypatch.setattr(Accumulation, "scaled", lambda self, loss, *_, total=total: total.append(loss))
        loss_of(module, batch)
        total[0].backward()
        for name, parameter in drafter.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
