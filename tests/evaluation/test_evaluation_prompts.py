"""Prompts files in the published shapes: read as they are, answered by the target, shown file by file."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from certdraft.data import Generation, Prompts, load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.decoding import greedy
from certdraft.drafters import CardFacts, CausalDrafter, export
from certdraft.evaluation.generate_answers import WrittenMeta, write_texts
from certdraft.evaluation.measure.trace_reading import greedy_documents
from certdraft.evaluation.prompts import read_questions
from certdraft.train.commands.cli import main

# Rows in the shape of the published files; the words are ours.
SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write about a river.", "Now in one line."]},
    {"question_id": 101, "category": "qa", "turns": ["Who wrote it?"]},
    {"question_id": 102, "category": "qa", "turns": ["Where is it?"], "reference": ["Here."]},
]
GSM8K = [{"question": "Two hens lay 3 eggs each. How many?", "answer": "2 * 3 = 6\n#### 6"}]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0", "prompt": "def double(x: int) -> int:\n    \"\"\"Twice x.\"\"\"\n",
        "entry_point": "double", "canonical_solution": "    return 2 * x\n", "test": "assert double(2) == 4",
    }
]  # fmt: skip
MBPP = [
    {"text": "Write a function to add.", "code": "…", "task_id": 1, "test_list": ["assert add(1, 2) == 3"]}
]
CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


def write(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "spec_bench": write(folder / "question.jsonl", SPEC_BENCH),
        "gsm8k": write(folder / "gsm8k_test.jsonl", GSM8K),
        "humaneval": write(folder / "HumanEval.jsonl.gz", HUMANEVAL),
        "mbpp": write(folder / "mbpp.jsonl", MBPP),
        "chats": write(folder / "chats.jsonl", CHATS),
    }


def test_published_files_load_as_they_are(files: dict[str, Path]) -> None:
    first, second, _ = read_questions(str(files["spec_bench"]))
    assert first.turns == ("Write about a river.", "Now in one line.")
    assert first.groups == ("question", "question: writing")
    assert (second.where, second.bare) == ("question.jsonl:2", "Who wrote it?")
    (problem,) = read_questions(str(files["gsm8k"]))
    assert problem.turns[0].endswith("put your final answer within \\boxed{}.")
    assert problem.bare == "Question: Two hens lay 3 eggs each. How many?\nAnswer:"
    (program,) = read_questions(str(files["humaneval"]))
    assert program.turns[0].endswith('```python\ndef double(x: int) -> int:\n    """Twice x."""\n```')
    assert program.bare == HUMANEVAL[0]["prompt"]
    assert program.groups == ("HumanEval",)
    assert "assert add(1, 2) == 3" in read_questions(str(files["mbpp"]))[0].turns[0]
    assert read_questions(str(files["chats"]))[0].turns == ("Hi",)
    assert [q.category for q in read_questions(str(files["spec_bench"]), 2)] == ["writing", "qa"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": 1, "ask": "x"}],
            r"bad.jsonl:1: no prompts file has rows with `id`, `ask`. Known are Spec-Bench",
        ),
        (
            [SPEC_BENCH[0], {"turn": "x"}],
            r"bad.jsonl:2: no key `turns`, which the file's first row has .*`turn`",
        ),
        ([{"turns": []}], r"bad.jsonl:1: `turns`: expected a list of at least one text, got an empty list"),
        ([{"turns": ["a", 3]}], r"bad.jsonl:1: `turns`: expected a list of at least one text, got list"),
        ([{"turns": "a"}], r"bad.jsonl:1: `turns`: expected a list .* got blank text|got str"),
        ([GSM8K[0], {"question": 5, "answer": "5"}], r"bad.jsonl:2: `question`: expected a text, got int"),
        ([["turns"]], r"bad.jsonl:1: expected an object with keys, got list"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            r"bad.jsonl:1: `messages`: no turn of a user",
        ),
        (
            [{"messages": ["a"]}],
            r"bad.jsonl:1: `messages`: expected objects with `role` and `content`, got list",
        ),
    ],
)
def test_rows_of_another_shape_are_refused_by_file_row_and_key(
    rows: list, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(str(write(tmp_path / "bad.jsonl", rows)))


def test_lines_that_are_no_json_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text('{"turns": ["a"]}\n{"turns": ["b"')
    with pytest.raises(ValueError, match=r"cut.jsonl:2: not valid JSON"):
        read_questions(str(tmp_path / "cut.jsonl"))
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        read_questions(str(tmp_path / "nowhere.jsonl"))


@pytest.fixture(scope="module")
def embedded() -> tuple:
    return load_target(), load_tokenizer()


META = WrittenMeta("embedded", "f", "float32", 8, 2048)


@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_target_answers_and_is_asked_on(files: dict[str, Path], embedded: tuple, template: str) -> None:
    target, words = embedded
    questions = read_questions(str(files["spec_bench"])) + read_questions(str(files["humaneval"]))
    generation = Generation(max_new_tokens=6, max_length=2048, loops="keep")
    rendering = Prompts(template=template, turns="all")
    texts = write_texts(target, words, questions, rendering, generation, META, batch_size=3)
    documents = greedy_documents(texts)
    for document in documents:
        assert document.text == greedy(target, document.prompt, len(document.text))
    prompts = [words.decode(document.prompt) for document in documents]
    if template == "none":
        assert prompts == ["Write about a river.", "Who wrote it?", "Where is it?", HUMANEVAL[0]["prompt"]]
        assert texts.accounting.skipped["later turn without a chat template"].count == 1
    else:
        answer = words.decode(documents[0].text, skip_special_tokens=True)
        assert len(prompts) == 5
        assert prompts[1].startswith(prompts[0].partition("<think>")[0])
        assert f"{answer}<|im_end|>\n<|im_start|>user\nNow in one line.<|im_end|>" in prompts[1]
        assert texts.rows[1].groups == ("question", "question: writing")
        last = write_texts(target, words, questions[:1], Prompts(turns="last"), generation, META)
        assert [d.prompt for d in greedy_documents(last)] == [documents[1].prompt]
    assert texts.accounting.balanced


def test_prompts_without_room_are_left_out_and_counted(files: dict[str, Path], embedded: tuple) -> None:
    target, words = embedded
    questions = read_questions(str(files["spec_bench"]))
    short = Generation(max_new_tokens=4, max_length=26)
    texts = write_texts(target, words, questions, Prompts(template="none"), short, META)
    assert len(texts) == 2
    long = [q for q in questions if len(q.turns) == 2]
    with pytest.raises(ValueError, match="nothing to decode .*longer than max_prompt_tokens=2: 2"):
        write_texts(target, words, long, Prompts(), Generation(max_new_tokens=4, max_length=6), META)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    made = CausalDrafter(config={**sizes, "num_key_value_heads": 1, "head_dim": 16}, vocab_size=2048)
    words = load_tokenizer()
    facts = CardFacts("embedded", 2048, tokenizer_fingerprint(words))
    return export(made, tmp_path_factory.mktemp("d") / "export", tokenizer=words, draft_length=4, card=facts)


def test_evaluate_decoders_times_prompts_files(files: dict[str, Path], drafter: Path, tmp_path: Path) -> None:
    typed = [
        "evaluate",
        "--out",
        str(tmp_path / "out"),
        "--drafters",
        f"{{fresh: {drafter}}}",
        "--device",
        "cpu",
    ]
    chosen = [str(files["spec_bench"]), str(files["gsm8k"])]
    typed += ["--target", "embedded", "--prompts_files", json.dumps(chosen), "--max_new_tokens", "8"]
    typed += ["--builders", "[{class_path: Chain, init_args: {depth: 2}}, {class_path: BestFirst}]"]
    main(typed)
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["bench"]["lossless"]
    assert data["trace"]["target"] == "embedded"
    names = ["question", "question: writing", "question: qa", "gsm8k_test"]
    for rows in (data["drafters"]["fresh"]["lengths"]["chain(depth=2)"], data["bench"]["methods"][0]):
        assert [group["group"] for group in rows["groups"]] == names
        assert [group["prompts"] for group in rows["groups"]] == [4, 2, 2, 1]
        assert rows["prompts"] == 5
    assert data["bench"]["methods"][0]["groups"][0]["speedup"]["value"] > 0
    assert "sha-256 of prompts question.jsonl" in data["provenance"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By prompts file and category" in page
    assert "question: writing" in (tmp_path / "out" / "tables.md").read_text()


def test_contradicting_sources_are_refused(
    files: dict[str, Path], drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["evaluate", "--out", str(tmp_path / "out"), "--drafters", f"{{fresh: {drafter}}}"]
    some = ["--prompts_files", json.dumps([str(files["gsm8k"])])]
    for extra, message in (
        ([], "got neither"),
        ([*some, "--trace", "x"], "got both"),
        (some, "prompts files need --target"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main([*typed, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
