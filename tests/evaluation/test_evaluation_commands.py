"""`certify` and `evaluate` as a user runs them: the embedded target, a trace, an exported drafter, YAML."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from oracles.models.decoding_models import with_one_wrong_token

import certdraft
from certdraft.data import Corpus, Generation, Prompts, embedded_target_path, load_tokenizer, open_trace
from certdraft.drafters import CardFacts, CausalDrafter, export
from certdraft.evaluation import CertifyProtocol, commands, run_certify, run_evaluate
from certdraft.evaluation.held_out import refuse_training_texts
from certdraft.evaluation.loading import StageProgress, load_checked
from certdraft.evaluation.measure import bench
from certdraft.support import sha256_of
from certdraft.train.commands.cli import main

CONFIGS = sorted((Path(certdraft.__file__).parent / "configs" / "certify").glob("*.yaml"))


def certify_embedded(out: Path, rows: int, tokens: int) -> Path:
    """The page of the embedded target, from a trace of a few short texts."""
    return run_certify(
        str(out),
        target="embedded",
        corpus=Corpus(split="test", max_rows=rows),
        prompts=Prompts(prompt_tokens=16),
        generation=Generation(max_new_tokens=tokens, loops="keep"),
        num_kept=16,
        accelerator="cpu",
    )


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target certified from a corpus: the folder holds the trace that was recorded on the way."""
    out = tmp_path_factory.mktemp("certify") / "out"
    assert certify_embedded(out, 5, 12) == out / "certify.html"
    return out


