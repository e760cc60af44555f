"""A drafter kind that is not in the package: one class and one registration, and everything works with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from certdraft.certificates import Head
from certdraft.data import Batch
from certdraft.decoding import Chain, decode, greedy
from certdraft.drafters import (
    Drafter,
    Engines,
    ExportRequest,
    TargetSource,
    drafter_kinds,
    export,
    lint_export,
    load_drafter,
    read_facts,
    register_drafter,
)
from certdraft.losses import ForwardKL
from certdraft.train import DrafterModule, OptimizerSettings

V = 96


@register_drafter("toy")
class BigramDrafter(Drafter):
    """The next token from the current one: an embedding and an output layer, and no state but the text."""

    kind: Literal["conditional", "marginal"] = "conditional"
    description: ClassVar[str] = "a bigram model"
    export_formats: ClassVar[dict[str, Engines]] = {"bigram": Engines()}

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size

    def build_from_target(self, target: TargetSource) -> Self:
        self.embedding = nn.Embedding(target.vocab_size, self.size)
        self.output = nn.Linear(self.size, target.vocab_size)
        return self

    @property
    def vocab_size(self) -> int:
        return self.output.out_features

    def hidden(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        return functional.silu(self.embedding(input_ids))

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden).float()

    def start(self, ids: Any, features: Tensor | None = None) -> list[int]:
        return []

    @torch.no_grad()
    def draft(self, state: list[int], tokens: Any, parents: Any) -> Tensor:
        return self.logits(torch.as_tensor(tokens)[None])[0]

    def commit(self, state: list[int], path: Sequence[int], features: Tensor | None = None) -> None:
        return

    def write(self, folder: Path, request: ExportRequest) -> nn.Module:
        (folder / "config.json").write_text(json.dumps({"size": self.size}))
        save_file(self.state_dict(), folder / "model.safetensors")
        return self

    @classmethod
    def from_folder(cls, folder: Path, *, vocab_size: int, **_: Any) -> Self:
        made = cls(**json.loads((folder / "config.json").read_text()))
        made.build_from_target(source(vocab_size))
        made.load_state_dict(load_file(folder / "model.safetensors"))
        return made.eval()


def source(vocab_size: int) -> TargetSource:
    """A target that a bigram model asks nothing but its vocabulary."""

    def fail() -> Any:
        raise AssertionError("the target is not needed")

    return TargetSource("target", vocab_size, fail, fail)


class GreedyText(pl.LightningDataModule):
    """The target's own greedy text in one batch, with its distributions."""

    def __init__(self, target: Qwen3ForCausalLM) -> None:
        super().__init__()
        prompts = [[3, 1, 4], [1, 5, 9]]
        ids = torch.tensor([prompt + greedy(target, prompt, 29) for prompt in prompts])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        head = Head.from_logits(target(ids).logits, 16)
        self.batch = Batch(ids, positions, torch.zeros_like(ids), torch.ones_like(ids).bool(), head)
        facts = {"target": "target", "tokenizer_fingerprint": "ab" * 32, "feature_layers": ()}
        self.meta = SimpleNamespace(vocab_size=V, **facts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * 40, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch], batch_size=None)


@pytest.fixture
def trained(target: Qwen3ForCausalLM) -> BigramDrafter:
    """A toy drafter after 40 training steps."""
    pl.seed_everything(0, verbose=False)
    target.requires_grad_(False)
    drafter = BigramDrafter()
    module = DrafterModule(drafter, ForwardKL(), OptimizerSettings(lr=0.05, warmup_steps=1))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=40,
    )  # fmt: skip
    data = GreedyText(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning on itself, and on a loader without workers
        trainer.fit(module, data)
    assert trainer.callback_metrics["val/coverage@1"] > 0.3, "chance is 0.01"
    return drafter.eval()


def test_a_new_kind_trains_decodes_and_exports(
    target: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, trained: BigramDrafter
) -> None:
    assert drafter_kinds()["toy"] is BigramDrafter
    for prompt in ([3, 1, 4], [7, 7]):
        found = decode(target, trained, prompt, Chain(3), max_new_tokens=20)
        assert found.tokens == greedy(target, prompt, 20)
        assert sum(r.accepted for r in found.rounds) > 0 or prompt == [7, 7]

    folder = export(trained, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
    facts = read_facts(folder)
    assert (facts["family"], facts["format"], facts["vocab_size"]) == ("toy", "bigram", V)
    assert lint_export(folder) == (), "a kind without rules of its own is not checked by those of another"
    card = (folder / "README.md").read_text()
    assert "made for 3 draft tokens" in card
    assert "vllm" not in card
    loaded = load_drafter(folder)
    assert isinstance(loaded, BigramDrafter)
    ids = torch.arange(V)[None]
    assert torch.equal(loaded.logits(ids), trained.logits(ids))
    with pytest.raises(ValueError, match="unknown export format 'eagle3' for BigramDrafter; there is bigram"):
        export(trained, tmp_path / "other", "eagle3", tokenizer=tokenizer, draft_length=3)


def test_a_name_has_one_class() -> None:
    with pytest.raises(ValueError, match="family 'toy' is BigramDrafter already"):

        @register_drafter("toy")
        class Other(BigramDrafter):
            pass


def test_a_class_that_is_not_registered(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    class Nameless(BigramDrafter):
        family = ""

    with pytest.raises(ValueError, match="Nameless cannot be exported: it needs @register_drafter"):
        export(Nameless(), tmp_path / "out", tokenizer=tokenizer, draft_length=3)
