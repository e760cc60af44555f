"""`certdraft real` from end to end on a target of eight tiny layers: every stage, its table, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from certdraft.data import load_tokenizer, target_config
from certdraft.train.commands import real as module
from certdraft.train.commands.cli import main


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """A random Llama with the embedded tokenizer and its chat template."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path / "instruct", load_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = LlamaConfig(
        **sizes, **heads, vocab_size=target_config().vocab_size, max_position_embeddings=512,
        eos_token_id=end, pad_token_id=end, bos_token_id=None, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sizes_scale_with_the_minutes() -> None:
    assert module.Sizes.scaled(45) == module.Sizes()
    assert module.Sizes.scaled(90).steps == 2 * module.Sizes().steps
    with pytest.raises(ValueError, match="at least 2"):
        module.Sizes.scaled(1)


def test_dry_run_and_unknown_drafters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["real", "--dry_run", "true", "--out", str(tmp_path / "real"), "--minutes", "9"])
    assert "about 9 minutes" in capsys.readouterr().err
    assert not (tmp_path / "real").exists()  # the next run may have other minutes
    with pytest.raises(SystemExit):
        main(["real", "--drafters", "[medusa]", "--out", str(tmp_path / "other")])
    assert "eagle3, causal, dflash" in capsys.readouterr().err


def test_the_mask_token_of_a_full_vocabulary() -> None:
    tokenizer = load_tokenizer()
    size = max(tokenizer.get_vocab().values()) + 1
    assert module.unused_token(tokenizer, size + 1) is None
    tokenizer.add_tokens(["<unused>"])
    assert tokenizer.decode([module.unused_token(tokenizer, size + 1)]) == "<unused>"


def test_the_held_out_prompts() -> None:
    rows = [json.loads(line) for line in module.held_out_prompts().read_text("utf-8").splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 80
    assert len({row["category"] for row in rows}) == 8


def test_every_stage(
    instruct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = module.Sizes(prompts=96, answer_tokens=12, steps=4, held_out=2, new_tokens=6)
    monkeypatch.setattr(module.Sizes, "scaled", classmethod(lambda cls, minutes: small))
    monkeypatch.setattr(module, "run_profile", _constant_profile)
    out = tmp_path / "real"
    out.mkdir()
    rows = [json.dumps({"prompt": f"What is {number} plus {7 * number}?"}) for number in range(96)]
    (out / "prompts.jsonl").write_text("\n".join(rows))  # as an earlier, killed run left them
    command = ["real", "--out", str(out), "--target", str(instruct)]
    main(command)
    shown = capsys.readouterr().out
    for kind in ("eagle3", "causal", "dflash"):
        assert (out / "exports" / kind / "config.json").is_file()
        report = json.loads((out / "reports" / kind / "report.json").read_text("utf-8"))
        assert len(report["bench"]["methods"]) == 3
        assert kind in shown
    assert (out / "certify" / "certify.json").is_file()
    assert "generate" in shown
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert len(summary["rows"]) == 9
    assert summary["plain_tokens_per_s"][summary["fastest_plain"]] == max(
        summary["plain_tokens_per_s"].values()
    )
    prompts = (out / "prompts.jsonl").read_bytes()
    main(command)  # what is finished is used again
    assert (out / "prompts.jsonl").read_bytes() == prompts
    again = capsys.readouterr()
    assert _table(again.out) == _table(shown)
    assert "begun with --minutes" not in again.err
    main([*command, "--minutes", "7"])
    assert "was begun with --minutes 45 and goes on with its sizes" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(SystemExit):
        main([*command[:-1], str(tmp_path / "another")])
    assert f"was begun with {instruct}" in " ".join(capsys.readouterr().err.split())


def _constant_profile(*_: object, **__: object) -> None:
    """Costs take half a minute to measure; without a file the cost-aware tree is left out."""


def _table(shown: str) -> str:
    """The last table, and all below it."""
    return shown[shown.rindex("Held-out prompts decoded") :]
