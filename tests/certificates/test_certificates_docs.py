"""The pages about certificates say what the code does."""

import doctest
import re
from pathlib import Path

import certdraft

DOCS = Path(certdraft.__file__).parent / "docs"


def test_examples_run() -> None:
    text = (DOCS / "certificates.md").read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    test = doctest.DocTestParser().get_doctest(examples, {}, "certificates.md", None, 0)
    assert len(test.examples) > 25
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_cited_sections_exist() -> None:
    sections = set(re.findall(r"^#+ (\d+)", (DOCS / "theory.md").read_text(encoding="utf-8"), flags=re.M))
    for path in (DOCS.parent / "certificates").glob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "theory.md" in line:
                for number in re.findall(r"§(\d+)", line):
                    assert number in sections, f"{path.name}: {line.strip()}"
