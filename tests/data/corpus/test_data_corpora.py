"""Rows: every format gives the same rows, every defect an error with file, line and key."""

import gzip
import http.server
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from certdraft.data import Accounting, Corpus, CorpusError, read_rows
from certdraft.data.corpus import corpora as corpora_module
from certdraft.data.corpus.corpora import hub_rows
from certdraft.data.corpus.standard_library import split_of
from certdraft.support import hub_answers

ROWS = [
    {"prompt": "one"},
    {"text": "two\nlines"},
    {"messages": [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3"}]},
]


def rows_of(source: Path | str, **settings: object) -> tuple[list, Accounting]:
    accounting = Accounting("rows")
    rows = list(read_rows(Corpus(str(source), **({"split": "all"} | settings)), accounting))
    accounting.used = len(rows)
    assert accounting.balanced
    return rows, accounting


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def saved(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list([{"prompt": "one"}])}).save_to_disk(folder)


def parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist([{"prompt": "one", "text": None}]), file)


def test_formats_agree(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_bytes(jsonl(ROWS))  # the wrong suffix for one object a line
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    results = [[(r.kind, r.digest) for r in rows_of(f)[0]] for f in sorted(tmp_path.iterdir())]
    assert [kind for kind, _ in results[0]] == ["prompt", "text", "messages"]
    assert results[1:] == results[:1] * 3


@pytest.mark.parametrize(("name", "write"), [("x.parquet", parquet), ("saved", saved)])
def test_formats_of_datasets(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    [row] = rows_of(tmp_path / name)[0]
    assert (row.kind, row.content, row.where) == ("prompt", "one", f"{name} row 0")


def test_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a\nb\n", encoding="utf-8")
    [row] = rows_of(tmp_path / "x.txt")[0]
    assert (row.kind, row.content) == ("text", "a\nb\n")


def test_folder_reads_all_files_and_counts_duplicates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").write_text(json.dumps([*ROWS, {"prompt": "four"}]))
    (tmp_path / ".hidden.jsonl").write_text("not json")
    (tmp_path / "notes.pdf").write_text("ignored")
    rows, accounting = rows_of(tmp_path)
    assert [row.where for row in rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "deep/b.json[3]"]
    assert accounting.skipped["duplicate"].count == 3


USER = {"role": "user", "content": "hi"}
BAD = {
    "broken json": (b'{"prompt": "one"\n', r"bad\.jsonl:2: not valid JSON"),
    "not utf-8": (b'{"prompt": "\xff"}\n', r"bad\.jsonl:2: not UTF-8 \(byte 0xff at 12\)"),
    "lone surrogate": (b'{"prompt": "\\ud800"}\n', r"bad\.jsonl:2: prompt holds a lone surrogate"),
    "no text": (b'{"question": "?"}\n', r"bad\.jsonl:2: .*needs `messages`, `prompt` or `text`.*`question`"),
    "null": (b'{"prompt": null}\n', r"bad\.jsonl:2: a row needs"),
    "number": (b'{"prompt": 3}\n', r"bad\.jsonl:2: prompt: expected a string, got int"),
    "blank": (b'{"text": "  "}\n', r"bad\.jsonl:2: text is empty"),
    "list": (b"[1]\n", r"bad\.jsonl:2: expected an object with a key, got list"),
    "messages string": (b'{"messages": "hi"}\n', r"bad\.jsonl:2: messages: expected a list"),
    "no messages": (b'{"messages": []}\n', r"bad\.jsonl:2: messages: .*an empty list"),
    "role": (jsonl([{"messages": [USER, {"role": "bot", "content": ""}]}]), r"messages\[1\]\.role: .*'bot'"),
    "content": (jsonl([{"messages": [{"role": "user", "content": ["hi"]}]}]), r"\[0\]\.content: .*got list"),
    "no question": (jsonl([{"messages": [USER | {"role": "assistant"}]}]), r"messages: no user turn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_named_or_skipped(tmp_path: Path, case: str) -> None:
    line, message = BAD[case]
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "fine"}\n' + line + b'{"prompt": "fine too"}\n')
    with pytest.raises(CorpusError, match=message):
        rows_of(tmp_path / "bad.jsonl")
    rows, accounting = rows_of(tmp_path / "bad.jsonl", bad_rows="skip")
    assert [row.content for row in rows] == ["fine", "fine too"]
    assert accounting.skipped["malformed"].count == 1
    assert "bad.jsonl:2" in accounting.skipped["malformed"].example


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "x.jsonl is empty"),
        ("x.jsonl", b"\n \n", "only blank lines"),
        ("x.json", b"[]", "empty list"),
        ("x.json", b"[\n{]", r"x\.json:1: not valid JSON"),
        ("x.jsonl.gz", b"plain", "broken gzip"),
        ("x.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("x.csv", b"a,b", "unknown kind of file"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        rows_of(tmp_path / name)


def test_folder_without_rows_and_trace_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no file ending in \.jsonl"):
        rows_of(tmp_path)
    (tmp_path / "trace.json").write_text("{}")
    with pytest.raises(CorpusError, match="is a trace, not a corpus"):
        rows_of(tmp_path)


def test_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"chat\.jsonl: no such file.*holds chats\.jsonl"):
        rows_of(tmp_path / "chat.jsonl")


def test_hub_name_without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*HF_HUB_OFFLINE is set.*hf download"):
        rows_of("owner/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=r"'owner/name'.*no answer from http://127.0.0.1:9.*jsonl"):
        rows_of("owner/name")


def test_hub_that_refuses_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to everything
    server.RequestHandlerClass.log_message = lambda *_: None
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub_answers()
    thread.join()
    server.server_close()


def test_splits_partition_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(300)]
    found = {}
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(ordered))
        for split in ("train", "validation", "test"):
            read = rows_of(tmp_path / f"{name}.jsonl", split=split, validation_fraction=0.2)[0]
            found[name, split] = {row.content for row in read}
    parts = [found["a", split] for split in ("train", "validation", "test")]
    assert set.union(*parts) == {row["prompt"] for row in rows}
    assert sum(map(len, parts)) == 300
    assert [found["b", split] for split in ("train", "validation", "test")] == parts
    assert 40 < len(parts[1]) < 80  # 0.2 of 300, four standard deviations
    assert 3 <= len(parts[2]) < 31


def test_max_rows_stops_reading(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"prompt": str(i // 2)} for i in range(100)]))
    rows, accounting = rows_of(tmp_path / "x.jsonl", max_rows=3)
    assert [row.content for row in rows] == ["0", "1", "2"]
    assert accounting.read == 5


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"question": "why?", "text": "unused"}]))
    [row] = rows_of(tmp_path / "x.jsonl", column="question")[0]
    assert (row.kind, row.content) == ("prompt", "why?")
    with pytest.raises(CorpusError, match=r"x\.jsonl:1: no key 'ask'; the row has `question`, `text`"):
        rows_of(tmp_path / "x.jsonl", column="ask")


