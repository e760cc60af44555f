"""The loss of a confidence head, and what `certdraft fit` does with the drafters that have one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from certdraft.data import Corpus, Generation, TraceDataModule, record_trace
from certdraft.drafters import DSparkConfig, DSparkDrafter
from certdraft.losses import LK, DepthWeights, HardCE, StepWeights, TargetBatch
from certdraft.train import DrafterModule
from certdraft.train.drafter_setup import fit_to_target
from certdraft.train.target_outputs import TargetSettings

TRAINER = {
    "world_size": 1, "accumulate_grad_batches": 1, "global_step": 0, "log_every_n_steps": 1,
    "optimizers": [SimpleNamespace(param_groups=[{"lr": 1.0}])],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> TraceDataModule:
    """The tiny target's trace with the features of its first layer."""
    folder = tmp_path_factory.mktemp("trace") / "features"
    record_trace(
        str(folder), str(tiny / "target"), Corpus(source=str(tiny / "corpus.jsonl")),
        generation=Generation(max_new_tokens=24, loops="keep"), accelerator="cpu", feature_layers=(0,),
    )  # fmt: skip
    module = TraceDataModule(str(folder), validation=str(folder), seq_len=256, batch_size=4)
    module.setup("fit")
    return module


def minimised(module: DrafterModule, batch: object) -> tuple[float, dict[str, float]]:
    """What a training step minimises, and what it logs, without a Trainer."""
    logged: dict[str, float] = {}

    def log(values: dict[str, torch.Tensor | float], **_: object) -> None:
        logged.update({name: float(torch.as_tensor(value).detach()) for name, value in values.items()})

    module.log_dict = log  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(**TRAINER)  # type: ignore[assignment]
    module._accumulation = SimpleNamespace(scaled=lambda loss, *_: loss)  # type: ignore[assignment]
    return float(module.training_step(batch, 0).detach()), logged


@pytest.mark.parametrize("weights", [None, DepthWeights(2.0)], ids=str)
def test_confidence_learns_the_overlap(
    weights: StepWeights | None, tiny: Path, data: TraceDataModule
) -> None:
    """Beside the loss: cross-entropy with Σ min(p, q), written out draft by draft; chunked, whole, online."""
    config = DSparkConfig(num_hidden_layers=1, target_layer_ids=(0,), block_size=3, markov_rank=4)
    drafter = DSparkDrafter(config, num_anchors=256, confidence_weight=0.25)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        paths = drafter.paths(
            batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
        )
    hidden = paths.hidden[paths.mask]
    target = TargetBatch(batch.head.flatten()[paths.steps[paths.mask]])
    overlap = torch.exp(-LK("alpha")(drafter.head(hidden), target)).detach().double()
    sure = drafter.confidence(hidden).detach().double().sigmoid()
    each = -(overlap * sure.log() + (1 - overlap) * (1 - sure).log())
    depth = paths.mask.nonzero()[:, 1].double()
    weight = torch.ones_like(each) if weights is None else torch.exp(-depth / 2.0)
    wanted = float((weight * each).sum() / weight.sum())
    assert 0.0 < float(overlap.min()) < float(overlap.max()) < 1.0
    online = TargetSettings(str(tiny / "target"), num_kept=batch.head.ids.shape[-1], full=False)
    for settings in ({}, {"chunk_tokens": 0}, {"chunk_tokens": 5}, {"target": online}):
        module = DrafterModule(drafter, HardCE(), step_weights=weights, **settings)
        module._layers = data.meta.feature_layers
        total, logged = minimised(module, batch)
        close = 2e-3 if "target" in settings else 1e-5
        assert logged["train/confidence_nats"] == pytest.approx(wanted, rel=close)
        assert total == pytest.approx(logged["train/loss_nats"] + 0.25 * logged["train/confidence_nats"])
