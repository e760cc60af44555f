"""Prompts: exact token ids of chat templates, windows fixed by content, and full accounting."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from certdraft.data import (
    Accounting,
    CorpusError,
    Prompt,
    Prompts,
    PromptSet,
    Row,
    build_prompts,
    load_tokenizer,
)

SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "fox?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\ndog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "lazy"},
]
FIRST = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nfox?<|im_end|>\n<|im_start|>assistant\n"
LAST = FIRST + "dog<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"  # without thought
NO_THINK = "<think>\n\n</think>\n\n"


def row(content: object, number: int = 0) -> Row:
    kind = "text" if isinstance(content, str) else "messages" if isinstance(content, list) else "prompt"
    value = content["prompt"] if kind == "prompt" else tuple(content) if kind == "messages" else content
    return Row(f"x.jsonl:{number + 1}", kind, value, json.dumps([content, number]).encode())


def build(
    tokenizer: PreTrainedTokenizerBase,
    rows: list,
    settings: Prompts | None = None,
    forced: bool = False,
    bad_rows: str = "error",
) -> tuple[list[Prompt], Accounting]:
    accounting = Accounting("rows")

    def counted() -> Iterator[Row]:
        for number, content in enumerate(rows):
            accounting.read += 1
            yield content if isinstance(content, Row) else row(content, number)

    settings = settings or Prompts()
    options = {"teacher_forced": forced, "bad_rows": bad_rows}
    prompts = list(build_prompts(counted(), tokenizer, settings, accounting, **options))
    assert accounting.balanced
    return prompts, accounting


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        (Prompts(thinking=True), [LAST]),
        (Prompts(thinking=False), [LAST + NO_THINK]),
        (Prompts(thinking=True, turns="first"), [FIRST]),
        (Prompts(thinking=True, turns="all"), [FIRST, LAST]),
    ],
)
def test_conversation_is_the_ids_that_serving_produces(
    tokenizer: PreTrainedTokenizerBase, settings: Prompts, texts: list[str]
) -> None:
    prompts, _ = build(tokenizer, [TURNS], settings)
    assert [p.ids.tolist() for p in prompts] == [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    assert all(p.ids.dtype == np.int32 and p.first_learned == len(p.ids) for p in prompts)
    # and what transformers itself gives for the whole conversation (as a BatchEncoding)
    own = {"add_generation_prompt": True, "enable_thinking": settings.thinking}
    if settings.turns != "first":
        assert prompts[-1].ids.tolist() == tokenizer.apply_chat_template(TURNS[:4], **own)["input_ids"]


def test_prompt_row_with_and_without_template(tokenizer: PreTrainedTokenizerBase) -> None:
    for template, text in (
        ("auto", "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n" + NO_THINK),
        ("none", "fox"),
    ):
        [prompt], _ = build(tokenizer, [{"prompt": "fox"}], Prompts(template=template))
        assert tokenizer.decode(prompt.ids) == text


def test_teacher_forced_learns_assistant_tokens_only(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, _ = build(tokenizer, [TURNS], Prompts(thinking=True, turns="all"), forced=True)
    given = [tokenizer.decode(p.ids[: p.first_learned]) for p in prompts]
    learned = [tokenizer.decode(p.ids[p.first_learned :]) for p in prompts]
    assert given == [FIRST, LAST]
    assert learned == [
        "dog<|im_end|>",
        "lazy<|im_end|>",
    ]  # a target stops there; the newline is the template's


def test_conversation_without_assistant_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, _ = build(tokenizer, [TURNS[:2]], Prompts(thinking=True))
    assert tokenizer.decode(prompts[0].ids) == FIRST
    prompts, accounting = build(tokenizer, [TURNS[:2]], forced=True)
    assert prompts == []
    assert accounting.skipped["no assistant turn to learn from"].example == "x.jsonl:1"


def test_template_that_rewrites_the_prompt_is_refused(target_dir: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.chat_template = "{{ messages | length }}{{ 'x' if add_generation_prompt }}"
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: the chat template changes the prompt"):
        build(tokenizer, [TURNS], forced=True)


def test_template_errors_name_the_row(target_dir: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: .*roles must alternate"):
        build(tokenizer, [TURNS])
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: `messages` rows need a chat template"):
        build(tokenizer, [TURNS])
    with pytest.raises(CorpusError, match="`prompt` rows need a chat template"):
        build(tokenizer, [{"prompt": "fox"}], Prompts(template="chat"))
    assert len(build(tokenizer, [{"prompt": "fox"}])[0]) == 1


TEXT = "".join(f"def add_{i}(a, b):\n    return a + {i}\n\n" for i in range(200))


def test_windows_are_fixed_by_content(tokenizer: PreTrainedTokenizerBase) -> None:
    settings = Prompts(prompt_tokens=20, prompts_per_document=5)
    alone = build(tokenizer, [TEXT], settings)[0]
    again = build(tokenizer, [TEXT, "other text " * 99], settings)[0]
    assert [p.ids.tolist() for p in alone] == [p.ids.tolist() for p in again[:5]]
    assert {len(p.ids) for p in alone} == {20}
    texts = [tokenizer.decode(p.ids) for p in alone]
    assert len(set(texts)) == 5
    starts = [TEXT.index(text) for text in texts]
    assert all(start == 0 or TEXT[start - 1] == "\n" for start in starts)


def test_a_long_text_of_which_little_is_used_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    book = "".join(f"line {i} of a long book\n" for i in range(20_000))
    for number, told in ((1, 1), (1000, 0)):
        settings = Prompts(prompt_tokens=20, prompts_per_document=number)
        accounting = build(tokenizer, [book, TEXT[:400]], settings)[1]
        notes = {note: skip.count for note, skip in accounting.notes.items()}
        assert sum(notes.values()) == told, notes
        assert all("prompts_per_document" in note for note in notes)


@pytest.mark.parametrize("text", ["x" * 10_000_000, "word " * 2_000_000], ids=["one word", "one line"])
def test_window_of_ten_megabytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    [prompt], _ = build(tokenizer, [text], Prompts(prompt_tokens=16))
    assert len(prompt.ids) == 16


def test_teacher_forced_text_is_cut_without_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts, _ = build(tokenizer, [TEXT], Prompts(max_prompt_tokens=50), forced=True)
    whole = tokenizer.encode(TEXT, add_special_tokens=False)
    assert np.concatenate([p.ids for p in prompts]).tolist() == whole[: sum(len(p.ids) for p in prompts)]
    assert sum(len(p.ids) for p in prompts) >= len(whole) - 1  # a last token alone has nothing to predict
    assert {p.first_learned for p in prompts} == {1}


def test_what_is_left_out_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "fox"}, {"prompt": "fox"}, {"prompt": "dog " * 50}, "short"]
    prompts, accounting = build(tokenizer, rows, Prompts(max_prompt_tokens=60))
    assert len(prompts) == accounting.used == 1
    assert {reason: s.example for reason, s in accounting.skipped.items()} == {
        "duplicate prompt": "x.jsonl:2",
        "longer than max_prompt_tokens=60": "x.jsonl:3",
        "text shorter than prompt_tokens=64": "x.jsonl:4",
    }
    assert "4 rows read = 1 used + 3 skipped" in str(accounting)
    assert Accounting.from_dict(accounting.to_dict()) == accounting


def test_beginning_of_sequence_once_and_only_before_plain_text(target_dir: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    for content, count in ((TEXT, 1), ({"prompt": "fox"}, 0)):
        [prompt], _ = build(tokenizer, [content])
        assert (prompt.ids == bos).sum() == count
        assert not count or prompt.ids[0] == bos


def test_prompt_set_keeps_prompts_and_its_hash_notices_changes() -> None:
    prompts = [Prompt(np.arange(n, dtype=np.int32), n, f"row {n}") for n in (3, 1, 4)]
    kept = PromptSet(prompts)
    assert [(p.ids.tolist(), p.first_learned, p.where) for p in kept] == [
        (p.ids.tolist(), p.first_learned, p.where) for p in prompts
    ]
    assert kept.lengths.tolist() == [3, 1, 4]
    assert kept.max_id == 3
    assert kept.sha256() == PromptSet(prompts).sha256()
    shorter = [Prompt(p.ids, 1, p.where) for p in prompts]
    assert kept.sha256() not in (PromptSet(prompts[:2]).sha256(), PromptSet(shorter).sha256())


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="prompt_tokens is 0; give at least 1"):
        Prompts(prompt_tokens=0)


def test_prompts_too_short_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "add"}, {"prompt": "the quick brown fox jumps over the lazy dog"}]
    [prompt], accounting = build(tokenizer, rows, Prompts(template="none", min_prompt_tokens=4))
    assert len(prompt.ids) >= 4
    assert accounting.skipped["shorter than min_prompt_tokens=4"].count == 1
    with pytest.raises(ValueError, match="min_prompt_tokens 9 exceeds max_prompt_tokens 8"):
        Prompts(min_prompt_tokens=9, max_prompt_tokens=8)


ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}"
CONCATENATING = "{% for message in messages %}{{ '<' + message.content + '>' }}{% endfor %}"


@pytest.mark.parametrize("forced", [False, True])
def test_a_row_that_the_template_rejects_is_counted(target_dir: str, forced: bool) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.chat_template = ALTERNATING + CONCATENATING
    rows = [TURNS[1:3], TURNS, TURNS[3:]]
    with pytest.raises(CorpusError, match=r"x\.jsonl:2: the chat template rejects .*begin with a user"):
        build(tokenizer, rows, forced=forced)
    prompts, accounting = build(tokenizer, rows, forced=forced, bad_rows="skip")
    assert len(prompts) == accounting.used == 2
    assert accounting.skipped["malformed"].count == 1
    assert accounting.skipped["malformed"].example.startswith("x.jsonl:2: the chat template rejects")


def test_a_missing_template_is_not_a_bad_row(target_dir: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match="need a chat template"):
        build(tokenizer, [TURNS], bad_rows="skip")


def test_tools_reach_the_template(target_dir: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.chat_template = "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CONCATENATING
    with_tools = Row("x.jsonl:1", "messages", (TURNS[1],), b"1", ({"name": "add"}, {"name": "sub"}))
    prompts, _ = build(tokenizer, [with_tools, TURNS[1:2]])
    assert [tokenizer.decode(prompt.ids) for prompt in prompts] == ["[add][sub]<fox?>", "<fox?>"]


@pytest.mark.parametrize("kind", ["prompt", "text"])
def test_a_text_that_begins_with_the_beginning_of_sequence_has_one(target_dir: str, kind: str) -> None:
    tokenizer = load_tokenizer(target_dir)
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    for text in ("the lazy dog", "<|endoftext|>the lazy dog"):
        content = {"prompt": text} if kind == "prompt" else text
        [prompt], _ = build(tokenizer, [content], Prompts(template="none"), forced=kind == "text")
        assert prompt.ids.tolist() == [bos, *tokenizer.encode("the lazy dog", add_special_tokens=False)]


def test_huge_words_are_bounded(tokenizer: PreTrainedTokenizerBase) -> None:
    word = "x" * 60_000_000
    prompts, accounting = build(tokenizer, [{"prompt": word}], Prompts(max_prompt_tokens=100))
    assert (prompts, list(accounting.skipped)) == ([], ["longer than max_prompt_tokens=100"])
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: text holds a word of 60,000,000 characters"):
        build(tokenizer, [word], forced=True)
    prompts, accounting = build(tokenizer, [f"fox {word}", "the lazy dog"], forced=True, bad_rows="skip")
    assert len(prompts) == accounting.skipped["malformed"].count == 1