def test_prompt_may_be_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"prompt": [USER]}]))
    assert rows_of(tmp_path / "x.jsonl")[0][0].kind == "messages"


def test_embedded_corpus_is_the_standard_library_in_hash_order() -> None:
    rows, _ = rows_of("embedded", split="validation")
    names = [row.where.removeprefix("standard library ") for row in rows]
    assert len(names) > 10
    assert {split_of(name) for name in names} == {"validation"}
    assert names != sorted(names)  # so that the first few are a fair sample


def test_ten_megabytes_in_one_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"text": "word " * 2_000_000}]))
    assert len(rows_of(tmp_path / "x.jsonl")[0][0].content) == 10_000_000


@pytest.mark.parametrize("settings", [{"validation_fraction": 0.9, "test_fraction": 0.1}, {"max_rows": 0}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match="less than 1|at least 1"):
        Corpus(**settings)


@pytest.mark.filterwarnings("ignore:unclosed file")  # datasets leaves the file to the collector
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_dataset_come_one_by_one(tmp_path: Path, streaming: bool) -> None:
    lines = "".join(f'{{"prompt": "row {i}"}}\n' for i in range(50))
    (tmp_path / "train.jsonl").write_text(lines)
    rows = list(hub_rows(str(tmp_path), None, "train", streaming))
    assert [record["prompt"] for _, record in rows] == [f"row {i}" for i in range(50)]
    assert rows[7][0].endswith(" row 7")


def test_streaming_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = [("o/n row 0", {"prompt": "a"}), ("o/n row 1", {"prompt": "b"})]
    monkeypatch.setattr(corpora_module, "hub_rows", lambda *given: asked.append(given) or iter(rows))
    read = read_rows(Corpus("o/n", split="all", streaming=True, max_rows=1), Accounting("rows"))
    assert [row.content for row in read] == ["a"]
    assert asked == [("o/n", None, "train", True)]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}


