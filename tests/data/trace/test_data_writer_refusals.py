"""What a recording refuses before it begins, and its settings on the command line."""

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from oracles.runs.recordings import generation, record
from transformers import Qwen3ForCausalLM

from certdraft.data import (
    Corpus,
    CorpusError,
    Generation,
    Prompts,
    Recording,
    RecordingError,
    TargetError,
    load_tokenizer,
    open_trace,
    record_trace,
)
from certdraft.data.record import recording as recording_module
from certdraft.data.trace.shards import Ledger


def test_other_settings_are_refused_with_the_difference(
    undisturbed: tuple[Path, str], target_dir: str
) -> None:
    folder, chats = undisturbed
    with pytest.raises(
        RecordingError, match=r"holds a trace with other settings \(num_kept: 8 there, 9 now\)"
    ):
        record(folder, target_dir, chats, num_kept=9)
    other = generation(max_new_tokens=7)
    with pytest.raises(RecordingError, match=r"generation\.max_new_tokens: 6 there, 7 now"):
        record(folder, target_dir, chats, generation=other)
    assert not (folder / ".recording").exists()
    open_trace(folder, verify="full")


def test_second_writer_is_refused(tmp_path: Path, target_dir: str, chats: str) -> None:
    ledger = Ledger(tmp_path / "t", {}, 1)
    with pytest.raises(RecordingError, match="is being written by another process"):
        record(tmp_path / "t", target_dir, chats)
    ledger.release()


def test_folder_in_use_is_refused(tmp_path: Path, target_dir: str, chats: str) -> None:
    with pytest.raises(RecordingError, match=r"already holds chats\.jsonl; give a folder that is empty"):
        record(tmp_path, target_dir, chats)
    with pytest.raises(RecordingError, match=r"chats\.jsonl is a file"):
        record(Path(chats), target_dir, chats)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chats.jsonl"]


def test_size_is_estimated_and_a_small_disk_refused(
    tmp_path: Path,
    target_dir: str,
    chats: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    meta = record(tmp_path / "fits", target_dir, chats)
    [shown] = re.findall(
        r"12 prompts, at most ([\d,]+) tokens of 60 bytes: up to ([\d.]+) kB", capsys.readouterr().err
    )
    assert meta.num_tokens <= int(shown[0]) <= 2 * meta.num_tokens
    with monkeypatch.context() as patch:
        patch.setattr(recording_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(RecordingError, match=r"may not hold this trace .*up to [\d.]+ kB; 1 kB free"):
            record(tmp_path / "small", target_dir, chats)
    assert not list((tmp_path / "small").glob("shard*"))
    record(tmp_path / "small", target_dir, chats, num_kept=4)  # with nothing written, settings may change


def test_bad_target_leaves_nothing(
    tmp_path: Path, make_target: Callable[..., Qwen3ForCausalLM], target_dir: str, chats: str
) -> None:
    broken = make_target()
    fox = load_tokenizer(target_dir)("lazy")["input_ids"][0]
    with torch.no_grad():
        broken.model.embed_tokens.weight[fox] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(TargetError, match=r"chats\.jsonl:4: the target's logits after token \d+ .* hold NaN"):
        record(tmp_path / "t", str(tmp_path / "broken"), chats, tokenizer=target_dir)
    assert not list((tmp_path / "t").glob("shard*"))
    make_target(vocab_size=200).save_pretrained(tmp_path / "small")
    with pytest.raises(TargetError, match=r"the tokenizer gives id \d+, but .*small has 200 embeddings"):
        record(tmp_path / "u", str(tmp_path / "small"), chats, tokenizer=target_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kept": 305}, "num_kept=305 exceeds the vocabulary of 304"),
        ({"num_kept": 0}, "num_kept is 0; give at least 1"),
        ({"generation": Generation(600, 1000)}, "documents may reach 6.. tokens, but .* has 512 positions"),
        ({"prompts": Prompts(max_prompt_tokens=200)}, "leaves no room for a continuation"),
        (
            {"prompts": Prompts(max_prompt_tokens=3)},
            "no row can be used.\n12 rows read = 0 used \\+ 12 skipped",
        ),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, target_dir: str, chats: str, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record(tmp_path / "t", target_dir, chats, **changes)


def test_no_such_target_or_corpus(tmp_path: Path, target_dir: str, chats: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        record(tmp_path / "t", str(tmp_path / "nowhere"), chats)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError, match="is empty"):
        record(tmp_path / "t", target_dir, str(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "t").exists()


def test_signature_is_the_recording() -> None:
    arguments = signature(record_trace).parameters
    for field in fields(Recording):
        default = field.default if field.default is not MISSING else None
        assert arguments[field.name].default == default, field.name
        assert arguments[field.name].annotation == field.type, field.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse announces its fifth version
def test_command_line_reads_all_settings() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(record_trace, as_positional=False)
    args = ["--out_dir=t", "--corpus.source=x.jsonl", "--prompts.thinking=true", "--generation.loops=mask"]
    parsed = parser.instantiate_classes(parser.parse_args(args))
    assert parsed.corpus == Corpus("x.jsonl")
    assert parsed.prompts == Prompts(thinking=True)
    assert parsed.generation == Generation(loops="mask")
    help_text = " ".join(parser.format_help().split())
    assert "a killed recording loses at most the shard in progress" in help_text