@pytest.fixture(scope="module")
def drafter(certified: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    meta = open_trace(certified / "trace").meta
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    made = CausalDrafter(
        config={**sizes, "num_key_value_heads": 1, "head_dim": 16}, vocab_size=meta.vocab_size
    )
    facts = CardFacts("embedded", meta.vocab_size, meta.tokenizer_fingerprint)
    where = tmp_path_factory.mktemp("drafter") / "export"
    return export(made, where, tokenizer=load_tokenizer(), draft_length=4, card=facts)


def test_certify_records_and_tabulates(certified: Path) -> None:
    data = json.loads((certified / "certify.json").read_text())
    assert data["trace"]["target"] == "embedded"
    assert 5 * 6 <= data["trace"]["counted_steps"] <= 5 * 12
    assert [r["k"] for r in data["mass"]] == [1, 3, 5, 10]  # a head of 16 cannot say what 25 tokens hold
    assert 0 < data["certificates"][0]["mean"] < 0.6931
    assert "sha-256 of trace.json" in data["provenance"]


def test_a_folder_in_use_and_contradicting_sources_are_refused(certified: Path, tmp_path: Path) -> None:
    trace = str(certified / "trace")
    with pytest.raises(FileExistsError, match="already in use"):
        run_certify(str(certified), trace=trace)
    with pytest.raises(FileExistsError, match="already in use"):
        run_certify(str(certified), target="embedded")
    with pytest.raises(ValueError, match="neither"):
        run_certify(str(tmp_path / "a"))
    with pytest.raises(ValueError, match="both"):
        run_certify(str(tmp_path / "b"), trace=trace, target="embedded")
    with pytest.raises(ValueError, match="K=16.*needs 33"):
        run_certify(str(tmp_path / "c"), trace=trace, protocol=CertifyProtocol(coverage=(32,)))
    assert not list(tmp_path.iterdir())


def test_evaluate_runs_an_exported_drafter(certified: Path, drafter: Path, tmp_path: Path) -> None:
    page = run_evaluate(
        str(tmp_path / "out"),
        {"fresh": str(drafter)},
        str(certified / "trace"),
        "embedded",
        prompts=2,
        device="cpu",
    )
    data = json.loads((page.parent / "report.json").read_text())
    assert data["bench"]["lossless"]
    assert data["bench"]["changed_texts"] == 0
    assert data["drafters"]["fresh"]["lengths"]["chain(depth=4)"]["tau"]["value"] < 2
    assert {"sha-256 of drafter fresh", "sha-256 of trace.json", "command"} <= set(data["provenance"])


def test_progress_shows_stage_after_stage_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output to a file: a line at most every ten seconds, and none for what takes less."""
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("certdraft.support.progress.time.monotonic", lambda: next(clock))
    with StageProgress() as progress:
        for done in range(5):
            progress("acceptance", done, 8)
        for done in (3, 6):
            progress("replay", done, 6)
        progress("decode", 0, 4)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" steps")[0] for line in lines] == [
        "acceptance: 2/8", "acceptance: 4/8", "replay: 6/6"
    ]  # fmt: skip


def test_a_drafters_own_training_trace_is_refused(certified: Path, drafter: Path, tmp_path: Path) -> None:
    trace = certified / "trace"
    part = {"data": {"train": {"path": "elsewhere", "sha256": sha256_of(trace / "trace.json")}}}
    trained = tmp_path / "trained"
    shutil.copytree(drafter, trained)
    (trained / "run.yaml").write_text(json.dumps({"parts": [part]}))
    with pytest.raises(ValueError, match="the drafter mine .* was trained on"):
        run_evaluate(str(tmp_path / "out"), {"mine": str(trained)}, str(trace), device="cpu")
    part["data"]["train"]["sha256"] = "0" * 64
    (trained / "run.yaml").write_text(json.dumps({"parts": [part]}))
    run_evaluate(str(tmp_path / "out"), {"mine": str(trained)}, str(trace), device="cpu")


@pytest.mark.parametrize(
    ("source", "train", "test", "fractions", "shared"),
    [
        ("embedded", "train", "test", (0.05, 0.2), ""),
        ("embedded", "test", "test", (0.05, 0.05), "split test"),
        ("chats.jsonl", "train", "test", (0.05, 0.05), ""),
        ("chats.jsonl", "train", "test", (0.05, 0.3), "splits of chats.jsonl overlap"),
        ("chats.jsonl", "all", "test", (0.05, 0.05), "split all and test"),
    ],
)
def test_texts_that_a_drafter_was_trained_on_are_refused(
    source: str, train: str, test: str, fractions: tuple[float, float], shared: str, tmp_path: Path
) -> None:
    """The same rows of a corpus recorded again, and splits by other fractions, which overlap."""
    corpora = [Corpus(source, split=train), Corpus(source, split=test, test_fraction=fractions[1])]
    for folder, corpus in zip(("train", "here"), corpora, strict=True):
        (tmp_path / folder).mkdir()
        content = {"target": folder, "settings": {"corpus": asdict(corpus)}}
        (tmp_path / folder / "trace.json").write_text(json.dumps(content))
    seen = {"path": str(tmp_path / "train"), "sha256": sha256_of(tmp_path / "train" / "trace.json")}
    (tmp_path / "run.yaml").write_text(json.dumps({"parts": [{"data": {"train": seen}}]}))
    drafters, trace = {"mine": str(tmp_path)}, str(tmp_path / "here")
    if not shared:
        refuse_training_texts(drafters, trace)
    else:
        with pytest.raises(ValueError, match=shared):
            refuse_training_texts(drafters, trace)


@pytest.mark.parametrize("where", ["evaluate", "write_evaluation"])
def test_an_interrupted_evaluation_leaves_nothing_and_the_same_command_works(
    certified: Path,
    drafter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    out = tmp_path / "runs" / "out"

    def run() -> Path:
        return run_evaluate(str(out), {"fresh": str(drafter)}, str(certified / "trace"), device="cpu")

    real = getattr(commands, where)

    def cut_off(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, where, cut_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list((tmp_path / "runs").iterdir()) == []
    monkeypatch.undo()
    assert run() == out / "report.html"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
    assert {"report.json", "metrics.json", "tables.md"} <= {path.name for path in out.iterdir()}
    shown = capsys.readouterr().out
    assert "The drafters on held-out text" in shown
    assert "coverage@4" in shown
    with pytest.raises(FileExistsError, match="already in use"):
        run()


def test_an_interrupted_certification_is_taken_up_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trace that was recorded is kept; of the report there is nothing, and then all of it."""
    out = tmp_path / "out"
    real = commands.write_certify

    def cut_off(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "write_certify", cut_off)
    with pytest.raises(KeyboardInterrupt):
        certify_embedded(out, 2, 8)
    assert [path.name for path in out.iterdir()] == ["trace"]
    monkeypatch.undo()
    assert certify_embedded(out, 2, 8) == out / "certify.html"
    assert {"trace", "certify.json", "certify.html", "tables.md"} <= {path.name for path in out.iterdir()}
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert "cannot be rejected" in capsys.readouterr().out


@pytest.mark.parametrize(("lead", "exits"), [("fault", True), ("tie", False)])
def test_a_text_that_differs_ends_the_command_with_an_error_unless_the_target_is_tied(
    certified: Path,
    drafter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lead: str,
    exits: bool,
) -> None:
    monkeypatch.setattr(bench, "decode", with_one_wrong_token(bench.decode, 2, 2048))
    if lead == "tie":
        monkeypatch.setattr(bench, "tie_width", lambda logit, dtype: 1e3)
    command = ["evaluate", "--out", str(tmp_path / "out"), "--trace", str(certified / "trace")]
    command += ["--drafters", f"{{fresh: {drafter}}}", "--target", "embedded", "--prompts", "1"]
    if exits:
        with pytest.raises(SystemExit) as stop:
            main([*command, "--device", "cpu"])
        assert stop.value.code == 2
    else:
        main([*command, "--device", "cpu"])
    said = capsys.readouterr().err
    assert ("not lossless" in said) == exits
    assert ("numerical ties" in said) != exits
    assert "where the target leads by" in said
    case = json.loads((tmp_path / "out" / "report.json").read_text())["bench"]["methods"][0]["differing"][0]
    assert (case["token"], case["tie"]) == (2, not exits)
    assert case["target_lead"] > 0


def test_a_drafter_with_another_tokenizer_is_refused_with_both_fingerprints(
    certified: Path, drafter: Path, tmp_path: Path
) -> None:
    facts = json.loads((drafter / "drafter.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in drafter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    facts["facts"]["tokenizer_fingerprint"] = "f" * 64
    (other / "drafter.json").write_text(json.dumps(facts))
    mine = open_trace(certified / "trace").meta.tokenizer_fingerprint
    with pytest.raises(ValueError, match=rf"{mine[:12]}.*f{{12}}"):
        run_evaluate(str(tmp_path / "out"), {"other": str(other)}, str(certified / "trace"), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_understood(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(run_certify)
    found = parser.instantiate(parser.parse_args(["--config", str(path)]))
    assert isinstance(found.corpus, Corpus)
    assert found.protocol == CertifyProtocol()
    if path.stem.startswith("paper"):
        assert (found.generation.max_new_tokens, found.max_documents, found.min_prompt_tokens) == (
            128,
            500,
            64,
        )
        assert found.generation.loops == "keep"
        assert found.num_kept >= 64


def test_evaluate_takes_drafters_and_trees_from_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(run_evaluate)
    chain = "{class_path: certdraft.decoding.Chain, init_args: {depth: 8}}"
    trees = f"[{chain}, {{class_path: certdraft.decoding.BestFirst}}]"
    options = ["--out", "x", "--trace", "t", "--drafters", "{hard CE: a/b, default: c}", "--builders", trees]
    found = parser.instantiate(parser.parse_args(options))
    assert list(found.drafters) == ["hard CE", "default"]
    assert [repr(b) for b in found.builders] == ["chain(depth=8)", "best_first(budget=16, max_depth=8)"]


def test_a_drafter_that_is_no_export_is_loaded_for_the_traces_vocabulary(certified: Path) -> None:
    """The embedded target's folder as a drafter: any folder that transformers loads."""
    trace = open_trace(certified / "trace")
    loaded = load_checked(str(embedded_target_path()), trace, torch.device("cpu"), "float32")
    assert loaded.vocab_size == trace.meta.vocab_size