def test_tools_and_tool_calls_are_read_and_hashed(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [
        {"messages": [USER, CALL], "tools": tools},
        {"messages": [USER, CALL], "tools": None},
        {"messages": [USER, {"role": "assistant", "content": "hm", "tool_calls": []}]},
        {"messages": [USER, CALL], "tools": json.dumps(tools)},
    ]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    read, accounting = rows_of(tmp_path / "x.jsonl")
    assert [row.tools for row in read] == [tuple(tools), (), ()]  # and so the first two differ
    assert accounting.skipped["duplicate"].example == "x.jsonl:4"
    assert read[0].content == (USER, CALL | {"content": ""})
    assert read[2].content == (USER, {"role": "assistant", "content": "hm"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"\[1\]\.content: .*got NoneType"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, r"\[1\]\.content: .*got NoneType"),
        ({"messages": [USER, CALL | {"tool_calls": "add"}]}, r"\[1\]\.tool_calls: expected a list, got str"),
        ({"messages": [USER], "tools": "{"}, r"x\.jsonl:1: tools: not valid JSON"),
        ({"messages": [USER], "tools": [3]}, r"x\.jsonl:1: tools: expected a list of objects"),
        ({"conversations": [{"from": "bot", "value": "?"}]}, r"conversations\[0\]\.role: .*got 'bot'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.content: .*got NoneType"),
    ],
)
def test_messages_that_cannot_be_used(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([row]))
    with pytest.raises(CorpusError, match=message):
        rows_of(tmp_path / "x.jsonl")


def test_sharegpt_rows(tmp_path: Path) -> None:
    turns = [
        ("system", "brief"),
        ("human", "add"),
        ("function_call", "{}"),
        ("observation", "3"),
        ("gpt", "3."),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (tmp_path / "x.jsonl").write_bytes(jsonl([row]))
    [read] = rows_of(tmp_path / "x.jsonl")[0]
    assert read.kind == "messages"
    assert [message["role"] for message in read.content] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [message["content"] for message in read.content] == [text for _, text in turns]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
def test_byte_order_mark_is_left_out(tmp_path: Path, name: str) -> None:
    content = b"one" if name == "x.txt" else b'{"prompt": "one"}'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert rows_of(tmp_path / name)[0][0].content == "one"


HOSTILE = {
    "digits": (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json"])
def test_hostile_json_is_named_or_skipped(tmp_path: Path, case: str, name: str) -> None:
    line, message = HOSTILE[case]
    (tmp_path / name).write_bytes(b'{"prompt": "fine"}\n' + line)
    with pytest.raises(CorpusError, match=rf"bad\.jsonl?:2: {message}"):
        rows_of(tmp_path / name)
    rows, accounting = rows_of(tmp_path / name, bad_rows="skip")
    assert [row.content for row in rows] == ["fine"]
    assert accounting.skipped["malformed"].count == 1


@pytest.mark.parametrize("damage", ["cut", "corrupt"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz"])
def test_broken_gzip_is_named_or_skipped(tmp_path: Path, damage: str, name: str) -> None:
    lines = jsonl([{"prompt": f"question {i} {hash(i) ** 5}"} for i in range(2000)])
    data = bytearray(gzip.compress(lines))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    (tmp_path / name).write_bytes(bytes(data))
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"prompt": "of another file"}]))
    with pytest.raises(CorpusError, match=rf"{name}:\d+: (broken gzip file|not valid JSON)"):
        rows_of(tmp_path)
    rows, accounting = rows_of(tmp_path, bad_rows="skip")
    assert accounting.skipped["malformed"].count >= 1
    assert rows[-1].content == "of another file"


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora_module, "_LONGEST_LINE", 100)
    rows = [{"prompt": "fine"}, {"prompt": "x" * 1000}, {"prompt": "y" * 85}, {"prompt": "z" * 86}]
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(CorpusError, match=r"x\.jsonl:2: a row of more than"):
        rows_of(tmp_path / "x.jsonl")
    read, accounting = rows_of(tmp_path / "x.jsonl", bad_rows="skip")
    assert [row.content[0] for row in read] == ["f", "y"]
    assert accounting.skipped["malformed"].count == 2
    monkeypatch.setattr(corpora_module, "_LARGEST_FILE", 100)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(CorpusError, match=r"x\.json holds more than"):
        rows_of(tmp_path / "x.json")
