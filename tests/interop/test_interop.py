"""Real engines load our exports, say the target's greedy text, and draft and accept as often as our loop.

The text alone proves nothing: a drafter that is read wrongly costs acceptance, never a token.
"""

from typing import Any

import pytest
from interop.cases import CASES, DEFECTS, Case

DSPARK = [case for case in CASES if case.family.startswith("dspark")]
SHARED = [case for case in CASES if case not in DSPARK]
SPECULATORS = [case for case in CASES if case.format == "speculators"]
# What each engine reads, and which of our numbers it reports.
READS = {
    "llamacpp": [case for case in SHARED if (case.family, case.format) != ("block", "speculators")],
    "vllm": SHARED,
    "openvino": [case for case in SHARED if case.format != "speculators" and case.num_tokens != 3],
}
COMPARED = {
    "llama.cpp": ("drafted", "accepted"),
    "vLLM": ("drafts", "drafted", "accepted", "accepted_by_position"),
    "OpenVINO GenAI": ("passes",),
}
OPTIONS = {"vllm": ("--fix-k-norm",)}
SECOND_RUNNER = ("--fix-k-norm", "--interpret-triton")  # of vLLM, which alone has DSpark
PAIRS = [(name, case) for name, cases in READS.items() for case in cases]


@pytest.fixture(scope="module")
def results(workspaces: Any, engine: Any) -> Any:
    """Every case of an engine, in one go."""
    found: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in found:
            jobs = [workspaces(case.layers).job(case) for case in READS[name]]
            found[name] = engine(name, jobs, *OPTIONS.get(name, ()))
        return found[name]

    return of


@pytest.mark.parametrize(("name", "case"), PAIRS, ids=[f"{name}: {case.name}" for name, case in PAIRS])
def test_counts_are_ours(workspaces: Any, results: Any, log: Any, name: str, case: Case) -> None:
    compare(workspaces(case.layers), results(name), case, log)


def test_vllm_drafts_with_dspark_as_often_as_we_do(workspace: Any, engine: Any, log: Any) -> None:
    """Its kernels in Triton's interpreter: minutes a drafter."""
    answer = engine("vllm", [workspace.job(case) for case in DSPARK], *SECOND_RUNNER)
    for case in DSPARK:
        compare(workspace, answer, case, log)


def compare(workspace: Any, answer: dict[str, Any], case: Case, log: Any) -> None:
    """What an engine reports of a case is our loop's."""
    run = answer["runs"][case.name]
    assert "error" not in run, run["error"]
    assert run["tokens"] == workspace.texts
    ours = vars(workspace.counts(case, answer["engine"]))
    keys = COMPARED[answer["engine"]]
    row = {"engine": answer["engine"], "version": answer["version"], "drafter": case.name}
    log.append(row | {"ours": {k: ours[k] for k in keys}, "theirs": {k: run[k] for k in keys}})
    assert {key: run[key] for key in keys} == {key: ours[key] for key in keys}
    assert ours["accepted"] > 0


def test_vllm_serves_a_folder_of_speculators_by_its_path(workspace: Any, engine: Any) -> None:
    """One path: target, method and draft length are in the folder."""
    served = [case for case in SPECULATORS if case not in DSPARK]
    jobs = [{k: v for k, v in workspace.job(case).items() if k != "target"} for case in served]
    answer = engine(
        "vllm", [job | {"tokenizer": str(workspace.target_folder)} for job in jobs], "--fix-k-norm"
    )
    for case in served:
        run = answer["runs"][case.name]
        assert "error" not in run, run["error"]
        assert run["tokens"] == workspace.texts
        ours = vars(workspace.counts(case, "vLLM"))
        assert run["accepted_by_position"] == ours["accepted_by_position"]
        assert run["drafts"] == ours["drafts"]


def test_speculators_loads_its_own_layout(workspace: Any, engine: Any) -> None:
    answer = engine("speculators", [workspace.job(case) for case in SPECULATORS])
    for case in SPECULATORS:
        run = answer["runs"][case.name]
        assert "error" not in run, run["error"]
        assert run["wrong"] == []
        assert run["num_tokens"] == case.num_tokens
        assert run["target"] == str(workspace.target_folder)


def test_what_files_cannot_show_the_counts_do(workspace: Any, engine: Any, log: Any) -> None:
    """Each defect loads, passes the static check and leaves the text right; only the counts move."""
    from certdraft.drafters import lint_export

    eagle, block = Case("eagle", "eagle3", 4), Case("block", "dflash", 5)
    whose = {name: block if name in ("mask token", "layers off by one") else eagle for name in DEFECTS}
    folders = {name: workspace.altered(case, name) for name, case in whose.items()}
    answer = engine("llamacpp", [workspace.job(whose[n], n, f) for n, f in folders.items()])
    for name, folder in folders.items():
        assert lint_export(folder, workspace.target_folder) == (), name
        run = answer["runs"][name]
        assert "error" not in run, run["error"]
        assert run["tokens"] == workspace.texts, name
        ours = workspace.counts(whose[name], "llama.cpp")
        row = {"engine": answer["engine"], "version": answer["version"]}
        row["drafter"] = f"{whose[name].name}, broken: {name}"
        keys = COMPARED[answer["engine"]]
        log.append(row | {"ours": {k: vars(ours)[k] for k in keys}, "theirs": {k: run[k] for k in keys}})
        assert (run["drafted"], run["accepted"]) != (ours.drafted, ours.accepted), name
