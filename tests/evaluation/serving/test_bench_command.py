"""`certdraft bench` against real HTTP servers without a model: numbers, report, refusals, resuming."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles.servers.fake_engine import Engine

from certdraft.data import ServerError
from certdraft.evaluation import run_bench
from certdraft.train.commands.cli import main

Start = Callable[..., tuple[Engine, str]]
Result = Callable[[], dict[str, Any]]


def test_speed_acceptance_and_the_break_even_load(
    start: Start, settings: dict[str, Any], result: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    """A round costs a tick, and with the drafter four more for each further request in flight."""
    engine, url = start(drafter=True, tick_s=0.01, load_cost=4.0)
    plain, baseline = start(drafter=False, tick_s=0.01)
    page = run_bench(url=url, baseline_url=baseline, **settings)
    data, said = result(), capsys.readouterr()
    one, four = data["levels"]
    assert one["speedup"]["low"] > 1 > four["speedup"]["value"]
    assert 1 < data["break_even"] < 4
    assert "at 4 requests the drafter costs more than it gives" in said.err
    assert "breaks even at about" in said.out
    assert (engine.most_at_once, plain.most_at_once) == (4, 4)
    # τ and acceptance follow from the texts, which the engine makes of the prompts.
    rounds = [
        accepted
        for number in range(6)
        for _, accepted in engine.rounds(f"question {number}", engine.text(f"question {number}", 16))[1:]
    ]
    for level in data["levels"]:
        assert level["tau_engine"] == pytest.approx(1 + sum(rounds) / len(rounds))
        assert level["tau"]["value"] <= level["tau_engine"]
        shares = [sum(n > at for n in rounds) / len(rounds) for at in range(4)]
        assert level["accepted_by_position"] == pytest.approx(shares)
        assert level["texts"] == {
            "prompts": 6, "equal": 6, "equal_prompts": 6, "equal_token_counts": 6, "unit": "token",
            "differing": [],
        }  # fmt: skip
        tokens = sum(len(engine.text(f"question {number}", 16)) for number in range(6))
        assert level["plain"]["tokens"] == level["drafter"]["counted_tokens"] == 2 * tokens
        assert level["plain"]["between_tokens_ms"]["p99"] >= 10
        assert level["drafter"]["first_token_ms"]["p50"] >= 10
    assert {check["passed"] for check in data["checks"] if check["check"] != "no drift"} == {True}
    folder = page.parent
    names = {"bench.html", "bench.json", "bench.csv", "tables.md"}
    names |= {"speedup.png", "speedup.svg", "speedup.pdf"}
    assert names <= {path.name for path in folder.iterdir()}
    rows = list(csv.DictReader((folder / "bench.csv").read_text().splitlines()))
    assert [(row["requests"], row["drafter"]) for row in rows] == [
        ("1", "no"), ("1", "yes"), ("4", "no"), ("4", "yes"),
    ]  # fmt: skip
    assert float(rows[1]["speedup"]) == one["speedup"]["value"]
    salts = [body["cache_salt"] for body in engine.bodies]
    assert len(set(salts)) == len(salts)


def test_without_a_baseline_there_is_no_speed_up(
    start: Start, settings: dict[str, Any], result: Result
) -> None:
    _, url = start(drafter=True)
    run_bench(url=url, **settings)
    assert [row["speedup"] for row in result()["levels"]] == [None, None]
    assert result()["levels"][0]["tau_engine"] > 1
    assert not Path(settings["out"], "speedup.png").exists()


def test_sglang_and_text_without_a_template(start: Start, settings: dict[str, Any], result: Result) -> None:
    """SGLang sends no token ids and counts passes, not drafts; bare text goes to /v1/completions."""
    engine, url = start(drafter=True, engine="sglang", ids=False)
    _, baseline = start(drafter=False, engine="sglang", ids=False)
    run_bench(url=url, baseline_url=baseline, chat=False, **settings)
    level = result()["levels"][0]
    assert all("messages" not in body for body in engine.bodies)
    texts = [engine.text(f"question {n}", 16) for n in range(6)]
    rounds = sum(len(engine.rounds(f"question {n}", text)) - 1 for n, text in enumerate(texts))
    assert level["tau_engine"] == pytest.approx(sum(map(len, texts)) / rounds)
    assert level["texts"]["equal"] == 6
    assert level["texts"]["unit"] == "character"


@pytest.mark.parametrize(
    ("drafter", "plain", "says"),
    [
        ({"drafter": False}, {"drafter": False}, "drafts nothing"),
        ({"drafter": True}, {"drafter": True}, "has a drafter"),
        ({"drafter": True, "metrics": False}, {"drafter": False}, "enable-metrics"),
        ({"drafter": True}, {"drafter": False, "model": "large"}, "different models, tiny .* large"),
        ({"drafter": True}, {"drafter": False, "engine": "sglang"}, "use one engine"),
        ({"drafter": True, "template": False}, {"drafter": False}, "--chat false"),
        ({"drafter": True, "cut": True}, {"drafter": False}, "broke off"),
        ({"drafter": True, "failing": True}, {"drafter": False}, "EngineCore died"),
        ({"drafter": True, "odd": True}, {"drafter": False}, "another shape"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_servers_that_cannot_be_used(
    start: Start, settings: dict[str, Any], drafter: dict[str, Any], plain: dict[str, Any], says: str
) -> None:
    (_, url), (_, baseline) = start(**drafter), start(**plain)
    with pytest.raises(ServerError, match=says):
        run_bench(url=url, baseline_url=baseline, **settings)
    assert not Path(settings["out"], "bench.json").exists()


def test_a_wrong_model_and_a_server_that_is_not_there(
    start: Start, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine, url = start(drafter=True)
    with pytest.raises(ServerError, match="no model 'large' .tiny.; name one as --model"):
        run_bench(url=url, model="large", **settings)
    assert not engine.bodies
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--url", "http://127.0.0.1:9", "--out", settings["out"]])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "refused" in said
    assert "Traceback" not in said


def test_an_answer_that_does_not_come_in_time(start: Start, settings: dict[str, Any]) -> None:
    _, url = start(drafter=True, tick_s=0.5)
    with pytest.raises(ServerError, match="no whole answer within --timeout_s=1 .asked about prompts.jsonl"):
        run_bench(url=url, timeout_s=1.0, **settings)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs --url"),
        ({"baseline_url": "http://h"}, "needs --url"),
        ({"url": "http://h", "python": "python"}, "give one of them"),
        ({"url": "http://h", "target": "embedded"}, "both --target and --drafter"),
        ({"url": "http://h", "baseline_url": "http://h"}, "same server"),
        ({"url": "http://h", "requests": [4, 1]}, "must ascend"),
        ({"url": "http://h", "requests": [0]}, "requests 0=0 must be 1 or more"),
        ({"url": "http://h", "repetitions": 0}, "repetitions=0"),
        ({"url": "http://h", "requests": [8]}, "6 prompts cannot keep 8 requests"),
        ({"url": "ftp://h"}, "must begin with http"),
    ],
)
def test_options_that_do_not_fit(settings: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run_bench(**settings | options)
    assert not Path(settings["out"]).exists()


@pytest.mark.slow  # counts requests exactly, which a busy machine can change
def test_a_server_that_dies_leaves_what_was_measured(
    start: Start, settings: dict[str, Any], result: Result
) -> None:
    engine, url = start(drafter=True)
    _, baseline = start(drafter=False)
    engine.die_after = 15  # the probe, two to warm up, two passes of 6; then the next load's
    with pytest.raises(ServerError, match="attempts|v1/chat"):
        run_bench(url=url, baseline_url=baseline, **settings)
    passes = Path(settings["out"], "passes")
    kept = {path.name: path.stat().st_mtime_ns for path in passes.glob("drafter-1-*.json")}
    assert len(kept) == 2
    engine.die_after = None
    with pytest.raises(FileExistsError, match="other settings .max_new_tokens"):
        run_bench(url=url, baseline_url=baseline, **settings | {"max_new_tokens": 8})
    before = len(engine.bodies)
    run_bench(url=url, baseline_url=baseline, **settings)
    assert {path.name: path.stat().st_mtime_ns for path in passes.glob("drafter-1-*.json")} == kept
    assert len(engine.bodies) - before == 1 + 8 + 2 * 6  # the probe, a warm-up of the next load, its passes
    assert len(result()["levels"]) == 2
    with pytest.raises(FileExistsError, match="already in use"):
        run_bench(url=url, baseline_url=baseline, **settings)


def test_an_unfinished_benchmark_goes_on_with_the_same_model(start: Start, settings: dict[str, Any]) -> None:
    engine, url = start(drafter=True, die_after=15)
    with pytest.raises(ServerError):
        run_bench(url=url, **settings)
    engine.die_after, engine.model = None, "large"
    with pytest.raises(ServerError, match="are of model tiny, this server has large"):
        run_bench(url=url, **settings)
