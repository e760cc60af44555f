"""Real decoding, replay and the report on a random target of 48 tokens: small, but the real loop and page."""

import copy
import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models.decoding_models import with_one_wrong_token
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from certdraft.certificates import Head
from certdraft.decoding import BestFirst, Chain, StaticTree, TargetRunner, greedy
from certdraft.drafters import CausalDrafter, EagleConfig, EagleDrafter
from certdraft.evaluation.evaluate import EvaluationReport, evaluate, labelled
from certdraft.evaluation.measure import bench as bench_module
from certdraft.evaluation.measure.acceptance import measure_acceptance
from certdraft.evaluation.measure.acceptance_lengths import replay_lengths
from certdraft.evaluation.measure.bench import benchmark, difference, tie_width
from certdraft.evaluation.measure.trace_reading import TargetFeatures, features_for, greedy_documents
from certdraft.evaluation.report.evaluate_report import _warnings, headline_table, write_evaluation
from certdraft.evaluation.report.page import refuse_folder_in_use, write_json

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 48, "max_position_embeddings": 128,
}  # fmt: skip
BUILDERS = [Chain(3), BestFirst(6, max_depth=4), StaticTree((2, 2))]


class Row:
    def __init__(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, head: Head) -> None:
        self.input_ids, self.loss_mask, self.head = input_ids, loss_mask, head


class Rows(list):
    """An in-memory trace."""

    def row(self, index: int) -> Row:
        return self[index]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    torch.manual_seed(7)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.4, tie_word_embeddings=False))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trace(target: PreTrainedModel) -> Rows:
    rows = Rows()
    for d in range(5):
        torch.manual_seed(d)
        prompt = torch.randint(48, (3 + d,)).tolist()
        ids = torch.tensor(prompt + greedy(target, prompt, 14))
        mask = torch.arange(len(ids)) >= len(prompt) - 1
        mask[-1] = False
        with torch.inference_mode():
            rows.append(Row(ids, mask, Head.from_logits(target(ids[None]).logits[0], 40)))
    return rows


@pytest.fixture(scope="module")
def drafters(target: PreTrainedModel) -> dict[str, CausalDrafter]:
    """One that knows nothing, one that is the target with noise, one that is the target."""
    made = {}
    for name, noise in (("random", None), ("noisy", 0.05), ("perfect", 0.0)):
        torch.manual_seed(3)
        drafter = CausalDrafter(config={**SIZES, "tie_word_embeddings": False})
        if noise is not None:
            drafter.model.load_state_dict(target.state_dict())
            for p in drafter.parameters():
                p.data += noise * torch.randn_like(p)
        made[name] = drafter.eval()
    return made


@pytest.fixture(scope="module")
def report(target: PreTrainedModel, trace: Rows, drafters: dict[str, CausalDrafter]) -> EvaluationReport:
    return evaluate(drafters, trace, target, builders=BUILDERS, prompts=4)


def test_decoded_texts_are_the_targets_and_a_perfect_drafter_is_never_rejected(
    report: EvaluationReport,
) -> None:
    bench = report.data["bench"]
    assert bench["lossless"]
    assert bench["changed_texts"] == 0
    methods = {(m["drafter"], m["builder"]): m for m in bench["methods"]}
    assert len(methods) == 9
    perfect = methods["perfect", "chain(depth=3)"]
    # 14 tokens in rounds of 4: 4 + 4 + 4 + 2
    assert perfect["tau"]["value"] == pytest.approx(14 / 4)
    assert perfect["rejections"]["rejected"] == 0
    assert all(d["accepted"] == d["reached"] for d in perfect["depths"])
    assert methods["random", "chain(depth=3)"]["tau"]["value"] < 1.5
    for m in methods.values():
        assert sum(m["share"].values()) == pytest.approx(1.0, abs=0.2)
        causes = m["rejections"]
        assert causes["rejected"] == causes["not_in_top_m"] + causes["not_in_tree"] + causes["numerical_tie"]


