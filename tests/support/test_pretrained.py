"""Models from folders and GGUF files: equal logits, the tokenizer, and errors that name what is missing."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from certdraft.support import (
    load_causal_lm,
    load_generation_config,
    load_pretrained_config,
    load_pretrained_tokenizer,
    model_source,
    weights_origin,
)

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "cd"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in llama.cpp's order: rotary pairs side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@torch.no_grad()
def write_gguf(model: LlamaForCausalLM, file: Path) -> None:
    """Write a Q8_0 checkpoint with a tokenizer and put the rounded weights back into `model`."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_token_types([3 if word.startswith("<") else 1 for word in WORDS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, parameter in model.named_parameters():
        kind = name.removeprefix("model.").removesuffix(".weight")
        parts = kind.split(".", 2)
        stored = f"blk.{parts[1]}.{NAMES[parts[2]]}" if parts[0] == "layers" else kind
        stored = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(stored, stored)
        if parameter.ndim == 1:
            writer.add_tensor(f"{stored}.weight", parameter.numpy())
            continue
        packed = gguf.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
        parameter.copy_(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        rows = heads.get(stored.rsplit(".", 1)[-1])
        packed = interleaved(packed, rows) if rows else packed
        writer.add_tensor(f"{stored}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
