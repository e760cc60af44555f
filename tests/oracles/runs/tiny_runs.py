"""A target, a corpus and a drafter so small that a training run takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target/ (random weights, sharp logits), corpus.jsonl and recorded traces."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from certdraft.data import Corpus, Generation, record_trace
    from certdraft.data.corpus.bpe_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    text = " ".join("\n".join(path.read_text(encoding="utf-8") for path in sources).split())
    train_tokenizer([text], 300).save_pretrained(folder / "target")
    torch.manual_seed(0)
    config = Qwen3Config(
        **{**SIZES, "hidden_size": 32, "num_hidden_layers": 2}, vocab_size=304, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "target")
    rows = [json.dumps({"prompt": text[i : i + 120]}) for i in range(0, 60 * 120, 120)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    for split in ("train", "validation"):
        corpus = Corpus(source=str(folder / "corpus.jsonl"), split=split, validation_fraction=0.2)
        record_trace(
            str(folder / split), str(folder / "target"), corpus,
            generation=Generation(max_new_tokens=24, loops="keep"), accelerator="cpu",
        )  # fmt: skip
    return folder


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A config of 12 steps with dropout, to be changed and written by `write`."""
    return run_settings(tiny, tmp_path / "runs")


def run_settings(tiny: Path, runs: Path) -> dict[str, Any]:
    """A config of 12 steps with dropout."""
    drafter = {"class_path": "CausalDrafter", "init_args": {"config": {**SIZES, "attention_dropout": 0.1}}}
    return {
        "seed_everything": 3,
        "name": "tiny",
        "runs_dir": str(runs),
        "model": {"drafter": drafter, "optimizer": {"lr": 3e-3, "warmup_steps": 2}},
        "data": {
            "train": str(tiny / "train"), "validation": str(tiny / "validation"),
            "seq_len": 64, "batch_size": 4,
        },
        "checkpoint": {"every_n_train_steps": 5},
        "trainer": {
            "accelerator": "cpu", "max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None,
            "log_every_n_steps": 2, "enable_model_summary": False, "num_sanity_val_steps": 0,
        },
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes settings as YAML and gives the file's path."""

    def to_file(settings: dict[str, Any], name: str = "tiny.yaml") -> str:
        (tmp_path / name).write_text(yaml.safe_dump(settings))
        return str(tmp_path / name)

    return to_file
