"""What holds for the tree as a whole: floors, packaging, forbidden words, runnable docstrings."""

import ast
import doctest
import importlib
import pkgutil
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

import certdraft
from certdraft.drafters import drafter_kinds

ROOT = Path(certdraft.__file__).parent
# May import: everything on a lower floor, never a sibling. Only the command line imports `arbitration`.
FLOOR = {"certificates": 1, "losses": 2, "drafters": 2, "data": 2, "decoding": 3, "evaluation": 4, "train": 5}
FLOOR |= {"support": 1, "arbitration": 6, "train.commands": 7}
TOP = {name for name in FLOOR if "." not in name}
SOURCES = sorted(path for folder in TOP for path in (ROOT / folder).rglob("*.py"))
LATE = {"peft", "wandb", "matplotlib", "triton", "vllm", "openai"}  # imported by the function that needs them
LIGHTNING = re.compile(r"train/|arbitration/|data/(batches|record)/\w+\.py")  # who may know the Trainer


def imports(path: Path, *, top: bool = False) -> list[str]:
    """Dotted names a module imports, `from a import b` as `a.b`; `top`: only those run at import time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    # `if TYPE_CHECKING:` blocks are read by type checkers alone.
    typing_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    inner |= {id(n) for block in typing_only for n in ast.walk(block)}
    names = []
    for node in ast.walk(tree):
        if top and id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def floor(parts: Sequence[str]) -> int:
    """Floor of a module by its folders: that of its sub-room where that has one, else of the room."""
    return FLOOR.get(".".join(parts[:2]), FLOOR[parts[0]])


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    where = path.relative_to(ROOT)
    folder, own = where.parts[0], floor(where.parts[:-1])
    for name in imports(path):
        first, *rest = name.split(".")
        assert first, f"{where}: relative import {name}"
        assert first not in TOP, f"{where}: `import {first}`; write certdraft.{first}"
        assert first != "lightning", f"{where}: {name} does not mix with pytorch_lightning"
        if first == "certdraft" and rest and rest[0] in TOP:
            assert floor(rest) <= own, f"{where} (floor {own}) imports {name} (floor {floor(rest)})"
            if rest[0] != folder:
                assert floor(rest) < own, f"{where} (floor {own}) imports {name}, a sibling"
                assert len(rest) <= 2, f"{where}: {name}: import it from certdraft.{rest[0]}"
    if not LIGHTNING.match(where.as_posix()):
        assert not [n for n in imports(path) if n.startswith("pytorch_lightning")], f"{where}: Lightning"
    late = [n for n in imports(path, top=True) if n.split(".")[0] in LATE]
    assert folder == "losses" and "kernels" in where.parts or not late, (
        f"{where}: import {late} in a function"
    )


def test_no_kind_of_drafter_is_asked_for_outside_its_folder() -> None:
    """What differs between kinds is a method of the protocol, so that another kind is one class."""
    modules = {kind.__name__: kind.__module__.split(".") for kind in drafter_kinds().values()}
    kinds = {name: module[2] for name, module in modules.items() if module[:2] == ["certdraft", "drafters"]}
    assert len(kinds) >= 3
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in (
                "isinstance",
                "issubclass",
            ):
                continue
            named = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.args[1])} & kinds.keys()
            where = path.relative_to(ROOT).parts
            others = {name for name in named if where[:2] != ("drafters", kinds[name])}
            assert not others, f"{'/'.join(where)}:{node.lineno} asks for {', '.join(sorted(others))}"


def test_packages_are_declared_and_the_root_is_clean() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    inits = [ROOT / "__init__.py", *(path for f in TOP for path in (ROOT / f).rglob("__init__.py"))]
    found = {".".join(["certdraft", *init.parent.relative_to(ROOT).parts]) for init in inits}
    assert found == set(tools["setuptools"]["packages"]) - {"certdraft.configs"}
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}, (
        "every *.py at the root ships"
    )
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), f"{path.relative_to(ROOT)} is in no package"


def test_every_config_is_packaged() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns, folder = tools["setuptools"]["package-data"]["certdraft.configs"], ROOT / "configs"
    packaged = {path for pattern in patterns for path in folder.glob(pattern)}
    assert {path for path in folder.rglob("*") if path.is_file()} == packaged


def test_the_container_builds_from_what_ships() -> None:
    """No package is left out of the build, and its Python is one that the metadata promise."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    ignored = {
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    assert not ignored & (TOP | {"configs", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"})
    base = re.search(r"^FROM python:(3\.\d+)-", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert base is not None
    assert f"Programming Language :: Python :: {base[1]}" in project["project"]["classifiers"]


def test_no_remote_code_no_machine_paths() -> None:
    bad = re.compile(r"trust_remote_code\s*=\s*True|(?<![\w.])/(?:work|root|home)/\w")
    texts = [
        *SOURCES,
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
    ]
    hits = {str(p.relative_to(ROOT)): m[0] for p in texts if (m := bad.search(p.read_text(encoding="utf-8")))}
    assert not hits


def test_every_module_opens_with_what_is_here() -> None:
    missing = [
        p for p in SOURCES if p.stat().st_size > 1 and not ast.get_docstring(ast.parse(p.read_text("utf-8")))
    ]
    assert not missing


def test_docstring_examples_run() -> None:
    names = [m.name for m in pkgutil.walk_packages(certdraft.__path__, "certdraft.")]
    names = [n for n in names if n.split(".")[1] in TOP and "kernels" not in n]
    assert len(names) >= len(TOP)
    failed = {n: r.failed for n in names if (r := doctest.testmod(importlib.import_module(n))).failed}
    assert not failed
