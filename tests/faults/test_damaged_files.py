"""Every file that a command reads, damaged in every way: one paragraph that names it, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults.conftest import Work

from certdraft.train.commands.cli import main


def empty(content: bytes) -> bytes:
    return b""


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def noise(content: bytes) -> bytes:
    return bytes(range(256)) * 4


def a_list(content: bytes) -> bytes:
    return b"[1, 2]"


def wrong_types(content: bytes) -> bytes:
    """Every value of an object is another object."""
    return json.dumps({key: {"a": [None]} for key in json.loads(content)}).encode()


def deep(content: bytes) -> bytes:
    return b"[" * 100_000 + b"]" * 100_000


BYTES, JSON = (empty, cut, flipped, noise), (empty, cut, noise, a_list, wrong_types, deep)
TEXT = (empty, cut, noise, a_list, deep)


@pytest.fixture
def copied(work: Work, tmp_path: Path) -> Work:
    """The same work in folders that may be damaged."""
    for name in ("run", "export", "trace"):
        shutil.copytree(getattr(work, name), tmp_path / name)
    return replace(work, run=tmp_path / "run", export=tmp_path / "export", trace=tmp_path / "trace")


def table() -> list:
    rows = [
        ("export", "run/checkpoints/best.ckpt", BYTES),
        ("evaluate", "export/drafter.json", JSON),
        ("evaluate", "export/config.json", JSON),
        ("evaluate", "export/model.safetensors", BYTES),
        ("evaluate", "export/tokenizer.json", (*BYTES, a_list)),
        ("evaluate", "trace/trace.json", JSON),
        ("evaluate", "trace/shard-00000.arrow", (empty, cut, noise)),
        ("certify", "trace/trace.json", JSON),
        ("certify", "trace/shard-00000.arrow", (empty, cut, noise)),
        ("lint", "export/config.json", JSON),
        ("lint", "export/model.safetensors", (empty, cut, noise, deep)),
        ("lint", "export/drafter.json", JSON),
        ("reproduce", "run/run.yaml", TEXT),
        ("reproduce", "run/config.yaml", TEXT),
        ("reproduce", "run/checkpoints/last.ckpt", BYTES),
        ("compare", "run/metrics.csv", (empty, noise, deep)),
        ("compare", "run/config.yaml", (empty, noise, a_list, deep)),  # cut short it is a shorter config
    ]
    return [
        pytest.param(command, file, damage, id=f"{command}-{Path(file).name}-{damage.__name__}")
        for command, file, damages in rows
        for damage in damages
    ]


@pytest.mark.parametrize(("command", "file", "damage"), table())
def test_damage_is_one_paragraph(
    command: str,
    file: str,
    damage: Callable[[bytes], bytes],
    work: Work,
    copied: Work,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    if command in ("lint", "reproduce", "compare"):
        arguments = {
            "lint": ["lint", "--path", str(copied.export)],
            "reproduce": ["reproduce", "--run", str(copied.run), "--runs_dir", str(tmp_path / "again")],
            "compare": ["compare", "--runs", f"[{work.run}, {copied.run}]", "--out", str(tmp_path / "page")],
        }[command]
    else:
        arguments = copied.command(command, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    complaint = said[said.index("error:") :]
    assert path.name in complaint or str(path.parent) in complaint, said
    assert "Traceback" not in said
    assert len(complaint) < 1200
    assert not list(tmp_path.glob("out/*"))