def test_replay_finds_the_rounds_of_real_decoding(
    target: PreTrainedModel, trace: Rows, drafters: dict[str, CausalDrafter]
) -> None:
    documents, builders = greedy_documents(trace), labelled(BUILDERS)
    real = benchmark(target, {"noisy": drafters["noisy"]}, documents, builders, warmup=0)
    replayed = replay_lengths(drafters["noisy"], documents, builders)
    for label in builders:
        a, b = real.methods["noisy", label].lengths, replayed[label]
        assert (a.tokens, a.passes, a.reached, a.accepted) == (b.tokens, b.passes, b.reached, b.accepted)
        assert a.candidates == b.candidates
        assert all(a.candidates)
        assert a.rejections == b.rejections
        assert 1 < sum(b.tokens) / sum(b.passes) < 4


def test_a_text_that_is_not_the_targets_is_reported_loudly(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    target: PreTrainedModel,
    trace: Rows,
    drafters: dict[str, CausalDrafter],
) -> None:
    monkeypatch.setattr(bench_module, "decode", with_one_wrong_token(bench_module.decode, 5, 48))
    found = evaluate({"perfect": drafters["perfect"]}, trace, target, builders=[Chain(3)], prompts=2)
    assert not found.data["bench"]["lossless"]
    case = found.data["bench"]["methods"][0]["differing"][0]
    assert case["token"] == 5
    assert case["got"] == (case["expected"] + 1) % 48
    page = unescape(write_evaluation(found, tmp_path, {}).read_text())
    assert "not lossless here: 2 texts differ" in page


