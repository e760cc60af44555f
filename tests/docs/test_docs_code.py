"""Every code block of the README and the docs is executed, parsed or looked up: none may go stale.

python   run, in order, in one namespace a page; `>>>` blocks are doctests
bash     `certdraft`, `lightning`, `make` and `python benchmarks/…` lines: command, options and files exist
yaml     parsed
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import certdraft
from certdraft.arbitration import ArbiterPolicy
from certdraft.train.commands.cli import main

ROOT = Path(certdraft.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {
    "vllm",
    "python",
    "wandb",
    "pip",
    "torchrun",
    "srun",
    "sbatch",
    "cd",
    "git",
    "export",
    "curl",
    "docker",
    "uv",
    "source",
    "llama-server",
    "mkdir",
}
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex", "json", ""}
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)


def blocks(page: Path, *languages: str) -> list[str]:
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for _, language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's bash blocks, comments removed, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# The README's quickstart is run with fewer rows and steps; Lightning warns about such small runs.
SMALLER = {"rows=rows[:-16]": "rows=rows[:64]", "max_steps=100": "max_steps=2"}


def smaller(page: Path, text: str) -> str:
    for long, short in SMALLER.items() if page.name == "README.md" else ():
        assert long in text
        text = text.replace(long, short)
    return text


def only(paths: list[Path], *languages: str) -> list[Any]:
    quiet = pytest.mark.filterwarnings("ignore")
    return [
        pytest.param(p, id=p.stem, marks=[quiet] if p.stem in ("README", "extending") else [])
        for p in paths
        if blocks(p, *languages)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the pages take for granted, on the embedded target."""
    from transformers import AutoModelForCausalLM

    from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
    from certdraft.decoding import TargetRunner, greedy
    from certdraft.drafters import CardFacts, CausalDrafter, export

    model, tokenizer = load_target("embedded"), load_tokenizer("embedded")
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **sizes}
    drafter = CausalDrafter(config, vocab_size=model.config.vocab_size).eval()
    fingerprint = tokenizer_fingerprint(tokenizer)
    card = CardFacts("embedded", model.config.vocab_size, fingerprint)
    folder = tmp_path_factory.mktemp("export") / "drafter"
    prompt_ids = tokenizer("def main():\n").input_ids
    return {
        "exported": export(drafter, folder, tokenizer=tokenizer, draft_length=4, card=card),
        "model": model,
        "target": model,
        "tokenizer": tokenizer,
        "drafter": drafter,
        "prompt_ids": prompt_ids,
        "prompts": [prompt_ids, prompt_ids[:-1]],
        "tokens": greedy(TargetRunner(model), prompt_ids, 12),
        "fingerprint": fingerprint,
        "inputs": tokenizer("def main():\n", return_tensors="pt"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }


@pytest.fixture
def place(tmp_path: Path, tiny_trace: Path, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that looks like that of a user who followed the pages."""
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "train").symlink_to(tiny_trace)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my-run.yaml").symlink_to(ROOT / "configs" / "demo.yaml")
    (tmp_path / "drafter").symlink_to(world["exported"])
    run = tmp_path / "runs" / "demo" / "2026-01-01_00-00-00"
    run.mkdir(parents=True)
    for record in ("config.yaml", "run.yaml"):
        (run / record).touch()  # what `latest` stands for
    ArbiterPolicy().save(tmp_path / "runs" / "arithmetic" / "policy")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from certdraft.data import Corpus, Generation, Prompts, record_trace

    where = tmp_path_factory.mktemp("docs") / "trace"
    record_trace(
        str(where),
        "embedded",
        Corpus(max_rows=4),
        Prompts(prompt_tokens=16),
        Generation(max_new_tokens=8, loops="keep"),
        accelerator="cpu",
    )
    return where


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_say_what_they_are(page: Path) -> None:
    assert {language for _, language, _ in _BLOCK.findall(page.read_text(encoding="utf-8"))} <= LANGUAGES


@pytest.mark.parametrize("page", only(PAGES, "python"))
def test_python_blocks_run(page: Path, world: dict[str, Any], place: Path) -> None:
    namespace = dict(world)
    for number, text in enumerate(blocks(page, "python"), start=1):
        if text.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(
                text, namespace, f"{page.name} block {number}", None, None
            )
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            told = io.StringIO()
            runner.run(test, clear_globs=False, out=told.write)
            assert runner.failures == 0, told.getvalue()
            namespace = test.globs
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(smaller(page, text), f"{page.name} block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", only(PAGES, "yaml"))
def test_yaml_blocks_are_yaml(page: Path) -> None:
    for text in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(text), dict | list)


@pytest.mark.parametrize("page", only(PAGES, "bash"))
def test_bash_blocks_are_commands_that_exist(
    page: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        while "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]  # VARIABLE=value in front
        words = words[: words.index(">")] if ">" in words else words
        line = shlex.join(words)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), line
        elif words[:1] == ["python"] and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line
        elif words[0] in ("certdraft", "lightning"):
            with pytest.raises(SystemExit) as stop:
                main([*words[1:], "--print_config"])
            assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
        else:
            assert words[0] in FOREIGN, f"{page.name}: who runs {line!r}?"


FOLDERS = (
    "arbitration|benchmarks|certificates|configs|data|decoding|drafters|evaluation|losses|support|tests|train"
)
_PATH = re.compile(rf"(?<![\w/.-])(?:{FOLDERS})/[\w/.-]+\.(?:py|yaml|json|png|sbatch)\b")
_MODULE = re.compile(rf"\bcertdraft\.(?:{FOLDERS})(?:\.\w+)*")


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))], ids=lambda p: p.stem)
def test_files_and_modules_named_on_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [path for path in _PATH.findall(text) if not (ROOT / path).exists()] == []
    assert [name for name in _MODULE.findall(text) if not importable(name)] == []


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module holds."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part, None)
        return found is not None
    return False
