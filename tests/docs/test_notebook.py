"""The quickstart notebook runs from top to bottom, and what it shows is what it printed.

With nbclient installed it is executed in a kernel, as Jupyter does; else its cells run in one namespace.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import certdraft

NOTEBOOK = Path(certdraft.__file__).parent / "docs" / "quickstart.ipynb"
SMALLER = {"rows=rows[:64]": "rows=rows[:24]", "rows[-16:]": "rows[-4:]", "max_steps=150": "max_steps=2"}


def shrunken() -> dict[str, Any]:
    """The notebook with fewer rows and steps, and without its output."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    book = json.loads(text)
    for cell in code_cells(book):
        cell.update(outputs=[], execution_count=None)
    return book


def code_cells(book: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in book["cells"] if cell["cell_type"] == "code"]


def printed(book: dict[str, Any]) -> str:
    outputs = [output for cell in code_cells(book) for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")


def in_a_kernel(book: dict[str, Any], folder: Path) -> str:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(book), as_version=4)  # joins the lines of each cell
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return printed(notebook)


def in_one_namespace(book: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    namespace: dict[str, Any] = {}
    capsys.readouterr()
    for number, cell in enumerate(code_cells(book), start=1):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} cell {number}", "exec"), namespace)
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # Lightning warns about runs this small, Jupyter about its sockets
def test_the_quickstart_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kernel = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))
    told = in_a_kernel(shrunken(), tmp_path) if kernel else in_one_namespace(shrunken(), capsys)
    for words in (
        "24 documents to train on, 4 to test with",
        "The drafters on held-out text",
        "48 tokens in",
    ):
        assert words in told


def test_the_notebook_is_stored_with_what_it_printed() -> None:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert "certified coverage@4" in printed(book)
    assert {output["output_type"] for cell in code_cells(book) for output in cell["outputs"]} == {"stream"}
