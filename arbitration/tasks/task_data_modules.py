"""DataModules of arbitration: problems for a policy, and rows that teach small models part of arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from certdraft.arbitration.tasks.arithmetic import OPERATORS, arithmetic, training_rows
from certdraft.arbitration.tasks.problems import Problem, load_problems, split_problems
from certdraft.data import ResumableLoader, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARITHMETIC = "arithmetic"
_SMALLEST_VOCAB = 261  # bytes and markers: one token a character


class ProblemBatch:
    """Some problems; a class that Lightning does not try to move to a device."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self.problems)


class ProblemDataModule(pl.LightningDataModule):
    """Problems to train and validate a policy on.

    Args:
        source: "arithmetic" (made on the spot), or a jsonl file; see `load_problems`.
        test_source: jsonl file of the test problems. Without it a share of `source` is held out for testing.
        held_out: share of a file that is held out for validation, and again for testing, by problem hash.
        train_problems: number of arithmetic problems.
        validation_problems: most problems of a validation.
        parts: of an arithmetic problem.
        batch_size: problems a step, on each device.
        seed: of the arithmetic problems and of their order.
    """

    def __init__(
        self,
        source: str = ARITHMETIC,
        test_source: str | None = None,
        held_out: float = 0.1,
        train_problems: int = 2000,
        validation_problems: int = 200,
        parts: int = 2,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.source, self.test_source, self.held_out = source, test_source, held_out
        self.train_problems, self.validation_problems = train_problems, validation_problems
        self.parts, self.batch_size, self.seed = parts, batch_size, seed
        self._splits: dict[str, list[Problem]] = {}

    def setup(self, stage: str | None = None) -> None:
        if self._splits:
            return
        self._splits = self._load()
        empty = [name for name, problems in self._splits.items() if not problems]
        if empty:
            raise ValueError(f"{self.source}: no problem is left for {', '.join(empty)}; change held_out")
        if self.trainer is None or self.trainer.is_global_zero:
            counts = ", ".join(f"{len(problems):,} {name}" for name, problems in self._splits.items())
            print(f"problems: {counts}", file=sys.stderr)

    def problems(self, split: str) -> list[Problem]:
        """All problems of a split: "train", "validation" or "test"."""
        self.setup()
        return self._splits[split]

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", shuffle=False)

    def _load(self) -> dict[str, list[Problem]]:
        if self.source == ARITHMETIC:
            train = arithmetic("train", self.train_problems, self.seed, self.parts)
            validation = arithmetic("validation", self.validation_problems, self.seed, self.parts)
            test = arithmetic("test", self.validation_problems, self.seed, self.parts)
        else:
            share = self.held_out
            problems = load_problems(self.source)
            if self.test_source is None:
                validation, test, train = split_problems(problems, (share, share, 1 - 2 * share))
            else:
                validation, train = split_problems(problems, (share, 1 - share))
                test = load_problems(self.test_source)
                known = {problem.digest for problem in test}
                train = [problem for problem in train if problem.digest not in known]
        return {"train": train, "validation": validation[: self.validation_problems], "test": test}

    def _loader(self, split: str, *, shuffle: bool) -> ResumableLoader:
        problems = self.problems(split)

        def fetch(rows: np.ndarray) -> ProblemBatch:
            return ProblemBatch([problems[row] for row in rows.tolist()])

        return ResumableLoader(
            len(problems),
            self.batch_size,
            cast(Any, fetch),
            seed=self.seed,
            shuffle=shuffle,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
        )


class ArithmeticDataModule(pl.LightningDataModule):
    """Rows that teach a fresh language model arithmetic, some of it more than the rest.

    Args:
        tokenizer_dir: folder of the tokenizer, one token a byte; made there if it is missing.
        sums: chance that the digits of a sum count in the loss, in [0, 1].
        products: the same of a product.
        parts: of a problem.
        rows: problems of an epoch; which of their digits count is drawn once.
        batch_size: rows a batch.
        seed: of problems, digits and order.
    """

    def __init__(
        self,
        tokenizer_dir: str,
        sums: float = 1.0,
        products: float = 1.0,
        parts: int = 2,
        rows: int = 20_000,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (0 <= sums <= 1 and 0 <= products <= 1):
            raise ValueError(f"sums={sums} and products={products} are chances, in [0, 1]")
        self.tokenizer_dir = Path(tokenizer_dir)
        self.skill = dict(zip(OPERATORS, (sums, products), strict=True))
        self.parts, self.rows, self.batch_size, self.seed = parts, rows, batch_size, seed

    def prepare_data(self) -> None:
        if not (self.tokenizer_dir / "tokenizer.json").exists():
            train_tokenizer([], _SMALLEST_VOCAB).save_pretrained(self.tokenizer_dir)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, one token a byte."""
        return load_tokenizer(str(self.tokenizer_dir))

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return self._loader(
            arithmetic("train", self.rows, self.seed, self.parts), self.skill, shuffle=True,
            generator=order, drop_last=True,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader:
        """Loss on all digits, also on those that are hardly taught."""
        problems = arithmetic("validation", 256, self.seed, self.parts)
        return self._loader(problems, dict.fromkeys(OPERATORS, 1.0))

    def _loader(self, problems: list[Problem], skill: dict[str, float], **settings: Any) -> DataLoader:
        tokenizer = self.tokenizer()
        characters = sorted(
            {character for problem in problems for character in problem.prompt + problem.answer}
        )
        ids = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in characters}
        end = tokenizer.eos_token_id
        rows, labels = training_rows(problems, skill, ids, end, np.random.default_rng(self.seed))
        return DataLoader(TensorDataset(rows, labels), batch_size=self.batch_size, **settings)
