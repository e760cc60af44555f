"""Models from folders and GGUF files: equal logits, the tokenizer, and errors that name what is missing."""

from pathlib import Path

import pytest
import torch
from oracles.models.gguf_checkpoints import TEMPLATE, random_llama, write_gguf
from transformers import LlamaForCausalLM

from certdraft.support import (
    load_causal_lm,
    load_generation_config,
    load_pretrained_config,
    load_pretrained_tokenizer,
    model_source,
    weights_origin,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A folder with one GGUF file, and the model whose rounded weights it holds."""
    folder, model = tmp_path_factory.mktemp("gguf"), random_llama()
    write_gguf(model, folder / "tiny.Q8_0.gguf")
    return folder, model


def test_gguf_weights_are_dequantised(checkpoint: tuple[Path, LlamaForCausalLM], tmp_path: Path) -> None:
    folder, model = checkpoint
    loaded = load_causal_lm(folder / "tiny.Q8_0.gguf")
    assert loaded.dtype == torch.float32
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.arange(30)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    loaded.save_pretrained(tmp_path)  # no quantisation is left to stand in the way
    assert torch.equal(load_causal_lm(tmp_path)(ids).logits, loaded(ids).logits)
    assert weights_origin(tmp_path) is None


def test_weights_read_under_inference_mode_can_be_changed_and_packed(
    checkpoint: tuple[Path, LlamaForCausalLM],
) -> None:
    with torch.inference_mode():
        loaded = load_causal_lm(checkpoint[0])
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_a_folder_around_a_gguf_file(
    checkpoint: tuple[Path, LlamaForCausalLM], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, _ = checkpoint
    assert load_causal_lm(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    tokenizer = load_pretrained_tokenizer(folder)
    assert tokenizer.eos_token_id == 2
    assert tokenizer("abcd", add_special_tokens=False)["input_ids"] == [30, 31]
    assert tokenizer.chat_template == TEMPLATE
    config = load_pretrained_config(folder)
    assert (config.model_type, config.eos_token_id, config.max_position_embeddings) == ("llama", 2, 128)
    assert load_generation_config(folder) is None
    assert weights_origin(folder) == "dequantised from Q8_0 GGUF"
    assert capfd.readouterr() == ("", "")  # no bars, no reports


def test_a_transformers_folder_comes_before_a_gguf_file_beside_it(
    checkpoint: tuple[Path, LlamaForCausalLM], tmp_path: Path
) -> None:
    checkpoint[1].save_pretrained(tmp_path)
    (tmp_path / "beside.gguf").write_bytes(b"never read")
    assert model_source(tmp_path).gguf is None
    generation = load_generation_config(tmp_path)
    assert generation is not None
    assert generation.eos_token_id == 2


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config.json and no .gguf file"):
        model_source(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf: no such file"):
        model_source(tmp_path / "nowhere.gguf")
    (tmp_path / "a.gguf").write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"cannot be loaded as a causal LM"):
        load_causal_lm(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several GGUF files \(a.gguf, b.gguf\); name one"):
        model_source(tmp_path)
    monkeypatch.setattr("certdraft.support.pretrained.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'certdraft\[gguf\]'"):
        model_source(tmp_path / "a.gguf")
