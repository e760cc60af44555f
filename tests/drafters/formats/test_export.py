"""Exports: the folder is the drafter, engines would read it, and failures leave nothing behind."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from certdraft.drafters import (
    CardFacts,
    CausalDrafter,
    ExportError,
    LoraSettings,
    export,
    load_drafter,
    read_facts,
)
from certdraft.drafters.causal.export import check_reload

V = 96
Make = Callable[..., CausalDrafter]
Tokens = PreTrainedTokenizerFast
TOKENS = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(1))
FACTS = CardFacts(
    target="Qwen/Qwen3-8B",
    target_vocab_size=V,
    tokenizer_fingerprint="ab" * 32,
    target_revision="9f3c",
    loss="MarginDiscountedCE(a=1.0)",
    datasets=("HuggingFaceH4/ultrachat_200k", "notes.jsonl"),
    evaluated_on="40 held-out prompts",
    metrics={"tau": 3.125, "coverage@4": 0.96875},
    training={"steps": 300, "seed": 1},
    license="apache-2.0",
)


def lora_drafter(base: Path, scale: float = 0.1) -> CausalDrafter:
    """A LoRA drafter whose adapters do something: B would start at zero."""
    drafter = CausalDrafter(pretrained=str(base), lora=LoraSettings(rank=4)).eval()
    for name, parameter in drafter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return drafter


@pytest.mark.parametrize("tied", [False, True])
def test_reloaded_logits_are_bit_equal(
    make_drafter: Make, tokenizer: Tokens, tmp_path: Path, tied: bool
) -> None:
    drafter = make_drafter(tie_word_embeddings=tied, rope_theta=5000.0)
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3, card=FACTS)
    loaded = load_drafter(folder)
    assert torch.equal(loaded.logits(TOKENS), drafter.logits(TOKENS))
    assert not loaded.training
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain(TOKENS).logits, drafter.logits(TOKENS))
    assert AutoTokenizer.from_pretrained(folder).encode("w3 w5") == [3, 5]


def test_what_engines_read(make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
    drafter, random_state = make_drafter(rope_theta=5000.0), torch.random.get_rng_state()
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=5, card=FACTS)
    assert torch.equal(
        torch.random.get_rng_state(), random_state
    )  # an export in the middle moves no training
    assert {p.name for p in folder.iterdir()} == {
        *("README.md", "chat_template.jinja", "config.json", "drafter.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == V
    assert config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["eos_token_id"] == 88
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["num_assistant_tokens"] == 5
    assert generation["num_assistant_tokens_schedule"] == "constant"
    assert generation["assistant_confidence_threshold"] == 0.0
    assert generation["eos_token_id"] == 88
    assert drafter.model.config.eos_token_id is None  # the drafter itself is left as it was


@pytest.mark.parametrize("draft_length", [2, 3])
def test_assisted_generation_is_greedy_and_drafts_the_asked_number(
    target: Qwen3ForCausalLM, make_drafter: Make, tokenizer: Tokens, tmp_path: Path, draft_length: int
) -> None:
    twin = CausalDrafter(config=target.config.to_dict())  # drafts what the target says: all is accepted
    twin.load_state_dict({f"network.{name}": value for name, value in target.state_dict().items()})
    drafters = {"twin": twin.eval(), "stranger": make_drafter(seed=5)}
    prompt = torch.tensor([[4, 8, 15, 16, 23, 42]])
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert plain.shape == (1, 30)
    for name, drafter in drafters.items():
        folder = export(drafter, tmp_path / name, tokenizer=tokenizer, draft_length=draft_length)
        assistant = AutoModelForCausalLM.from_pretrained(folder)
        assistant.generation_config.eos_token_id = None  # 24 tokens whatever they are
        widths: list[int] = []
        hook = target.model.register_forward_pre_hook(
            lambda _m, _a, kwargs, widths=widths: widths.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        text = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, **options
        )
        hook.remove()
        assert torch.equal(text, plain), name
        assert widths[0] == prompt.shape[1] + draft_length
        assert max(widths[1:]) == draft_length + 1
        if name == "twin":
            assert len(widths) == 24 / (draft_length + 1)
        else:
            assert len(widths) > 24 / (draft_length + 1)


def test_bf16_rounds_the_weights_and_nothing_else(
    make_drafter: Make, tokenizer: Tokens, tmp_path: Path
) -> None:
    drafter = make_drafter()
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3, dtype="bfloat16")
    assert drafter.model.dtype == torch.float32
    weights = load_file(folder / "model.safetensors")
    for name, value in drafter.model.state_dict().items():
        assert torch.equal(weights[name], value.to(torch.bfloat16))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_drafter(folder)
    assert loaded.model.dtype == torch.bfloat16
    assert torch.equal(loaded.logits(TOKENS), drafter.to(torch.bfloat16).logits(TOKENS))
    assert load_drafter(folder, dtype="float32").model.dtype == torch.float32


class TestLoraExport:
    """Adapters are merged on the way out, and stay apart in the drafter."""

    def test_merge_equals_the_adapted_network(
        self, pretrained: Path, tokenizer: Tokens, tmp_path: Path
    ) -> None:
        drafter = lora_drafter(pretrained).train()
        before = {name: value.clone() for name, value in drafter.state_dict().items()}
        folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        assert drafter.training
        assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
        merged, adapted = load_drafter(folder).logits(TOKENS), drafter.eval().logits(TOKENS)
        torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
        base = CausalDrafter(pretrained=str(pretrained)).logits(TOKENS)
        assert (adapted - base).abs().max() > 0.1  # the adapters matter
        assert not list(folder.glob("adapter*"))

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
    def test_adapter_folder_names_its_base(self, pretrained: Path, tokenizer: Tokens, tmp_path: Path) -> None:
        drafter = lora_drafter(pretrained)
        folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3, adapter=True)
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(pretrained)
        assert "[More Information Needed]" not in (folder / "adapter" / "README.md").read_text()
        reloaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
        torch.testing.assert_close(reloaded(TOKENS).logits, drafter.logits(TOKENS), atol=1e-6, rtol=0)

    def test_adapter_of_none(self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has none"):
            export(make_drafter(), tmp_path / "out", tokenizer=tokenizer, draft_length=3, adapter=True)
        assert not list(tmp_path.iterdir())


class TestFacts:
    """The model card and `drafter.json`."""

    def test_card(self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        folder = export(make_drafter(), tmp_path / "mine", tokenizer=tokenizer, draft_length=4, card=FACTS)
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == ["Qwen/Qwen3-8B"]
        assert card.data.datasets == ["HuggingFaceH4/ultrachat_200k"]
        assert {r.metric_type: r.metric_value for r in card.data.eval_results} == dict(FACTS.metrics)
        text = card.text
        assert '"method": "draft_model"' in text
        assert '"num_speculative_tokens": 4' in text
        assert "--speculative-num-steps 4" in text
        assert "--speculative-num-draft-tokens 5" in text
        for fact in (
            "9f3c",
            "MarginDiscountedCE(a=1.0)",
            "notes.jsonl",
            "| tau | 3.125 |",
            "| steps | 300 |",
        ):
            assert fact in text
        assert str(tmp_path) not in card.content

    def test_without_facts(self, pretrained: Path, tokenizer: Tokens, tmp_path: Path) -> None:
        drafter = CausalDrafter(pretrained=str(pretrained))
        folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=4)
        content = (folder / "README.md").read_text() + (folder / "drafter.json").read_text()
        assert str(tmp_path) not in content  # no path of this machine leaves it
        facts = read_facts(folder)
        assert (facts["family"], facts["vocab_size"], facts["draft_length"]) == ("causal", V, 4)
        assert (facts["base"], facts["facts"]) == ("pretrained", None)

    def test_reload_checks_hashes_and_schema(
        self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path
    ) -> None:
        folder = export(make_drafter(), tmp_path / "out", tokenizer=tokenizer, draft_length=4, card=FACTS)
        assert read_facts(folder)["facts"]["metrics"] == dict(FACTS.metrics)
        weights, file = load_file(folder / "model.safetensors"), folder / "drafter.json"
        weights["model.norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="model.safetensors is not the file that was exported"):
            load_drafter(folder)
        content = json.loads(file.read_text())
        for change, message in [({"schema": 9}, "schema 9"), ({"family": "dflash"}, "family 'dflash'")]:
            file.write_text(json.dumps(content | change))
            with pytest.raises(ValueError, match=message):
                load_drafter(folder)
        file.write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            load_drafter(folder)
        file.unlink()
        with pytest.raises(FileNotFoundError, match="not an export of certdraft"):
            load_drafter(folder)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_drafter(tmp_path / "nowhere")


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The system refuses files beyond `limit` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFailures:
    """A failed export says why and leaves the disk as it was."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"format": "gguf"},
                ValueError,
                "unknown export format 'gguf' for CausalDrafter; there is transformers",
            ),
            ({"draft_length": 0}, ValueError, "draft_length 0"),
            ({"card": CardFacts("T", 128, "ab")}, ValueError, "has 96 entries, that of T 128"),
        ],
        ids=["format", "draft_length", "vocabulary"],
    )
    def test_arguments(
        self,
        make_drafter: Make,
        tokenizer: Tokens,
        tmp_path: Path,
        arguments: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        arguments = {"draft_length": 3} | arguments
        with pytest.raises(error, match=message):
            export(make_drafter(), tmp_path / "out", tokenizer=tokenizer, **arguments)
        assert not list(tmp_path.iterdir())

    def test_another_tokenizer(self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        tokenizer.add_tokens([f"new{i}" for i in range(10)])
        with pytest.raises(ValueError, match="token id 99, but the drafter's vocabulary ends at 95"):
            export(make_drafter(), tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        assert not list(tmp_path.iterdir())

    def test_existing_folder(self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / "precious").write_text("x")
        with pytest.raises(ExportError, match="exists already"):
            export(make_drafter(), folder, tokenizer=tokenizer, draft_length=3)
        assert [p.name for p in folder.iterdir()] == ["precious"]
        export(make_drafter(), folder, tokenizer=tokenizer, draft_length=3, overwrite=True)
        assert load_drafter(folder).vocab_size == V
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_not_a_number(self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        drafter = make_drafter()
        with torch.no_grad():
            drafter.head_weight[3, 3] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("scale", [float("nan"), 1e25], ids=["nan", "overflow"])
    def test_adapters_that_are_not_finite(self, pretrained: Path, tokenizer: Tokens, scale: float) -> None:
        drafter = lora_drafter(pretrained)
        with torch.no_grad():
            for name, parameter in drafter.named_parameters():
                if "lora" in name:
                    parameter.mul_(scale)
        out = pretrained.parent / "out"
        with pytest.raises(ValueError, match="NaN"):
            export(drafter, out, tokenizer=tokenizer, draft_length=3)
        assert [p.name for p in out.parent.iterdir()] == ["pretrained"]

    def test_a_merge_that_is_not_the_drafter(self, pretrained: Path, tokenizer: Tokens) -> None:
        drafter = lora_drafter(pretrained)
        drafter.network.base_model.disable_adapter_layers()  # what is measured is the base, not the merge
        out = pretrained.parent / "out"
        with pytest.raises(ValueError, match="merging the LoRA adapter changed the logits"):
            export(drafter, out, tokenizer=tokenizer, draft_length=3)
        assert [p.name for p in out.parent.iterdir()] == ["pretrained"]

    @pytest.mark.parametrize("existing", [False, True])
    def test_no_room_for_the_weights(
        self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path, existing: bool
    ) -> None:
        folder, kept = tmp_path / "out", []
        if existing:
            export(make_drafter(seed=2), folder, tokenizer=tokenizer, draft_length=3)
            kept = ["out"]
        with (
            file_size_limit(20_000),
            pytest.raises(ExportError, match="could not be written.*nothing was left"),
        ):
            export(make_drafter(), folder, tokenizer=tokenizer, draft_length=3, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == kept
        if existing:
            assert torch.equal(load_drafter(folder).logits(TOKENS), make_drafter(seed=2).logits(TOKENS))

    def test_disk_full_at_the_last_moment(
        self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_handle: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ExportError, match="No space left on device"):
            export(make_drafter(), tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        assert not list(tmp_path.iterdir())

    def test_the_old_export_survives_a_failed_swap(
        self, make_drafter: Make, tokenizer: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = export(make_drafter(seed=2), tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        rename = Path.rename

        def failing(path: Path, new: Path) -> Path:
            if path.suffix == ".partial":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(path, new)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(ExportError, match="Input/output error"):
            export(make_drafter(), folder, tokenizer=tokenizer, draft_length=3, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert torch.equal(load_drafter(folder).logits(TOKENS), make_drafter(seed=2).logits(TOKENS))

    def test_a_folder_that_is_not_the_drafter(self, make_drafter: Make, tmp_path: Path) -> None:
        model = make_drafter().model
        model.save_pretrained(tmp_path / "out")
        check_reload(model, tmp_path / "out")
        config = tmp_path / "out" / "config.json"
        content = json.loads(config.read_text())
        content["rope_parameters"]["rope_theta"] = 500.0
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="not the one written"):
            check_reload(model, tmp_path / "out")
