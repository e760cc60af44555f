"""The loader's order and position, alone and under Lightning, interrupted at every step."""

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from certdraft.data import ResumableLoader


def loader(num_rows: int = 10, batch_size: int = 3, **settings: object) -> ResumableLoader:
    return ResumableLoader(num_rows, batch_size, lambda rows: torch.from_numpy(np.asarray(rows)), **settings)


def epochs(source: ResumableLoader, count: int) -> list[list[int]]:
    return [batch.tolist() for _ in range(count) for batch in source]


def test_order_follows_from_seed_and_epoch() -> None:
    twice = epochs(loader(), 2)
    assert twice == epochs(loader(), 2)
    assert twice != epochs(loader(seed=1), 2)
    assert twice[:3] != twice[3:]
    for epoch in (twice[:3], twice[3:]):
        assert len(set(sum(epoch, []))) == 9  # one row of ten waits for another epoch


def test_in_order_hands_out_everything() -> None:
    assert epochs(loader(shuffle=False), 1) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len(loader(shuffle=False)) == 4


@pytest.mark.parametrize("num_rows", [4, 24, 25])
def test_processes_share_every_epoch(num_rows: int) -> None:
    parts = [epochs(loader(num_rows, rank=rank, world_size=4), 1) for rank in range(4)]
    assert len({len(part) for part in parts}) == 1  # the same number of batches everywhere
    assert {len(batch) for part in parts for batch in part} == {3}
    rows = [row for part in parts for batch in part for row in batch]
    assert len(set(rows)) == min(len(rows), num_rows)


@pytest.mark.parametrize("num_rows", [1, 5, 9, 10, 30])
def test_in_order_every_process_has_as_many_batches(num_rows: int) -> None:
    """Ranks that run out of rows get the first batch again, counting for nothing."""
    parts = []
    for rank in range(4):
        source = loader(num_rows, shuffle=False, rank=rank, world_size=4, uncounted=lambda batch: -1 - batch)
        parts.append([batch.tolist() for batch in source])
        assert len(source) == len(parts[-1])
    assert len({len(part) for part in parts}) == 1
    counted = [row for part in parts for batch in part for row in batch if row >= 0]
    assert sorted(counted) == list(range(num_rows))
    uncounted = [batch for part in parts for batch in part if batch[0] < 0]
    assert len(uncounted) == -(-num_rows // 12) * 4 - -(-num_rows // 3)
    assert all(batch == [-1, -2, -3][:num_rows] for batch in uncounted)


def test_fewer_rows_than_a_batch() -> None:
    assert sorted(epochs(loader(2), 1)[0]) == [0, 1]
    with pytest.raises(ValueError, match="got 0 rows, batch_size=3"):
        loader(0)


@pytest.mark.parametrize("taken", range(8))
def test_position_is_exact(taken: int) -> None:
    straight = epochs(loader(), 4)
    first, stream = loader(), []
    while len(stream) < taken:
        for batch in first:
            stream.append(batch.tolist())
            if len(stream) == taken:
                break
    second = loader()
    second.load_state_dict(first.state_dict())
    assert (stream + epochs(second, 3))[:9] == straight[:9]


def test_position_in_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="num_rows: 10 there, 11 now; batch_size: 3 there, 2 now"):
        loader(11, 2).load_state_dict(loader().state_dict())


class Seen(pl.LightningModule):
    """Remembers the rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def training_step(self, batch: Tensor) -> Tensor:
        self.rows.append(batch.tolist())
        return self.weight * 0

    def validation_step(self, batch: Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], 0.1)


def fit(steps: int, folder: Path, resume: str = "") -> list[list[int]]:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    model = Seen()
    options = {"ckpt_path": resume, "weights_only": True} if resume else {}
    trainer.fit(model, loader(), loader(shuffle=False), **options)
    trainer.save_checkpoint(folder / "end.ckpt")
    return model.rows


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("cut", [2, 3, 4])
def test_lightning_resumes_at_every_step(tmp_path: Path, cut: int) -> None:
    straight = epochs(loader(), 3)[:8]  # three batches an epoch: the cuts lie within epochs and at their ends
    assert fit(cut, tmp_path) == straight[:cut]
    for checkpoint in ("end.ckpt", f"step={cut}.ckpt"):  # saved after the run, and after the step
        assert fit(8, tmp_path, resume=str(tmp_path / checkpoint)) == straight[cut:]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_batches_made_ahead_change_nothing(ahead: int, stop: int) -> None:
    """Same order, same position to resume from at every batch, although later batches exist already."""
    plain, early = loader(), loader(ahead=ahead)
    assert epochs(plain, 1) == epochs(early, 1)
    handed = []
    for batch in early:
        handed.append(batch.tolist())
        if len(handed) == stop:
            break
    resumed = loader(ahead=ahead)
    resumed.load_state_dict(early.state_dict())
    rest = epochs(resumed, 1) if stop else []
    assert handed + rest == epochs(plain, 1)


def test_a_batch_that_cannot_be_made_fails_in_its_turn() -> None:
    def fetch(rows: np.ndarray) -> Tensor:
        if 6 in rows:
            raise OSError("torn page")
        return torch.from_numpy(rows)

    made = iter(ResumableLoader(12, 3, fetch, shuffle=False, ahead=3))
    assert [next(made).tolist(), next(made).tolist()] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(OSError, match="torn page"):
        next(made)
