"""Problems with a checkable answer, on which collaborative arbitration is trained and measured.

Files are jsonl, one problem a line, in the shape that the usual sets have: GSM8K (`question`, `answer` with
the number behind `####`), HumanEval (`prompt`, `test`, `entry_point`), MBPP (`text`, `test_list`), or our own
(`prompt`, `answer`, `check`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from certdraft.data import CorpusError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Check = Literal["exact", "contains", "number", "expression", "tests"]
Template = Literal["none", "chat"]
_OWN_KEYS = {"prompt", "answer", "check", "family"}


@dataclass(frozen=True)
class Problem:
    """A prompt, and how a right response is told from a wrong one.

    Attributes:
        prompt: text in front of the response.
        answer: reference. "exact": the response, spaces around it aside. "contains": words that stand in the
            response, case aside. "number": the last number of the response. "expression": a value that the
            response, a Python expression, must have. "tests": a Python program that ends without an error
            when it is run behind the response.
        check: how the response is verified.
        prefix: "tests" only: code that stands in front of the response (HumanEval's signature and docstring).
        family: group for reports.
        where: file and line.
    """

    prompt: str
    answer: str
    check: Check = "exact"
    prefix: str = ""
    family: str = "all"
    where: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of prompt and answer: what a split goes by."""
        return hashlib.sha256(f"{self.prompt}\0{self.answer}".encode()).hexdigest()


def load_problems(path: str | Path) -> list[Problem]:
    """All problems of a jsonl file.

    Args:
        path: the file; its shape is told by the keys of each row.

    Raises:
        CorpusError: a line that is no JSON object, lacks a key, or has a value of the wrong type.
        FileNotFoundError: no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file; give problems as jsonl, one object a line")
    problems = list(_read(file))
    if not problems:
        raise CorpusError(f"{path}: no problem in it; give one JSON object a line")
    return problems


def split_problems(problems: Sequence[Problem], shares: Sequence[float]) -> list[list[Problem]]:
    """Disjoint parts, chosen by a hash of each problem: the same on every machine and in any order.

    Args:
        problems: what is divided; equal problems go to the same part.
        shares: of each part, >= 0; what is left of 1 is dropped.

    Raises:
        ValueError: a negative share, or a sum above 1.
    """
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares {list(shares)} must be ≥ 0 and sum to at most 1")
    parts: list[list[Problem]] = [[] for _ in shares]
    for problem in problems:
        digest = hashlib.sha256(f"\0{problem.digest}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        for part, share in zip(parts, shares, strict=True):
            if place < share:
                part.append(problem)
                break
            place -= share
    return parts


def prompt_texts(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "none",
    system: str | None = None,
    thinking: bool = False,
) -> list[str]:
    """Return the text in front of each response.

    Args:
        problems: what is asked.
        tokenizer: the target's; its chat template is used.
        template: "none" takes prompts as they stand; "chat" makes each the user's turn of a chat.
        system: the system's turn in front of it; without one the template's own, where it has one.
        thinking: value of `enable_thinking` for the template.
    """
    if template == "none":
        return [problem.prompt for problem in problems]
    if not tokenizer.chat_template:
        raise ValueError(
            "texts.template is chat, but the target's tokenizer has no chat template; take an instruct "
            "model, or texts.template none"
        )
    first = [] if system is None else [{"role": "system", "content": system}]
    name = "problem" if system is None else "problem behind a system turn"
    return [
        render_chat(
            tokenizer, [*first, {"role": "user", "content": problem.prompt}],
            problem.where or repr(problem.prompt), thinking=thinking, name=name,
        )
        for problem in problems
    ]  # fmt: skip


def _read(file: Path) -> Iterator[Problem]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise CorpusError(f"{where}: a problem is a JSON object, this is {type(row).__name__}")
            yield _problem(row, where)


def _problem(row: dict[str, Any], where: str) -> Problem:
    if "question" in row:  # GSM8K
        text = _text(row, "answer", where)
        _, marker, number = text.rpartition("####")
        if not marker:
            raise CorpusError(f"{where}: answer has no '####'; GSM8K puts the number behind it")
        prompt = f"Question: {_text(row, 'question', where)}\nAnswer:"
        return Problem(prompt, number.strip(), "number", where=where)
    if "entry_point" in row:  # HumanEval
        prompt, entry = _text(row, "prompt", where), _text(row, "entry_point", where)
        if not entry.isidentifier():
            raise CorpusError(f"{where}: entry_point {entry!r} is not a Python name")
        tests = f"{_text(row, 'test', where)}\n\ncheck({entry})\n"
        return Problem(prompt, tests, "tests", prefix=prompt, where=where)
    if "test_list" in row:  # MBPP
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise CorpusError(f"{where}: test_list must be a list of Python assertions")
        text = _text(row, "text" if "text" in row else "prompt", where)
        listed = "\n".join(tests)
        setup = row.get("test_setup_code") or ""
        prompt = f"{text}\nYour code should pass these tests:\n{listed}\n"
        return Problem(prompt, f"{setup}\n{listed}\n", "tests", where=where)
    for key in row:
        if key not in _OWN_KEYS:
            near = difflib.get_close_matches(key, _OWN_KEYS, n=1)
            raise CorpusError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; a problem has {sorted(_OWN_KEYS)}")
            )
    check = row.get("check", "exact")
    if check not in get_args(Check):
        raise CorpusError(f"{where}: check {check!r} is none of {list(get_args(Check))}")
    return Problem(
        _text(row, "prompt", where),
        _text(row, "answer", where),
        check,
        family=str(row.get("family", "all")),
        where=where,
    )


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise CorpusError(f"{where}: {key!r} must be a text that is not empty, this is {value!r}")
    return value
