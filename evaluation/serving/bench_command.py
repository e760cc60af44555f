"""`certdraft bench`: what a drafter is worth in the engine, at the load that is served."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from certdraft.data import Server
from certdraft.evaluation.prompts import Question, read_questions
from certdraft.evaluation.report.provenance import provenance
from certdraft.evaluation.serving.bench_report import break_even_words, level_table, write_bench
from certdraft.evaluation.serving.bench_summary import summarise
from certdraft.evaluation.serving.local_server import LocalVLLM
from certdraft.evaluation.serving.own_loop import OwnLoop, replay_served
from certdraft.evaluation.serving.served_arms import Arms, Place
from certdraft.evaluation.serving.served_passes import ARMS, Pass, PassFolder, PassKey
from certdraft.evaluation.serving.served_requests import Asking
from certdraft.support import Progress

_PROMPTS = Path(__file__).resolve().parents[2] / "configs" / "real" / "held-out-prompts.jsonl"
_LOADS = [1, 2, 4, 8]


def run_bench(
    url: str | None = None,
    baseline_url: str | None = None,
    target: str | None = None,
    drafter: str | None = None,
    python: str | None = None,
    requests: list[int] = _LOADS,
    prompts_files: list[str] | None = None,
    prompts: int = 32,
    max_new_tokens: int = 128,
    repetitions: int = 3,
    chat: bool = True,
    model: str | None = None,
    baseline_model: str | None = None,
    draft_length: int | None = None,
    method: str | None = None,
    server_options: list[str] | None = None,
    port: int | None = None,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: str = "auto",
    timeout_s: float = 600.0,
    api_key_variable: str | None = None,
    out: str | None = None,
    seed: int = 0,
    title: str = "",
) -> Path:
    """Measure what a drafter is worth in the engine that serves it, at rising load.

    Give the address of a server with the drafter, and of one without it as baseline (vLLM, or SGLang with
    --enable-metrics). Or give target, drafter and the Python that has vLLM: it is then started here, once
    with the drafter and once without. The same prompts are answered greedily with 1, 2, 4, 8 and so on
    requests in flight: output tokens/s, time between tokens and to the first one, and acceptance by the
    engine's own counters, with our loop's beside it where target and drafter are given. Texts, token counts,
    cache hits, other clients and drift are checked. When a server dies, or the command is stopped, finished
    passes are kept: the same command with the same --out goes on.

    Args:
        url: of a running server with the drafter, such as http://localhost:8000.
        baseline_url: of a running server of the target alone; without it no speed-up is reported.
        target: "embedded", a local folder or a hub name; served here when there is no url, and otherwise
            loaded for our loop's τ.
        drafter: exported folder or hub name, likewise.
        python: interpreter of an environment that has vLLM, to start servers with.
        requests: in flight, ascending.
        prompts_files: jsonl files of questions, of which first turns are asked; the 80 held-out prompts that
            ship when not given.
        prompts: of each file, spread evenly.
        max_new_tokens: longest answer.
        repetitions: passes at each load.
        chat: send messages, which the server puts into its chat template; false: bare text to continue.
        model: the server's name for the target; the one model it serves when not given.
        baseline_model: the baseline's name for it, where it has another.
        draft_length: draft tokens per round; what the export or the engine's counters say when not given.
        method: vLLM's word for the drafter; by the export when not given.
        server_options: further options for the servers started here.
        port: for them; a free one when not given.
        revision: hub revision of the target.
        dtype: of the servers started here, and of our loop.
        device: of our loop: "auto" (CUDA when there is one), "cpu", "cuda:0" and so on.
        timeout_s: seconds after which a request without a whole answer ends the benchmark.
        api_key_variable: environment variable that holds the key to send, if the servers want one.
        out: new folder for the report, or an unfinished one to go on with; runs/bench/TIME if not given.
        seed: of the bootstrap.
        title: title of the page.

    Returns:
        Path of the HTML page.

    Raises:
        ValueError: neither a url nor something to start, numbers below 1, a server that does not answer, has
            no counters, another model, a baseline with a drafter or the reverse, a drafter of another
            tokenizer.
        FileExistsError: `out` holds something else.
        FileNotFoundError: no such prompts file, target or drafter.
    """
    _check(
        url,
        baseline_url,
        target,
        drafter,
        python,
        draft_length,
        requests,
        prompts,
        max_new_tokens,
        repetitions,
    )
    questions = [q for file in prompts_files or [str(_PROMPTS)] for q in read_questions(file, prompts)]
    if len(questions) < max(requests):
        raise ValueError(
            f"{len(questions)} prompts cannot keep {max(requests)} requests in flight; give more with "
            "--prompts or --prompts_files, or lower --requests"
        )
    path = Path(out or Path("runs", "bench", f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    settings = {
        "target": target, "drafter": drafter, "chat": chat, "requests": requests, "prompts": len(questions),
        "max_new_tokens": max_new_tokens, "repetitions": repetitions, "draft_length": draft_length,
        "method": method, "dtype": dtype, "server_options": server_options or [],
        "questions": [question.turns[0] for question in questions],
    }  # fmt: skip
    folder = PassFolder(path, settings)
    server = Server(
        url,
        model=model,
        concurrency=max(requests),
        timeout_s=timeout_s,
        retries=2,
        api_key_variable=api_key_variable,
    )
    baseline = replace(server, url=baseline_url, model=baseline_model or model)
    local = None
    if url is None:
        assert target is not None
        assert drafter is not None
        options = server_options or []
        local = LocalVLLM(
            python or sys.executable, target, drafter, dtype, draft_length, method, options, port
        )
        local.speculative_config()  # refused before a server is started
    places = {"drafter": Place(server, local)}
    if local is not None or baseline_url is not None:
        places["plain"] = Place(baseline, local)
    passes = _measure(places, Asking("", chat, max_new_tokens), folder, questions, requests, repetitions)
    servers = folder.servers()
    own = None
    if target is not None and drafter is not None:
        own = _own(passes, requests, servers["drafter"], settings, revision, device)
    data = summarise(passes, own, seed)
    data |= {"settings": settings, "servers": servers, "urls": {"drafter": url, "plain": baseline_url}}
    files = {f"prompts {Path(f).name}": f for f in prompts_files or [str(_PROMPTS)]}
    files |= {f"drafter {drafter}": drafter} if drafter and Path(drafter).is_dir() else {}
    page = write_bench(data, path, provenance(files), title)
    print(level_table(data).text())
    print(break_even_words(data))
    for warning in data["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"report: {page}", file=sys.stderr)
    return page


def _check(
    url: str | None,
    baseline_url: str | None,
    target: str | None,
    drafter: str | None,
    python: str | None,
    draft_length: int | None,
    requests: list[int],
    prompts: int,
    max_new_tokens: int,
    repetitions: int,
) -> None:
    """Raise ValueError for options that do not belong together, and for numbers below 1."""
    if url is None and (baseline_url is not None or target is None or drafter is None):
        raise ValueError(
            "bench needs --url (a running server with the drafter) and --baseline_url (one without), or "
            "--target, --drafter and --python (the interpreter that has vLLM) to start both here"
        )
    if url is not None and python is not None:
        raise ValueError("--python starts servers here, --url names one that runs; give one of them")
    if url is not None and (target is None) != (drafter is None):
        raise ValueError("our loop's τ needs both --target and --drafter; give both or none")
    if url is not None and url == baseline_url:
        raise ValueError(
            "--url and --baseline_url are the same server; the baseline is one without a drafter"
        )
    counts = {"prompts": prompts, "max_new_tokens": max_new_tokens, "repetitions": repetitions}
    counts |= {"draft_length": draft_length or 1} | {f"requests {n}": n for n in requests}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if not requests or sorted(set(requests)) != requests:
        raise ValueError(f"requests={requests} must ascend, such as '[1, 2, 4, 8]'")


def _schedule(
    arms: Sequence[str], requests: Sequence[int], repetitions: int, one_by_one: bool
) -> list[PassKey]:
    """The passes in the order in which they run: arms take turns, unless only one server runs at a time."""
    keys = []
    for load in requests:
        for repetition in range(repetitions):
            turn = list(arms) if repetition % 2 == 0 else list(reversed(arms))
            keys += [PassKey(arm, load, repetition) for arm in turn]
    return sorted(keys, key=lambda key: ARMS.index(key.arm)) if one_by_one else keys


def _measure(
    places: Mapping[str, Place],
    asking: Asking,
    folder: PassFolder,
    questions: Sequence[Question],
    requests: Sequence[int],
    repetitions: int,
) -> dict[tuple[str, int], list[Pass]]:
    """Run the passes that are not there yet; (arm, requests in flight) → repetitions."""
    local = any(place.local is not None for place in places.values())
    schedule = _schedule(list(places), requests, repetitions, local)
    found = {key: run for key in schedule if (run := folder.load(key)) is not None}
    missing = [key for key in schedule if key not in found]
    warm: dict[str, int] = {}
    with (
        Progress("bench", len(missing) * len(questions), "requests") as progress,
        Arms(places, asking, questions, folder) as arms,
    ):
        for name in [] if local else sorted({key.arm for key in missing}):
            arms.open(name)  # a server that cannot be used is refused before anything is measured
        for key in missing:
            arm = arms.open(key.arm)
            if warm.get(key.arm) != key.requests:
                arm.warm_up(questions, key.requests)
                warm[key.arm] = key.requests
            found[key] = arm.measure(
                questions, key.requests, progress=lambda tokens: progress.advance(1, tokens)
            )
            folder.save(key, found[key])
    passes: dict[tuple[str, int], list[Pass]] = {}
    for key in sorted(schedule, key=lambda key: key.repetition):
        passes.setdefault((key.arm, key.requests), []).append(found[key])
    return passes


def _own(
    passes: Mapping[tuple[str, int], Sequence[Pass]],
    requests: Sequence[int],
    facts: dict[str, Any],
    settings: dict[str, Any],
    revision: str | None,
    device: str,
) -> OwnLoop | None:
    """Our loop on the texts of the smallest load; None, and a sentence, where they cannot be replayed."""
    served = passes["drafter", requests[0]][0]
    length = facts["draft_length"] or settings["draft_length"]
    if length is None or not served.answers[0].ids:
        print(
            "our loop's τ is left out: the server does not send token ids, or its counters do not tell the "
            "draft length (--draft_length)",
            file=sys.stderr,
        )
        return None
    pairs = [
        (plain, drafted)
        for load in requests
        if ("plain", load) in passes
        for plain, drafted in zip(
            passes["plain", load][0].answers, passes["drafter", load][0].answers, strict=True
        )
        if plain.ids != drafted.ids and plain.prompt_ids == drafted.prompt_ids
    ]
    with Progress("our loop", len(served.answers), "texts") as progress:
        return replay_served(
            served.answers, pairs, settings["target"], settings["drafter"], length, revision=revision,
            dtype=settings["dtype"], device=device, progress=lambda: progress.advance(1),
        )  # fmt: skip
