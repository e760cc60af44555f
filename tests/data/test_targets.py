"""Targets and tokenizers by name: whole checkpoints only, errors that tell what to do."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft.data.corpus.bpe_tokenizer import SPECIAL_TOKENS, train_tokenizer
from certdraft.data.targets import load_target, load_tokenizer, tokenizer_fingerprint

TEXTS = ["def parse(self, text):\n    return text.split()\n", "Überall: naïve 日本 1234\t\n"] * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_target_is_frozen_fp32_and_in_eval_mode(folder: Path) -> None:
    target = load_target(str(folder))
    assert not target.training
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in target.parameters())


def test_partial_checkpoint_is_refused_with_the_missing_key(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_target(str(folder))


@pytest.mark.parametrize("load", [load_target, load_tokenizer])
def test_missing_folder_and_unreachable_hub_say_what_to_do(load, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        load("nobody/nothing")


def test_tokenizer_of_a_folder_without_a_model(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == 300


def test_code_shipped_with_a_model_is_never_run(folder: Path) -> None:
    """Whatever is answered to a prompt: nobody is asked."""
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    for name, key in (("config.json", "AutoConfig"), ("config.json", "AutoModelForCausalLM")):
        content = json.loads((folder / name).read_text()) | {"model_type": "evil"}
        (folder / name).write_text(json.dumps(content | {"auto_map": {key: "evil.Evil"}}))
        with pytest.raises((ValueError, FileNotFoundError), match="cannot be loaded"):
            load_target(str(folder))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with contextlib.suppress(ValueError, OSError):
        load_tokenizer(str(folder))


def test_fingerprint_ignores_the_template_and_sees_the_merges(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(train_tokenizer(TEXTS, 300)) == fingerprint
    assert tokenizer_fingerprint(train_tokenizer([*TEXTS, "zzz zzz zzz" * 50], 300)) != fingerprint


def test_tokenizer_is_lossless_and_sized(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer) == 300
    assert all(tokenizer.convert_tokens_to_ids(token) == i for i, token in enumerate(SPECIAL_TOKENS))
    for text in [*TEXTS, "bytes \x00\x7f and \U0001f600", "  trailing   \n\n"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_too_small_a_vocabulary_names_the_least() -> None:
    with pytest.raises(ValueError, match="below 261"):
        train_tokenizer(TEXTS, 200)


def test_chat_template_switches_thinking(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nlong\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    thinking = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert thinking == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert plain == thinking + "<think>\n\n</think>\n\n"
