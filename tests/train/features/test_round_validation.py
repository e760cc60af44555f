"""Validation of drafters that read the target: rounds, as decoding counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles.runs.feature_training import data_of, learn, make, wide

from certdraft.train import DrafterModule, ValidationSettings
from certdraft.train.drafter_setup import fit_to_target


@pytest.mark.parametrize("num_anchors", [5, 1000])
@pytest.mark.parametrize("family", ["block", "dspark"])
def test_validation_drafts_no_more_blocks_than_training(
    family: str, num_anchors: int, tiny: Path, trace: Path
) -> None:
    data = data_of(tiny)
    drafter = make(family, num_anchors=num_anchors, short_until=0.0)
    fit_to_target(drafter, None, data)
    module = DrafterModule(drafter)
    module._layers = data.meta.feature_layers
    tokens: list[int] = []
    drafter.layers[0].mlp.register_forward_hook(lambda _, given, __: tokens.append(given[0][..., 0].numel()))
    module.on_validation_epoch_start()
    for index, batch in enumerate(data.val_dataloader()):
        with torch.no_grad():
            module.validation_step(batch, index)
            validating, _ = sum(tokens), tokens.clear()
            module._paths(batch)
            training, _ = sum(tokens), tokens.clear()
        assert 0 < validating <= training
    assert module._sums is not None
    steps = dict(zip(module._sums.names, module._sums.sums.tolist(), strict=True))["steps"]
    counts = torch.cat([batch.loss_mask.sum(-1) for batch in data.val_dataloader()])
    assert steps == counts.clamp(max=num_anchors).sum()


def test_validation_is_of_the_rounds(tiny: Path, trace: Path) -> None:
    data = data_of(tiny)
    for family in ("eagle", "block", "dspark", "few"):
        drafter = make("block") if family == "few" else make(family, **wide(family))
        fit_to_target(drafter, None, data)
        module = DrafterModule(drafter, validation=ValidationSettings(depth=3))
        learn(drafter, next(iter(data.val_dataloader())))
        module._layers = data.meta.feature_layers
        module.on_validation_epoch_start()
        tokens = rounds = steps = hits = 0
        for index, batch in enumerate(data.val_dataloader()):
            with torch.no_grad():
                module.validation_step(batch, index)
                mask = drafter.validation_mask(batch.input_ids, batch.loss_mask)
                assert torch.equal(mask, batch.loss_mask) == (family != "few")
                paths = drafter.paths(
                    batch.input_ids, batch.position_ids, batch.document_ids, mask, batch.features, every=True
                )
                right = drafter.head(paths.hidden).argmax(-1) == batch.head.greedy.flatten()[paths.steps]
            steps, hits = steps + len(right), hits + int(right[:, 0].sum())
            runs = {
                int(path[0]): int((right[i] & paths.mask[i]).cumprod(0).sum())
                for i, path in enumerate(paths.steps)
            }
            counted = mask.flatten().nonzero().flatten().tolist()
            documents, num = batch.document_ids.flatten(), batch.input_ids.shape[1]
            end, place = 0, (-1, -1)  # of the round under way
            for step in counted:
                tokens += 1
                here = (step // num, int(documents[step]))
                if here != place or step >= end:
                    rounds, end, place = rounds + 1, step + runs.get(step, 0) + 1, here
        found = module._sums.metrics()
        assert found["coverage@1"] == pytest.approx(hits / steps)
        assert found["tau_expected"] == pytest.approx(tokens / rounds)
        assert hits > 0
