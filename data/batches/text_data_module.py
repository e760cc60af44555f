"""Plain language-model rows for pre-training a small target: a tokenised stream cut into equal rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from certdraft.data.corpus.bpe_tokenizer import train_tokenizer
from certdraft.data.corpus.standard_library import Split, standard_library
from certdraft.data.targets import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(pl.LightningDataModule):
    """Standard-library text as rows of token ids, split by file.

    Documents follow each other in the stream, each closed by the end-of-text token.

    Args:
        tokenizer_dir: folder of the tokenizer; trained on the train split and saved there if it is missing.
        vocab_size: size of a tokenizer that has to be trained.
        seq_len: tokens a row.
        batch_size: rows a batch.
        seed: of the order of rows.
    """

    def __init__(
        self,
        tokenizer_dir: str,
        vocab_size: int = 2040,
        seq_len: int = 512,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tokenizer_dir = Path(tokenizer_dir)
        self.vocab_size, self.seq_len, self.batch_size, self.seed = vocab_size, seq_len, batch_size, seed

    def prepare_data(self) -> None:
        if not (self.tokenizer_dir / "tokenizer.json").exists():
            texts = (document.text for document in standard_library("train"))
            train_tokenizer(texts, self.vocab_size).save_pretrained(self.tokenizer_dir)

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, generator=order, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.tokenizer_dir))

    def rows(self, split: Split) -> Int[Tensor, "R T"]:
        """All full rows of a split, in document order."""
        tokenizer = self.tokenizer()
        texts = [document.text for document in standard_library(split)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        stream = np.concatenate([np.asarray([*document, tokenizer.eos_token_id]) for document in ids])
        count = len(stream) // self.seq_len
        return torch.from_numpy(stream[: count * self.seq_len]).view(count, self.seq_len)

    def _loader(self, split: Split, **settings: Any) -> DataLoader:
        return DataLoader(TensorDataset(self.rows(split)), batch_size=self.batch_size, **settings)