def test_exact_kl_and_the_recorded_heads_tell_one_story(
    target: PreTrainedModel, trace: Rows, drafters: dict[str, CausalDrafter]
) -> None:
    few = {n: drafters[n] for n in ("perfect", "noisy")}
    exact = evaluate(few, trace, target, builders=[Chain(2)], prompts=1, exact_kl=True).data["drafters"]
    heads = evaluate(few, trace, builders=[Chain(2)]).data["drafters"]
    for name in few:
        a, b = exact[name]["acceptance"], heads[name]["acceptance"]
        assert (a["kl"]["source"], b["kl"]["source"]) == ("exact", "head")
        assert a["greedy_changed"] == 0
        assert b["kl"]["mean"] <= a["kl"]["mean"] + 1e-6
        assert a["coverage"] == b["coverage"]
    assert exact["perfect"]["acceptance"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert exact["perfect"]["acceptance"]["rules"][0]["certified"]["value"] == 1.0


def test_the_report_keeps_its_schema(report: EvaluationReport) -> None:
    data = report.data
    assert list(data) == ["schema", "baseline", "trace", "drafters", "comparisons", "bench"]
    assert (data["schema"], data["baseline"]) == ("certdraft.evaluate/1", "random")
    entry = data["drafters"]["noisy"]
    assert list(entry) == ["parameters", "tie_gap", "acceptance", "lengths"]
    assert list(entry["acceptance"]) == (
        "documents steps greedy_changed violations kl rules coverage calibration rejections".split()
    )
    keys = (
        "prompts tokens target_passes tau per_request_mean nodes_per_pass depths rejections promises groups"
    )
    assert list(entry["lengths"]["chain(depth=3)"]) == keys.split()
    assert list(entry["lengths"]["chain(depth=3)"]["tau"]) == (
        "value low high confidence method prompts".split()
    )
    rows = {(c["drafter"], c["quantity"]): c for c in data["comparisons"]}
    assert {d for d, _ in rows} == {"noisy", "perfect"}
    better = rows["perfect", "tau/chain(depth=3)"]["difference"]
    assert better["low"] > 0
    assert "ratio" in rows["perfect", "coverage@4"]
    metrics = report.metrics("perfect")
    assert metrics["coverage@1"] == 1.0
    assert metrics["tau/chain(depth=3)"] == pytest.approx(14 / 4)
    assert {"certified/strict", "ece", "speedup/chain(depth=3)", "low_margin_coverage@4"} <= set(metrics)
    with pytest.raises(ValueError, match="random, noisy, perfect"):
        report.metrics("perfekt")


def test_the_page_is_self_contained_and_shows_the_numbers(report: EvaluationReport, tmp_path: Path) -> None:
    page = write_evaluation(report, tmp_path, {"command": "certdraft evaluate"})
    text = page.read_text()
    assert page.name == "report.html"
    addresses = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']([^"']*)""", text)
    assert addresses
    assert all(a.startswith("data:image/png;base64,") for a in addresses)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)
    assert json.loads((tmp_path / "report.json").read_text())["provenance"] == {
        "command": "certdraft evaluate"
    }
    tau = report.data["drafters"]["perfect"]["lengths"]["chain(depth=3)"]["tau"]
    assert f"{tau['value']:.2f} [{tau['low']:.2f}, {tau['high']:.2f}]" in text
    assert "not lossless" not in text
    for kind in ("svg", "pdf"):
        assert {p.stem for p in tmp_path.glob(f"*.{kind}")} == {p.stem for p in tmp_path.glob("*.png")}
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "acceptance-length.png", "certified-realised.png", "coverage.png", "depth.png", "calibration.png",
        "promises.png", "time.png"
    }  # fmt: skip
    table = headline_table(report.data)
    assert [row[0] for row in table.rows] == ["random", "noisy", "perfect"]
    assert table.markdown() in (tmp_path / "tables.md").read_text()


def test_the_targets_pass_is_not_repeated_for_drafters_that_read_its_layers(
    target: PreTrainedModel, trace: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acceptance, replay and ranks of two drafters: one feature pass per document, and the same numbers."""

    def eagle(seed: int) -> EagleDrafter:
        torch.manual_seed(seed)
        made = EagleDrafter(EagleConfig(target_layer_ids=(0,)), unroll=2, max_lost_coverage=1.0)
        return made.build(48, target, torch.arange(48) + 1).eval()

    both = {"one": eagle(1), "two": eagle(2)}
    documents = greedy_documents(trace)
    shared = features_for(both, target, range(len(trace)))
    assert shared["one"] is shared["two"]
    assert shared["one"] is not None
    found = {}
    for name, features in shared.items():
        acceptance = measure_acceptance(both[name], trace, features=features)
        lengths = replay_lengths(both[name], documents, labelled(BUILDERS), features=features)
        found[name] = acceptance.summary(), {label: each.summary() for label, each in lengths.items()}
    assert shared["one"].passes == len(trace)
    for name, drafter in both.items():
        alone = features_for({name: drafter}, target)[name]
        assert found[name][0] == measure_acceptance(drafter, trace, features=alone).summary()
        lengths = replay_lengths(drafter, documents, labelled(BUILDERS), features=alone)
        assert found[name][1] == {label: each.summary() for label, each in lengths.items()}
    made: list[dict[str, TargetFeatures | None]] = []

    def spy(*args: Any) -> dict[str, TargetFeatures | None]:
        made.append(features_for(*args))
        return made[-1]

    monkeypatch.setattr(sys.modules["certdraft.evaluation.evaluate"], "features_for", spy)
    evaluate(both, trace, target, builders=[Chain(3)], prompts=2)
    assert made[0]["one"] is not None
    assert made[0]["one"].passes == len(trace)  # real decoding's own passes aside
    with pytest.raises(ValueError, match=r"the drafter two reads the target's layers .*--target"):
        features_for(dict(reversed(both.items())), None)


