"""Problems and verifiers: the usual file shapes, four checks, and programs that must not get away with it."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from certdraft.arbitration import (
    ArithmeticDataModule,
    Problem,
    ProblemDataModule,
    Sandbox,
    arithmetic,
    load_problems,
    run_python,
    split_problems,
    verify,
    verify_all,
)
from certdraft.arbitration.tasks.arithmetic import IGNORED, training_rows
from certdraft.data.corpus.corpora import CorpusError

GSM8K = {"question": "Ann has 3 boxes of 4 pens. How many pens?", "answer": "3*4=<<3*4=12>>12\n#### 12"}
HUMANEVAL = {
    "task_id": "x/0", "prompt": 'def double(n):\n    """Twice n."""\n',
    "canonical_solution": "    return 2 * n\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}  # fmt: skip
MBPP = {
    "text": "Write a function to add one.", "code": "def inc(n): return n + 1", "task_id": 1,
    "test_setup_code": "", "test_list": ["assert inc(1) == 2", "assert inc(0) == 1"],
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def to_file(*rows: object) -> str:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / "problems.jsonl").write_text(text)
        return str(tmp_path / "problems.jsonl")

    return to_file


# ---- files


def test_the_usual_shapes_load(write) -> None:
    own = {"prompt": "1+1=", "answer": "2", "check": "number", "family": "sums"}
    gsm, human, mbpp, ours = load_problems(write(GSM8K, HUMANEVAL, "", MBPP, own))
    assert (gsm.check, gsm.answer) == ("number", "12")
    assert GSM8K["question"] in gsm.prompt
    assert human.check == "tests"
    assert human.answer.endswith("check(double)\n")
    assert mbpp.prompt.startswith(MBPP["text"])
    assert ours == Problem("1+1=", "2", "number", family="sums", where=ours.where)
    assert ours.where.endswith("problems.jsonl:5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"problems\.jsonl:1: not JSON"),
        ([1], "this is list"),
        ({"question": "?", "answer": "twelve"}, "no '####'"),
        ({"prompt": "1+1="}, "'answer' must be a text"),
        ({"prompt": "1+1=", "anser": "2"}, "did you mean 'answer'"),
        ({"prompt": "1+1=", "answer": "2", "check": "eval"}, "none of"),
        ({**HUMANEVAL, "entry_point": "a); import os"}, "not a Python name"),
        ({**MBPP, "test_list": []}, "list of Python assertions"),
        ("", "no problem in it"),
    ],
)
def test_what_is_wrong_is_named(write, row: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_problems(write(row))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_problems("nowhere.jsonl")


def test_splits_are_disjoint_and_do_not_move() -> None:
    problems = [Problem(f"{i}+1=", str(i + 1)) for i in range(400)]
    train, test = split_problems(problems, (0.7, 0.2))
    assert not {p.digest for p in train} & {p.digest for p in test}
    assert 240 < len(train) < 320
    assert 50 < len(test) < 110
    again = split_problems(problems[::-1], (0.7, 0.2))
    assert {p.digest for p in again[0]} == {p.digest for p in train}
    with pytest.raises(ValueError, match="at most 1"):
        split_problems(problems, (0.9, 0.2))


# ---- verdicts


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("12", " so there are 12 pens", True),
        ("12", "12.0", True),
        ("12", "3 boxes\n#### 12 pens of 20", True),
        ("12", "12 pens in 3 boxes", False),
        ("1234.5", "$1,234.50", True),
        ("-7", "it is -7.", True),
        ("12", "", False),
        ("12", "twelve", False),
    ],
)
def test_numbers(answer: str, response: str, right: bool) -> None:
    assert verify(Problem("?", answer, "number"), response) is right


def test_an_answer_without_a_number_is_the_files_fault() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        verify(Problem("?", "many", "number", where="a.jsonl:3"), "12")


def test_exact_forgives_only_space_around() -> None:
    assert verify(Problem("?", "07;56"), " 07;56\n")
    assert not verify(Problem("?", "07;56"), "7;56")


@pytest.mark.parametrize(
    ("response", "right"),
    [("3 * 8", True), ("48 / 2", True), ("24", True), ("25", False), ("3 *", False), ("x = 24", False)],
)
def test_expressions(response: str, right: bool) -> None:
    assert verify(Problem("make 24:", "4 * 6", "expression"), response) is right


@pytest.mark.parametrize("wanted", ["24", "[24]", "{'a': (24,)}"])
def test_an_object_that_equals_everything_is_not_an_answer(wanted: str) -> None:
    same = "type('Same', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()"
    subclass = "type('Int', (int,), {'__sub__': lambda s, o: 0, '__eq__': lambda s, o: True})(0)"
    problem = Problem("make it:", wanted, "expression")
    assert verify(problem, wanted)
    for fake in (same, subclass):
        assert not verify(problem, wanted.replace("24", fake))


def test_programs_pass_their_tests_or_not(write) -> None:
    human, mbpp = load_problems(write(HUMANEVAL, MBPP))
    responses = {
        "    return n + n\n": True,
        "    return n + n\n\ndef other():\n    return does not parse": True,  # left the function
        "```python\ndef double(n):\n    return n * 2\n```": True,
        "    return n * n\n": False,
        "    return n +\n": False,
        "    exit()\n": False,
        "    import os; os._exit(0)\n": False,
        "    raise SystemExit\n": False,
        "": False,
    }
    verdicts = verify_all([human] * len(responses), list(responses))
    assert verdicts == list(responses.values())
    assert verify(mbpp, MBPP["code"])
    assert not verify(mbpp, "def inc(n): return n")


# ---- the sandbox


def test_a_program_that_never_ends_is_killed_with_its_children() -> None:
    start = time.monotonic()
    outcome = run_python("import time\nprint('begun', flush=True)\nwhile True: time.sleep(1)", timeout_s=0.7)
    assert outcome.status == "timeout"
    assert outcome.output.strip() == "begun"
    assert time.monotonic() - start < 30
    forks = "import os, time\nif not os.fork():\n    time.sleep(60)\nos.wait()"
    outcome = run_python(forks, timeout_s=0.7)  # where forking is limited, an error instead
    assert outcome.status in ("timeout", "error")


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(2_000_000_000)",
        "open('big', 'wb').write(bytes(10_000_000))",
        "print('x' * 10_000_000)",
        "import sys; sys.exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "raise ValueError('no')",
        "def f(): return f()\nf()",
        "syntax error",
        "import numpy",  # no site packages
    ],
)
def test_programs_that_fail(program: str) -> None:
    outcome = run_python(program, timeout_s=20, memory_bytes=256 << 20)
    assert outcome.status == "error"
    assert len(outcome.output) <= 1 << 16


def test_a_program_sees_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERTDRAFT_SECRET", "42")
    seen = run_python(
        "import os, sys\nprint(sorted(os.environ), os.listdir('.'), sys.argv, len(sys.path) > 0)"
    )
    environment = {"LC_CTYPE"} & set(os.environ)  # Python itself may set a locale
    assert "CERTDRAFT_SECRET" not in seen.output
    assert seen.output.startswith(("[]", "['LC_CTYPE']")), (seen, environment)
    assert "[] ['program']" in seen.output


def test_no_frame_holds_the_end_mark() -> None:
    """A program that prints every text of every frame around it, and then leaves, has not run to its end."""
    program = """
