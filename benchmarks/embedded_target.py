"""Train the embedded target and package it with its provenance.

    python benchmarks/embedded_target.py                    # train (about an hour on 2 cores), then package
    python benchmarks/embedded_target.py --checkpoint C     # package an existing checkpoint

Writes data/embedded/: bf16 weights, tokenizer, generation config and provenance.json with what made them and
the held-out losses of the very weights that ship.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from certdraft.data.batches.text_data_module import TextDataModule
from certdraft.data.corpus.standard_library import corpus_sha256, standard_library
from certdraft.data.targets import embedded_target_path, load_target
from certdraft.train.target_module import TargetModule

CONFIG = Path("configs/target/embedded.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="package this checkpoint instead of training")
    parser.add_argument("--out", type=Path, default=embedded_target_path())
    arguments = parser.parse_args()
    config = yaml.safe_load(CONFIG.read_text())
    checkpoint = arguments.checkpoint
    if checkpoint is None:
        subprocess.run([sys.executable, "-m", "certdraft", "fit", "--config", str(CONFIG)], check=True)
        checkpoint = max(
            Path("runs/embedded-target").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime
        )
    package(checkpoint, config, arguments.out)


def package(checkpoint: Path, config: dict, out: Path) -> None:
    """Write the folder and check that what was written is what was trained, up to bf16 rounding."""
    from transformers import GenerationConfig

    module = TargetModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    data = TextDataModule(**config["data"]["init_args"])
    data.prepare_data()
    tokenizer = data.tokenizer()
    model = module.model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shipped = load_target(str(out))
    held_out = {split: measure(shipped, data, split) for split in ("validation", "test")}
    steps = torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    seq_len, batch_size = data.seq_len, data.batch_size
    provenance = {
        "what": "Qwen3-architecture language model of the Python standard library, trained from scratch",
        "text_licence": "Python Software Foundation License; read on the user's machine, not shipped",
        "command": "python benchmarks/embedded_target.py",
        "config": config,
        "steps": steps,
        "tokens_seen": steps * seq_len * batch_size,
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "text": {
            split: {"files": len(documents), "sha256": corpus_sha256(documents)}
            for split in ("train", "validation", "test")
            if (documents := standard_library(split))
        },
        "held_out": held_out,
        "weights_sha256": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "pytorch-lightning", "tokenizers")
        },
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(json.dumps(held_out, indent=1))


@torch.no_grad()
def measure(model: torch.nn.Module, data: TextDataModule, split: str) -> dict[str, float]:
    """Loss of non-overlapping rows; every row starts without context, so this is an upper bound."""
    total, count = 0.0, 0
    for rows in data.rows(split).split(data.batch_size):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + losses.item(), count + rows[:, 1:].numel()
    characters = sum(len(document.text) for document in standard_library(split)) / data.rows(split).numel()
    nats = total / count
    return {
        "nats_per_token": round(nats, 4),
        "perplexity_per_token": round(math.exp(nats), 3),
        "bits_per_character": round(nats / math.log(2) / characters, 4),
        "tokens": count,
    }


if __name__ == "__main__":
    main()
