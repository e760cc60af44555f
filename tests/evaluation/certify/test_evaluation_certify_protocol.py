"""The published protocol's configs, offline: UltraChat's columns, a local Qwen3, the rest as shipped."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import Qwen3Config, Qwen3ForCausalLM

import certdraft
from certdraft.data import load_tokenizer, open_trace
from certdraft.train.commands.cli import main

CONFIGS = Path(certdraft.__file__).parent / "configs" / "certify"
SIZES = ("1.7b", "4b")
LONG = "Read the passage below and write a summary of its main points in three sentences. " * 3
# Columns and types of HuggingFaceH4/ultrachat_200k, split test_sft.
COLUMNS = Features(
    {
        "prompt": Value("string"),
        "prompt_id": Value("string"),
        "messages": List({"content": Value("string"), "role": Value("string")}),
    }
)


@pytest.fixture(scope="module")
def ultrachat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the prompts are too short for the protocol."""
    rows = []
    for i in range(18):
        prompt = f"Topic {i}." if i % 3 == 0 else f"Topic {i}. {LONG}"
        turns = [("user", prompt), ("assistant", f"Answer {i}."), ("user", "More?"), ("assistant", "No.")]
        messages = [{"content": content, "role": role} for role, content in turns]
        rows.append({"prompt": prompt, "prompt_id": f"{i:064x}", "messages": messages})
    folder = tmp_path_factory.mktemp("ultrachat") / "ultrachat_200k"
    test = Dataset.from_list(rows, features=COLUMNS)
    DatasetDict({"train_sft": test.select([0]), "test_sft": test}).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, folder = load_tokenizer(), tmp_path_factory.mktemp("target") / "Qwen3-tiny"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_two_published_targets_differ_in_name_only() -> None:
    small, large = (yaml.safe_load((CONFIGS / f"paper-qwen3-{size}.yaml").read_text()) for size in SIZES)
    changed = {key for key in small | large if small.get(key) != large.get(key)}
    assert changed == {"out", "target", "title"}
    assert json.dumps(small).replace("1.7", "4") == json.dumps(large)


def test_the_published_protocol_runs_offline(ultrachat: Path, qwen3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shipped = str(CONFIGS / "paper-qwen3-1.7b.yaml")
    argv = ["certify", "--config", shipped, "--out", str(out), "--target", str(qwen3)]
    argv += ["--corpus.source", str(ultrachat), "--corpus.validation_fraction", "0.99"]
    argv += ["--generation.max_new_tokens", "6", "--max_documents", "5", "--accelerator", "cpu"]
    main(argv)
    data, trace = json.loads((out / "certify.json").read_text()), open_trace(out / "trace")
    assert data["trace"]["rows"] == 5
    assert 5 <= data["trace"]["counted_steps"] <= 5 * 6
    assert data["trace"]["dtype"] == "bfloat16"
    assert (trace.meta.num_kept, len(trace)) == (64, 17)  # one row falls into another split
    assert "Acceptance certificates of Qwen3-1.7B on UltraChat" in (out / "certify.html").read_text()
    assert len(data["certificates"]) == 1 + 6 + 6 + 16 + 2 + 3
    assert [r["k"] for r in data["mass"]] == [1, 3, 5, 10, 25]
    rows = [trace.row(i) for i in range(len(trace))]
    starts = [int(row.loss_mask.nonzero()[0]) + 1 for row in rows]
    chosen = [row for row, start in zip(rows, starts, strict=True) if start >= 64][:5]
    assert min(starts) < 64, "there are short prompts to leave out"
    assert data["trace"]["counted_steps"] == sum(int(row.loss_mask.sum()) for row in chosen)
    mass = torch.cat([row.head.p[row.loss_mask, 0] for row in chosen]).double().mean()
    assert data["mass"][0]["mean"] == pytest.approx(float(mass), rel=1e-6), "those of 64 tokens, in order"
    tokenizer = load_tokenizer(str(qwen3))
    prompts = [tokenizer.decode(r.input_ids[:start]) for r, start in zip(rows, starts, strict=True)]
    first_turn = [{"role": "user", "content": f"Topic 4. {LONG}"}]
    rendered = tokenizer.apply_chat_template(
        first_turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert rendered in prompts, "the first user turn, by the chat template, without thinking"
    assert not any("Answer" in prompt for prompt in prompts)
