"""Every shipped training config runs from its prompts to a profiled export, on a shrunken target.

What is shrunken: widths, vocabulary, text and the number of steps; numbers of layers, layers read, precision,
losses, optimiser and accumulation are as shipped. Adapters are trained on a shrunken drafter.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import certdraft
from certdraft.decoding import CostModel
from certdraft.train.commands.cli import captured
from certdraft.train.plan.model_sizes import read_config

CONFIGS = Path(certdraft.__file__).parent / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*/*.yaml"), *CONFIGS.glob("real/*.yaml")])
QUICK = ("recipes/qwen3-8b/causal-lora", "recipes/qwen3-8b/dflash", "real/eagle3")
VOCABULARY = 320  # 300 of the tokenizer, padded as Qwen3's is
NARROW = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def saved(folder: Path, architecture: str, layers: int, tokenizer: Any) -> Path:
    """A random causal language model and a tokenizer with Qwen3's way of a chat."""
    import transformers

    torch.manual_seed(0)
    experts = EXPERTS if architecture == "Qwen3Moe" else {}
    config = getattr(transformers, f"{architecture}Config")(**NARROW, **experts, num_hidden_layers=layers)
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from certdraft.data.corpus.bpe_tokenizer import train_tokenizer

    text = " ".join(Path(json.__file__).read_text(encoding="utf-8").split())
    made = train_tokenizer([text], 300)
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    return made


def resolved(config: Path) -> dict[str, Any]:
    code, text, complaint = captured(["fit", "--config", str(config), "--print_config"])
    assert not code, complaint
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def layers_of(target: str) -> int:
    """Layers of the target that a config names."""
    known = {"embedded": 8, "HuggingFaceTB/SmolLM2-135M-Instruct": 30}
    return known.get(target) or int(read_config(target).num_hidden_layers)


def shrunken(config: Path, architecture: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """The settings of a config for a small target of the same depth."""
    settings = copy.deepcopy(resolved(config))
    data, model = settings["data"]["init_args"], settings["model"]["init_args"]
    name = data["record"]["target"]
    small = saved(folder / "target", architecture, layers_of(name), tokenizer)
    words = Path(json.__file__).read_text(encoding="utf-8").split()
    chats = [[{"role": "user", "content": " ".join(words[i : i + 4])}] for i in range(0, 240, 4)]
    rows = [json.dumps({"messages": chat}) for chat in chats]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    record = data["record"]
    record["target"] = str(small)
    record["corpus"] |= {"source": str(folder / "prompts.jsonl"), "validation_fraction": 0.2}
    record["corpus"] |= {"kind": "messages", "max_rows": None}
    record["prompts"] = {"max_prompt_tokens": 64}
    record["generation"] = {"max_new_tokens": 24, "max_length": 96, "loops": "keep"}
    record["batch_size"] = 8
    data |= {"train": str(folder / "train"), "validation": str(folder / "validation")}
    data |= {"seq_len": 96, "batch_size": 2, "validation_rows": 4}
    if model["target"]:
        model["target"]["name"] = str(small)
    drafter = model["drafter"]["init_args"]
    if drafter.get("pretrained"):
        drafter["pretrained"] = str(saved(folder / "small", "Qwen3", 2, tokenizer))
    shape = drafter.get("config") or {}
    if shape.get("hidden_size"):
        shape |= {key: value for key, value in NARROW.items() if key in shape}
    if shape.get("draft_vocab_size"):
        shape["draft_vocab_size"], drafter["max_lost_coverage"] = 200, 1.0
    if shape.get("mask_token_id"):
        shape["mask_token_id"] = VOCABULARY - 1
    settings |= {"runs_dir": str(folder / "runs"), "name": "run"}
    settings["checkpoint"]["every_n_train_steps"] = 5
    settings["trainer"] |= {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_steps": 10}
    settings["trainer"] |= {"val_check_interval": 5, "log_every_n_steps": 5, "enable_model_summary": False}
    return settings


def done(*typed: str) -> str:
    code, text, complaint = captured(list(typed))
    assert not code, f"certdraft {' '.join(typed)}\n{text[-2000:]}\n{complaint[-4000:]}"
    return text


def cases() -> list[Any]:
    """Every config for two architectures; a few of them in the quick suite."""
    found = []
    for config in SHIPPED:
        name = str(config.relative_to(CONFIGS).with_suffix(""))
        for architecture in ("Qwen3Moe" if "30b-a3b" in name else "Qwen3", "Llama"):
            quick = name in QUICK and architecture == "Llama"
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(config, architecture, id=f"{name}-{architecture}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore")  # Lightning and transformers warn about runs this small
@pytest.mark.parametrize(("config", "architecture"), cases())
def test_it_records_trains_resumes_exports_and_drafts(
    config: Path, architecture: str, tmp_path: Path, tokenizer: Any
) -> None:
    settings = shrunken(config, architecture, tmp_path, tokenizer)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done("doctor", "--hub", "false", "--fit_config", str(file))
    done("fit", "--config", str(file))
    assert (tmp_path / "train" / "trace.json").exists()
    settings["trainer"]["max_steps"] = 12
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done("fit", "--config", str(file), "--ckpt_path", "last", "--allow_change", "[trainer.max_steps]")
    (run,) = (tmp_path / "runs" / "run").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 12
    out, target = str(tmp_path / "drafter"), str(tmp_path / "target")
    done("export", str(run), "--out", out)
    done("lint", out)
    costs = tmp_path / "cost.json"
    sizes = ["--contexts", "[16]", "--nodes", "[0, 1, 2, 4]", "--repeats", "1"]
    done("profile", "--drafter", out, "--target", target, "--out", str(costs), *sizes)
    assert CostModel.load(costs)
