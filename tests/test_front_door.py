"""What a newcomer meets first: the README, `import certdraft` and its names, rows given from Python."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import certdraft

ROOT = Path(certdraft.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = re.search(r"^## Quickstart$.*?^```python\n(.*?)^```", README, re.M | re.S)
FRONT_DOOR = {
    "BlockDrafter", "CausalDrafter", "DrafterModule", "EagleDrafter", "TraceDataModule",
    "evaluate", "export", "load_target", "open_trace", "record_trace",
}  # fmt: skip
OUTSIDE = {"benchmarks", "configs", "docs", "tests"}


def packages(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("*/__init__.py")} - OUTSIDE


def test_importing_the_package_imports_no_torch() -> None:
    code = "import certdraft, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_front_door() -> None:
    assert set(certdraft.__all__) >= FRONT_DOOR
    for name in certdraft.__all__:
        assert getattr(certdraft, name) is not None


def test_readme_is_short_and_says_first_what_it_is() -> None:
    assert len(README) <= 8000
    first = README.splitlines()[:10]
    assert first[0] == "# certdraft"
    for word in ("speculative decoding", "You get", "vLLM"):
        assert any(word in line for line in first), word


def test_quickstart_is_ten_lines_and_three_imports() -> None:
    assert QUICKSTART is not None
    lines = [line for line in QUICKSTART[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    imports = [n for n in ast.walk(ast.parse(QUICKSTART[1])) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert len(imports) <= 3


def test_table_of_rooms_is_the_tree() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", README, re.M)
    assert {name: set(re.findall(r"`(\w+)`", inner)) for name, inner in rows} == {
        name: packages(ROOT / name) for name in packages(ROOT)
    }


def test_links_of_the_front_pages_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
        assert [link for link in links if not (ROOT / link).exists()] == [], page


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_rows_from_python(kind: str, tmp_path: Path) -> None:
    from certdraft.data import Generation, record_trace

    rows = [{"text": f"def add_{n}(x):\n    return x + {n}\n" * 30} for n in range(3)]
    given = rows
    if kind == "dataset":
        from datasets import Dataset

        given = Dataset.from_list(rows)
    where = tmp_path / "new" / "trace"
    short = Generation(max_new_tokens=4, loops="keep")
    meta = record_trace(str(where), generation=short, rows=given, accelerator="cpu")
    assert meta.num_rows == 3
    kept = where.with_name("trace.rows.jsonl").read_text(encoding="utf-8")
    assert kept.count("\n") == 3
    assert meta.settings["corpus"]["source"].endswith("trace.rows.jsonl")


def test_rows_that_cannot_be_recorded(tmp_path: Path) -> None:
    from certdraft.data import Corpus, CorpusError, record_trace

    where = str(tmp_path / "trace")
    with pytest.raises(CorpusError, match="rows is empty"):
        record_trace(where, rows=[])
    with pytest.raises(CorpusError, match=r"rows\[1\] cannot be stored"):
        record_trace(where, rows=[{"text": "a"}, {"text": {1, 2}}])
    with pytest.raises(ValueError, match="either corpus or rows"):
        record_trace(where, corpus=Corpus("x.jsonl"), rows=[{"text": "a"}])


def test_every_package_lists_its_public_names() -> None:
    for name in packages(ROOT):
        module = importlib.import_module(f"certdraft.{name}")
        assert module.__all__, name
        assert [n for n in module.__all__ if not hasattr(module, n)] == [], name
