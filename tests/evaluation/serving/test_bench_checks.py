"""What a benchmark checks before it believes itself: each check fails when its condition is broken."""

from collections.abc import Callable
from typing import Any

import pytest
from oracles.servers.fake_engine import Engine

from certdraft.evaluation import run_bench
from certdraft.evaluation.serving.bench_summary import break_even
from certdraft.evaluation.serving.engine_counters import Counters, NoCounters, read_counters, total

Start = Callable[..., tuple[Engine, str]]
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "same texts": ({"seed": 1}, "1 requests: 6 of 6"),
    "same texts every time": ({"restless": True}, "not deterministic"),
    "no other clients": ({"foreign": 3}, "another client"),
    "no cache hits": ({"cached": 5}, "60 tokens"),
    "no drift": ({"tick_s": 0.01, "slower": 1.0}, "%"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_each_check_sees_its_fault(
    start: Start,
    settings: dict[str, Any],
    result: Callable[[], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    check: str,
) -> None:
    behaviour, says = FAULTS[check]
    (_, url), (_, baseline) = start(drafter=True), start(drafter=False, **behaviour)
    run_bench(url=url, baseline_url=baseline, **settings | {"requests": [1]})
    found = {row["check"]: row for row in result()["checks"]}
    assert found[check]["passed"] is False
    assert says in found[check]["says"]
    assert f"warning: {found[check]['says']}" in capsys.readouterr().err


def test_parts_that_arrive_together_are_no_rounds(
    start: Start, settings: dict[str, Any], result: Callable[[], dict[str, Any]]
) -> None:
    """The engine counts rounds; fewer parts than those say nothing about τ."""
    _, url = start(drafter=True, merged=True)
    run_bench(url=url, **settings | {"requests": [1]})
    level = result()["levels"][0]
    assert level["tau"] is None
    assert level["tau_engine"] > 1


@pytest.mark.parametrize(
    ("speedups", "load"),
    [([1.4, 1.2, 1.1], None), ([0.9, 0.8, 1.2], 0.0), ([1.5, 1.0, 0.5], 2.0), ([1.2, 1.1, 0.9], 8**0.5)],
)
def test_break_even(speedups: list[float], load: float | None) -> None:
    found = break_even([(n, {"value": value}) for n, value in zip((1, 2, 4), speedups, strict=True)])
    assert found == pytest.approx(load)


def test_counters_of_several_engines_are_summed() -> None:
    page = "\n".join(
        f'{name}{{engine="{engine}"{more}}} {value}'
        for engine in (0, 1)
        for name, more, value in (
            ("vllm:generation_tokens_total", "", 10.0),
            ("vllm:prefix_cache_hits_total", "", 3.0),
            ("vllm:spec_decode_num_drafts_total", "", 4.0),
            ("vllm:spec_decode_num_draft_tokens_total", "", 8.0),
            ("vllm:spec_decode_num_accepted_tokens_total", "", 5.0),
            ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ',position="1"', 2.0),
            ("vllm:spec_decode_num_accepted_tokens_per_pos_total", ',position="0"', 3.0),
        )
    )
    found = read_counters(page)
    assert found == Counters("vllm", 20, 6, 8, 16, 10, (6, 4))
    assert found.tau == 2.25
    assert total([found, found]).tau == 2.25
    assert found.since(found) == Counters("vllm", 0, 0, 0, 0, 0, (0, 0))


def test_counters_that_fell_and_pages_without_any() -> None:
    with pytest.raises(ValueError, match="started again"):
        Counters("vllm", 5, 0).since(Counters("vllm", 6, 0))
    with pytest.raises(ValueError, match="started again"):
        Counters("vllm", 7, 0, 1, 2, 2, (1, 1)).since(Counters("vllm", 6, 0, 1, 2, 1, (1,)))
    with pytest.raises(NoCounters):
        read_counters("process_cpu_seconds_total 3.0\nllamacpp:tokens_predicted_total 4\n")