def test_a_tie_is_a_few_rounding_steps_of_the_targets_dtype(target: PreTrainedModel) -> None:
    """Logits of 16 to 32 are multiples of 1/8 in bfloat16; the lead is the target's own, recomputed."""
    assert tie_width(20.0, torch.bfloat16) == 4 / 8
    assert tie_width(15.9, torch.bfloat16) == 4 / 16
    assert tie_width(20.0, torch.float32) < 1e-3
    prompt, runner = [1, 2, 3], TargetRunner(target)
    reference = greedy(target, prompt, 4)
    with torch.inference_mode():
        logits = target(torch.tensor([[*prompt, *reference[:2]]])).logits[0, -1]
    other = int(logits.topk(5).indices[4])
    lead = float(logits.max() - logits[other])
    case = difference(runner, prompt, reference, [*reference[:2], other, 0], 1e-3)
    assert (case["token"], case["expected"], case["got"]) == (2, reference[2], other)
    assert case["target_lead"] == pytest.approx(lead, abs=1e-4)
    assert (case["tie"], case["tie_width"]) == (False, 1e-3)
    assert difference(runner, prompt, reference, [*reference[:2], other], lead + 0.1)["tie"]
    shorter = difference(runner, prompt, reference, reference[:2], 1e9)
    assert (shorter["token"], shorter["got"], shorter["target_lead"], shorter["tie"]) == (
        2,
        None,
        None,
        False,
    )


def test_the_tile_counts_certified_positions(report: EvaluationReport, tmp_path: Path) -> None:
    rules = [row for e in report.data["drafters"].values() for row in e["acceptance"]["rules"]]
    certified = sum(row["certified_steps"] for row in rules)
    steps = report.data["drafters"]["noisy"]["acceptance"]["steps"]
    assert 0 < certified < steps * len(rules)
    assert [round(row["certified"]["value"] * steps) for row in rules] == [
        r["certified_steps"] for r in rules
    ]
    page = unescape(write_evaluation(report, tmp_path, {}).read_text())
    assert f"certified steps rejected, of {certified:,} certified" in page.replace("\u202f", ",")


def test_names_bring_no_html_into_the_tables(report: EvaluationReport, tmp_path: Path) -> None:
    data = {**report.data, "drafters": {"<script>x</script>": report.data["drafters"]["noisy"]}}
    write_evaluation(EvaluationReport({**data, "comparisons": []}), tmp_path, {})
    tables = (tmp_path / "tables.md").read_text()
    assert "<script" not in tables
    assert "&lt;script" in tables
    assert "margin < 0.1" in tables


def test_bad_requests_are_refused(trace: Rows, drafters: dict[str, CausalDrafter]) -> None:
    with pytest.raises(ValueError, match="at least one drafter"):
        evaluate({}, trace)
    with pytest.raises(ValueError, match="exact_kl"):
        evaluate(drafters, trace, exact_kl=True)
    with pytest.raises(ValueError, match="differ"):
        labelled([Chain(3), Chain(3)])


def test_results_are_never_overwritten_and_json_is_strict(tmp_path: Path) -> None:
    assert refuse_folder_in_use(tmp_path) == tmp_path
    (tmp_path / "x").write_text("")
    with pytest.raises(FileExistsError, match="already in use"):
        refuse_folder_in_use(tmp_path)
    write_json(
        tmp_path / "a.json", {"a": [1.5, float("inf"), float("nan")], "b": [1, 2, -3e-5], "c": "x [1,\t2]"}
    )
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1.5, "inf", None], "b": [1, 2, -3e-5], "c": "x [1,\t2]"}
    assert "[1, 2, -3e-05]" in text.replace("[ ", "[").replace(" ]", "]")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_changed_live_texts_are_told_with_their_lead(report: EvaluationReport) -> None:
    data = copy.deepcopy(report.data)
    bench = data["bench"]
    assert bench["changed"] == []
    case = {"token": 3, "expected": 5, "got": 9, "target_lead": 0.02, "tie_width": 0.06, "tie": True}
    bench["changed"] = [case]
    (said,) = (text for text in _warnings(data) if "recorded ones" in text)
    assert said.startswith("1 of 4 live greedy texts differ from the recorded ones. At the first difference ")
    assert "leads by at most 0.02 nats; a numerical tie is 0.06 or less. Other kernels" in said
    bench["changed"] = [case, case | {"target_lead": 2.5, "tie": False}]
    (said,) = (text for text in _warnings(data) if "recorded ones" in text)
    assert "at most 2.5 nats" in said
    assert said.endswith("or not the target that the trace was recorded from.")
