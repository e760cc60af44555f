"""Prompts a model writes itself: reproducible, resumed after a kill, filtered, every turn accounted for."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from oracles.models.architectures import LINEAR, V, made
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from certdraft.data import Accounting, Sampling, load_target, read_rows, write_prompts
from certdraft.data.corpus.corpora import Corpus
from certdraft.data.record import self_prompts

SAMPLING = Sampling(max_new_tokens=40, batch_size=4, min_characters=4, seed=3)


class Typist(nn.Module):
    """Stands for a model that writes words at random and ends a text now and then."""

    device = torch.device("cpu")
    generation_config = config = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        words = tokenizer("the quick brown fox jumps over a lazy dog 0 1 2", add_special_tokens=False)
        words_ids = sorted({*words["input_ids"]})
        self.logits = torch.full((len(tokenizer),), -torch.inf)
        self.logits[words_ids] = 0.0
        self.logits[tokenizer.eos_token_id] = math.log(0.05 / 0.95 * len(words_ids))

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1))


@pytest.fixture
def typist(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    monkeypatch.setattr(self_prompts, "load_target", lambda *_, **__: Typist(tokenizer))
    monkeypatch.setattr(self_prompts, "load_tokenizer", lambda *_, **__: tokenizer)


def prompts_in(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("typist")
def test_prompts_are_written_and_every_turn_is_accounted_for(tmp_path: Path) -> None:
    out = tmp_path / "new" / "prompts.jsonl"
    accounting = write_prompts(str(out), count=9, sampling=SAMPLING)
    prompts = prompts_in(out)
    assert len({*prompts}) == len(prompts) == accounting.used == 9
    assert accounting.balanced
    assert accounting.read % 16 == 0
    assert all(len(prompt) >= 4 and prompt == prompt.strip() for prompt in prompts)
    assert [file.name for file in out.parent.iterdir()] == ["prompts.jsonl"]
    rows = list(read_rows(Corpus(str(out), split="all"), Accounting("rows")))
    assert len(rows) == 9
    with pytest.raises(FileExistsError, match="exists already"):
        write_prompts(str(out), count=9, sampling=SAMPLING)


@pytest.mark.usefixtures("typist")
def test_a_killed_command_goes_on_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    expected = write_prompts(str(whole), count=30, sampling=SAMPLING)
    sample = self_prompts._Writer.sample

    def killed(self: Any, batch: int) -> int:
        if batch == 1:
            raise KeyboardInterrupt
        return sample(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(self_prompts._Writer, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            write_prompts(str(resumed), count=30, sampling=SAMPLING)
    assert not resumed.exists()
    with pytest.raises(ValueError, match="with another seed; remove it"):
        write_prompts(str(resumed), count=30, sampling=Sampling(**vars(SAMPLING) | {"seed": 4}))
    batches: list[int] = []
    monkeypatch.setattr(
        self_prompts._Writer, "sample", lambda self, batch: batches.append(batch) or sample(self, batch)
    )
    assert write_prompts(str(resumed), count=30, sampling=SAMPLING) == expected
    assert resumed.read_bytes() == whole.read_bytes()
    assert batches[0] == 1


def test_what_is_not_kept_has_a_reason(make_target: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    writer = self_prompts._Writer(make_target(), tokenizer, Sampling(min_characters=6))

    def judged(text: str, ended: bool = True) -> str:
        before = dict(writer.accounting.to_dict()["skipped"])
        writer._judge(np.array(tokenizer(text, add_special_tokens=False)["input_ids"]), ended)
        after = writer.accounting.to_dict()["skipped"]
        changed = [reason for reason in after if after[reason] != before.get(reason)]
        return changed[0] if changed else "kept"

    assert judged(" add the quick fox. ") == "kept"
    assert judged("Add the QUICK fox!") == "duplicate"
    assert judged("add the lazy dog", ended=False) == "did not end"
    assert judged("fox") == "too short"
    assert judged(" the lazy dog" * 40) == "repeats itself"
    assert judged("the dog<|im_start|>user") == "broken characters or special tokens"
    assert writer.prompts == ["add the quick fox."]
    assert writer.accounting.balanced


def test_targets_without_user_turns_are_refused(
    target_dir: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make_target: Any
) -> None:
    opening, ends = self_prompts._user_turn(tokenizer)
    assert tokenizer.decode(opening) == "<|im_start|>user\n"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    folder = tmp_path / "plain"
    make_target().save_pretrained(folder)
    plain: Any = type(tokenizer).from_pretrained(target_dir)
    plain.chat_template = None
    plain.save_pretrained(folder)
    with pytest.raises(ValueError, match="has no chat template"):
        write_prompts(str(tmp_path / "out.jsonl"), str(folder), count=1)
    short = Sampling(max_new_tokens=8, min_characters=10_000, batch_size=4)
    with pytest.raises(ValueError, match=r"0 of 1 prompts after 64 sampled turns(.|\n)*64 skipped"):
        write_prompts(str(tmp_path / "out.jsonl"), target_dir, count=1, sampling=short)
    for bad in ({"temperature": 0.0}, {"top_p": 0.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"sampling.{next(iter(bad))} is 0"):
            Sampling(**bad)


def test_turns_end_where_rows_cannot_leave_the_batch() -> None:
    """Layers of linear attention keep every sequence of a batch to the end."""
    model = made("Qwen3_5Text", **LINEAR).eval()
    ends = frozenset(range(V // 4))
    sampling = Sampling(max_new_tokens=12, batch_size=16)
    turns = self_prompts._sample_turns(model, [70, 71], [[]] * 16, ends, sampling, seed=1)
    assert len({len(turn) for turn in turns}) > 1
    for turn in turns:
        assert not ends & {*turn[:-1]}
        assert turn[-1] in ends or len(turn) == 12


def test_turns_that_end_make_room_for_the_next() -> None:
    """Four at a time; no turn is dropped or cut short, and there are fewer passes than without refills."""
    model = made("Llama").eval()
    ends = frozenset(range(V // 8))
    passes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampling = Sampling(max_new_tokens=24, batch_size=4)
    given = [[60 + turn] * (turn % 3) for turn in range(16)]
    turns = self_prompts._sample_turns(model, [70, 71], given, ends, sampling, seed=1)
    for words, turn in zip(given, turns, strict=True):
        assert turn[: len(words)] == words
        assert len(turn) > len(words)
        assert not ends & {*turn[len(words) : -1]}
        assert turn[-1] in ends or len(turn) == 24
    steps = [rows for rows, width in passes if width == 1]
    assert max(steps) == 4
    sampled = [len(turn) - len(words) for words, turn in zip(given, turns, strict=True)]
    by_fours = sum(max(sampled[first : first + 4]) - 1 for first in range(0, 16, 4))
    assert len(steps) < 0.9 * by_fours
    assert sum(width > 1 for _, width in passes) > 4


def test_turns_begin_with_the_openings_in_order(
    target_dir: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    openings = tmp_path / "openings.txt"
    openings.write_text("the quick\n\n  add the lazy dog\nfox\n", encoding="utf-8")
    sampling = Sampling(max_new_tokens=8, batch_size=4, openings=str(openings))
    model = load_target(target_dir)
    writer = self_prompts._Writer(model, tokenizer, sampling)
    texts = ["the quick", "add the lazy dog", "fox"]
    for batch, first in enumerate((0, 1, 2)):  # sixteen turns a batch, three openings
        expected = [texts[(first + turn) % 3] for turn in range(16)]
        given = writer.given(batch)
        assert [tokenizer.decode(ids) for ids in given] == expected
        turns = self_prompts._sample_turns(model, writer.opening, given, frozenset(), sampling, seed=batch)
        assert [turn[: len(ids)] for turn, ids in zip(turns, given, strict=True)] == given
        assert all(len(turn) == 8 for turn in turns)
    assert len({tuple(turn[len(ids) :]) for turn, ids in zip(turns, given, strict=True)}) > 8


def test_a_file_of_openings_must_hold_some(tmp_path: Path, target_dir: str) -> None:
    missing, empty = tmp_path / "missing.txt", tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    long = tmp_path / "long.txt"
    long.write_text("the quick brown fox " * 9, encoding="utf-8")
    for file, error, words in (
        (missing, FileNotFoundError, "no file"),
        (empty, ValueError, "is empty"),
        (long, ValueError, "has .* tokens, and a turn ends at sampling.max_new_tokens=8"),
    ):
        sampling = Sampling(openings=str(file), max_new_tokens=8)
        with pytest.raises(error, match=f"sampling.openings: .*{words}"):
            write_prompts(str(tmp_path / "o.jsonl"), target_dir, 1, sampling)


@pytest.mark.usefixtures("typist")
def test_changed_openings_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, openings = tmp_path / "prompts.jsonl", tmp_path / "openings.txt"
    openings.write_text("the quick\nadd the lazy dog\n", encoding="utf-8")
    sampling = Sampling(**vars(SAMPLING) | {"openings": str(openings)})
    with monkeypatch.context() as patch:
        patch.setattr(self_prompts, "write_text", lambda *_: 1 / 0)  # killed at the end
        with pytest.raises(ZeroDivisionError):
            write_prompts(str(out), count=9, sampling=sampling)
    openings.write_text("the quick\nfox\n", encoding="utf-8")
    with pytest.raises(ValueError, match="with another openings; remove it"):
        write_prompts(str(out), count=9, sampling=sampling)
    openings.write_text("the quick\n\nadd the lazy dog", encoding="utf-8")
    write_prompts(str(out), count=9, sampling=sampling)
    assert all(prompt.startswith(("the quick", "add the lazy dog")) for prompt in prompts_in(out))