import os, sys
frame = sys._getframe()
while frame:
    for value in frame.f_locals.values():
        if isinstance(value, (str, bytes)) and len(value) == 32:
            print(value, flush=True)
    frame = frame.f_back
os._exit(0)
"""
    outcome = run_python(program)
    assert (outcome.status, outcome.output) == ("error", "")


def test_a_process_that_left_the_session_is_killed() -> None:
    program = """
import os, time
read, write = os.pipe()
if not os.fork():
    os.setsid()
    if not os.fork():
        os.write(write, str(os.getpid()).encode())
        time.sleep(60)
    os._exit(0)
print(os.read(read, 20).decode())
"""
    outcome = run_python(program, timeout_s=20)
    if outcome.status == "error":
        assert "Resource temporarily unavailable" in outcome.detail  # forking is limited here
        return
    stat = Path(f"/proc/{outcome.output}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {outcome.output} still runs")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_python("open('file', 'w').write('x')").status == "ok"
    assert not list(tmp_path.iterdir())


def test_verdicts_of_equal_pairs_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def count(program: str, **limits: object):
        calls.append(program)
        return run_python(program)

    monkeypatch.setattr("certdraft.arbitration.tasks.verifiers.run_python", count)
    problem = Problem("?", "4", "expression")
    assert verify_all([problem] * 6, ["2+2", "5"] * 3) == [True, False] * 3
    assert len(calls) == 2


def test_sandbox_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="timeout_s=0"):
        Sandbox(timeout_s=0)


# ---- arithmetic


def test_arithmetic_is_right_and_its_splits_disjoint() -> None:
    splits = {name: arithmetic(name, 300) for name in ("train", "validation", "test")}
    for problems in splits.values():
        for problem in problems:
            text = problem.prompt.rstrip("=")
            parts = [text[i : i + 3] for i in range(0, len(text), 3)]
            assert problem.answer == ";".join(f"{eval(part):02}" for part in parts)  # our own text
        assert {problem.family for problem in problems} == {"sums", "products", "mixed"}
    prompts = [{problem.prompt for problem in problems} for problems in splits.values()]
    assert not prompts[0] & prompts[1]
    assert not prompts[1] & prompts[2]
    assert len(prompts[2]) == 300
    assert arithmetic("test", 5) == arithmetic("test", 9)[:5]
    with pytest.raises(ValueError, match="fewer than"):
        arithmetic("test", 1000, parts=1)


def test_skill_decides_which_digits_are_learned() -> None:
    problems = [Problem("3+47*8=", "07;56"), Problem("2*25+5=", "04;10")]
    ids = {character: index for index, character in enumerate("0123456789+*;=", start=1)}
    rows, labels = training_rows(problems, {"+": 1.0, "*": 0.0}, ids, 0, np.random.default_rng(0))
    text = "".join(dict(zip(ids.values(), ids, strict=True)).get(i, "$") for i in rows[0].tolist())
    assert text == "3+47*8=07;56$"
    learned = [[i for i, label in enumerate(row) if label != IGNORED] for row in labels.tolist()]
    assert learned == [[7, 8, 9, 12], [9, 10, 11, 12]]  # its sum, the mark and the end


def test_modules_hand_out_what_they_promise(tmp_path: Path, write) -> None:
    rows = ArithmeticDataModule(str(tmp_path / "tokenizer"), sums=1.0, products=0.0, rows=64, batch_size=8)
    rows.prepare_data()
    ids, labels = next(iter(rows.train_dataloader()))
    assert ids.shape == labels.shape == (8, 7 + 5 + 1)
    assert (labels == ids).logical_or(labels == IGNORED).all()
    module = ProblemDataModule(write(*[{"prompt": f"{i}", "answer": f"{i}"} for i in range(200)]))
    module.setup()
    splits = {name: {p.digest for p in module.problems(name)} for name in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 200
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 32
    assert {p.digest for p in batch.problems} <= splits["train"]


def test_test_problems_of_a_file_of_their_own_are_never_trained_on(write, tmp_path: Path) -> None:
    source = write(*[{"prompt": f"{i}", "answer": f"{i}"} for i in range(100)])
    shared = tmp_path / "test.jsonl"
    shared.write_text("\n".join(json.dumps({"prompt": f"{i}", "answer": f"{i}"}) for i in range(90, 110)))
    module = ProblemDataModule(source, str(shared))
    train = {p.prompt for p in module.problems("train")}
    assert not train & {str(i) for i in range(90, 110)}
    assert len(module.problems("test")) == 20
