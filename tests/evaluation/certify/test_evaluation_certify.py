"""`certify`: numbers worked out on paper, truncated heads, loss masks, run lengths, and the page."""

import json
import math
import re
import sys
import weakref
from dataclasses import dataclass
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from certdraft.certificates import Additive, Coverage, Head, Multiplicative, StrictGreedy, radius
from certdraft.evaluation.certify.certify import CertifyProtocol, RunCounts, certify, head_is_exact
from certdraft.evaluation.certify.certify_report import certify_tables, write_certify
from certdraft.evaluation.measure.trace_reading import select_documents


@dataclass(eq=False)
class Row:
    loss_mask: Tensor
    head: Head
    input_ids: Tensor | None = None


class Rows(list):
    """An in-memory trace."""

    def row(self, index: int) -> Row:
        return self[index]


def rows_of(*documents: tuple[list[list[float]], list[bool]], k: int | None = None) -> Rows:
    made = Rows()
    for p, mask in documents:
        dense = torch.tensor(p)
        made.append(Row(torch.tensor(mask), Head.from_probs(dense, k or dense.shape[-1])))
    return made


# Three steps over three tokens: a clear one, an exact tie, a certain one. Radii by hand, by pooling.
CLEAR, TIE, SURE = [0.7, 0.2, 0.1], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]
STRICT = [0.7 * math.log(0.7 / 0.45) + 0.2 * math.log(0.2 / 0.45), 0.0, math.log(2)]
ADDITIVE_03 = [STRICT[0], math.log(1.5), math.log(2)]
COVERAGE_2 = [
    0.7 * math.log(2.1) + 0.2 * math.log(0.6) + 0.1 * math.log(0.3),
    0.5 * math.log(2),
    math.log(3),
]
PROTOCOL = CertifyProtocol(
    mass=(1, 2),
    additive=(0.3,),
    multiplicative=(0.5,),
    top_m=(2,),
    top_m_slack=(0.1,),
    typical=((0.1, 0.09),),
    coverage=(2,),
    run_budgets=(0.1, 0.4),
)


@pytest.fixture
def by_hand() -> Rows:
    return rows_of(([CLEAR, TIE, SURE], [True, True, True]))


def test_tables_match_the_numbers_worked_out_on_paper(by_hand: Rows) -> None:
    report = certify(by_hand, PROTOCOL)
    for rule, radii in [
        (StrictGreedy(), STRICT),
        (Additive(0.3), ADDITIVE_03),
        (Coverage(2), COVERAGE_2),
    ]:
        row = report.rule(rule)
        assert row["mean"] == pytest.approx(np.mean(radii), abs=1e-6), rule
        for name, q in (("median", 50), ("p5", 5), ("p25", 25)):
            assert row[name] == pytest.approx(np.percentile(radii, q), abs=2e-5), (rule, name)
        assert row["short_head"] == 0
        assert row["unbounded"] == 0
    mass = {row["k"]: row for row in report.data["mass"]}
    assert mass[1]["mean"] == pytest.approx((0.7 + 0.5 + 1.0) / 3, abs=1e-6)
    assert mass[2]["p5"] == pytest.approx(np.percentile([0.9, 1.0, 1.0], 5), abs=1e-6)
    # ε = 0.1: passes, fails, passes → runs 1, 0, 1 from each position, two maximal runs of one step
    runs = report.data["runs"]["rules"]["strict"]
    assert runs["from_position"] == pytest.approx([2 / 3, 1 / 3])
    assert runs["given_certified"] == pytest.approx([1, 1])
    assert runs["maximal"] == pytest.approx([1, 1])
    # additive, ε = 0.1: all three pass → runs 3, 2, 1; ε = 0.4: the clear step (.147) fails → 0, 2, 1
    runs = report.data["runs"]["rules"]["additive(t=0.3)"]
    assert runs["from_position"] == pytest.approx([2, 1])
    assert runs["maximal"] == pytest.approx([3, 2])
    assert report.data["margin"]["below"]["0.1"] == pytest.approx(1 / 3)
    assert report.steps == 3


def test_survival_is_a_share_of_steps_strictly_above_the_budget(by_hand: Rows) -> None:
    data = certify(by_hand, PROTOCOL).data["survival"]
    curve = dict(zip(data["budgets"], data["fraction"]["strict"], strict=True))
    assert curve[0.0] == pytest.approx(2 / 3)  # a tie has radius 0, which is not above 0
    assert curve[0.1] == pytest.approx(2 / 3)
    assert curve[0.4] == pytest.approx(1 / 3)
    assert curve[0.7] == 0


def test_only_counted_steps_enter_and_a_gap_ends_a_run() -> None:
    everything = rows_of(([SURE, CLEAR, SURE, SURE], [True] * 4))
    masked = rows_of(([SURE, CLEAR, SURE, SURE], [True, False, True, True]))
    report = certify(masked, PROTOCOL)
    assert report.steps == 3
    assert report.data["trace"]["total_steps"] == 4
    assert report.rule("strict")["p5"] == pytest.approx(math.log(2), abs=1e-6)
    assert report.data["runs"]["rules"]["strict"]["from_position"][0] == pytest.approx((1 + 2 + 1) / 3)
    whole = certify(everything, PROTOCOL).data["runs"]["rules"]["strict"]["from_position"][0]
    assert whole == pytest.approx((4 + 3 + 2 + 1) / 4)


def test_documents_do_not_run_into_each_other_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    made = Rows(
        Row(torch.rand(n) < 0.8, Head.from_logits(3 * torch.randn(n, 40), 33)) for n in (7, 1, 30, 12, 12, 5)
    )
    whole = certify(made)
    monkeypatch.setattr(sys.modules["certdraft.evaluation.certify.certify"], "_STEPS_PER_CHUNK", 10)
    chunked = certify(made)
    assert json.dumps(whole.data["runs"]) == json.dumps(chunked.data["runs"])
    for a, b in zip(whole.data["certificates"], chunked.data["certificates"], strict=True):
        assert a["mean"] == pytest.approx(b["mean"], abs=1e-12)
        assert a["p25"] == pytest.approx(b["p25"], abs=1e-12)


def test_rows_are_read_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace of any length: at most a chunk of documents is alive at a time."""
    monkeypatch.setattr(sys.modules["certdraft.evaluation.certify.certify"], "_STEPS_PER_CHUNK", 20)
    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    most = 0

    class Stream:
        def __len__(self) -> int:
            return 60

        def row(self, index: int) -> Row:
            nonlocal most
            made = Row(torch.ones(5, dtype=torch.bool), Head.from_logits(torch.randn(5, 12), 9))
            alive.add(made)
            most = max(most, len(alive))
            return made

    assert certify(Stream()).steps == 300
    assert most <= 2


def test_run_lengths_agree_with_walking() -> None:
    """All three means, over chunks of several segments, with several budgets and a cap."""
    rng = np.random.default_rng(0)
    budgets, cap = [0.0, 0.2, 0.5], 3
    for _ in range(50):
        found = RunCounts(budgets, cap)
        from_position, certified, maximal, positions = [0] * 3, [0] * 3, [0] * 3, 0
        for _ in range(2):
            n = int(rng.integers(1, 40))
            values, segment = rng.choice([0.0, 0.1, 0.4, np.inf], n), np.cumsum(rng.random(n) < 0.2)
            found.add(values, segment)
            positions += n
            for e, budget in enumerate(budgets):
                ok = values > budget
                for i in range(n):
                    j = i
                    while j < n and ok[j] and segment[j] == segment[i]:
                        j += 1
                    from_position[e] += min(j - i, cap)
                    certified[e] += int(ok[i])
                    maximal[e] += ok[i] and (i == 0 or segment[i - 1] != segment[i] or not ok[i - 1])
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = {
                "from_position": np.array(from_position) / positions,
                "given_certified": np.array(from_position) / np.array(certified),
                "maximal": np.array(certified) / np.array(maximal),
            }
        for name, value in found.result().items():
            assert value == pytest.approx(expected[name], nan_ok=True), name


def test_heads_that_are_too_short_are_flagged_and_never_over_claim() -> None:
    torch.manual_seed(2)
    p = torch.softmax(1.5 * torch.randn(400, 60), -1)
    for rule in (Multiplicative(0.1), Additive(0.05), StrictGreedy(), Coverage(3)):
        full, cut = radius(p, rule), Head.from_probs(p, 6)
        exact, bound = head_is_exact(cut, rule), radius(cut, rule)
        assert (bound <= full + 1e-6).all(), rule
        assert torch.allclose(bound[exact], full[exact], atol=1e-6), rule
        if isinstance(rule, Multiplicative):
            assert 0.1 < exact.float().mean() < 0.9  # both kinds are there
            assert ((full - bound)[~exact] > 1e-4).any()  # and the flag means something
            report = certify(
                Rows([Row(torch.ones(400, dtype=torch.bool), cut)]), CertifyProtocol(coverage=(2,))
            )
            assert report.rule(rule)["short_head"] == pytest.approx(float((~exact).float().mean()))


def test_a_step_where_nothing_can_be_rejected_is_infinite_and_kept_out_of_the_mean() -> None:
    flat = rows_of(([[0.28, 0.26, 0.24, 0.22], [0.97, 0.01, 0.01, 0.01]], [True, True]))
    row = certify(flat, CertifyProtocol(additive=(0.3,), coverage=(2,))).rule("additive(t=0.3)")
    assert row["unbounded"] == 0.5
    assert row["mean"] == pytest.approx(float(radius(flat[0].head[1], Additive(0.3))), abs=1e-6)
    assert row["mean"] < row["mean_capped"] <= math.log(2)


def test_the_default_protocol_is_the_published_one() -> None:
    protocol = CertifyProtocol()
    assert protocol.mass == (1, 3, 5, 10, 25)
    assert protocol.additive == (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
    assert protocol.multiplicative == (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)
    assert protocol.run_budgets == (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.69)
    assert (protocol.typical[0], protocol.run_cap) == ((0.1, 0.09), 100)
    assert set(protocol.run_budgets) <= set(protocol.budgets())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"run_cap": 0}, "run_cap=0"),
        ({"mass": (1, 0)}, r"mass=\[1, 0\]"),
        ({"run_budgets": (0.1, -0.5)}, "KL budgets in nats"),
        ({"run_budgets": (math.inf,)}, "KL budgets in nats"),
        ({"additive": (1.5,)}, "t=1.5 must be a number"),
        ({"coverage": (0,)}, "m=0 must be a whole number"),
    ],
)
def test_a_protocol_out_of_range_is_refused_when_it_is_made(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CertifyProtocol(**wrong)


def test_documents_are_selected_by_the_length_of_their_prompt() -> None:
    made = Rows(
        Row(torch.arange(20) >= prompt - 1, Head.from_logits(torch.randn(20, 40), 9))
        for prompt in (3, 12, 9, 15)
    )
    assert len(select_documents(made)) == 4
    assert select_documents(made, min_prompt_tokens=9).indices == [1, 2, 3]
    assert select_documents(made, max_documents=2, min_prompt_tokens=9).indices == [1, 2]
    with pytest.raises(ValueError, match="min_prompt_tokens"):
        select_documents(made, min_prompt_tokens=16)


def test_gaps_rounded_to_float16_as_a_trace_stores_them() -> None:
    torch.manual_seed(4)
    exact = Head.from_logits(4 * torch.randn(3000, 40), 32)
    stored = Head(exact.ids, exact.gap.half().float(), exact.lse_gap, 40, exact.entropy)
    assert float(stored.p.double().sum(-1).max()) > 1 + 1e-5  # rounding really passes 1
    counted = torch.ones(3000, dtype=torch.bool)
    a, b = (certify(Rows([Row(counted, h)])) for h in (exact, stored))
    for x, y in zip(
        a.data["certificates"] + a.data["mass"], b.data["certificates"] + b.data["mass"], strict=True
    ):
        assert x["mean"] == pytest.approx(y["mean"], abs=2e-4)


def test_a_trace_without_counted_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="counts no step"):
        certify(rows_of(([CLEAR], [False])))


class Links(HTMLParser):
    """Every address the page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]


def test_the_page_is_self_contained_and_holds_what_the_json_holds(tmp_path: Path) -> None:
    torch.manual_seed(3)
    made = Rows(Row(torch.arange(50) > 8, Head.from_logits(4 * torch.randn(50, 64), 32)) for _ in range(4))
    report = certify(made)
    page = write_certify(report, tmp_path, {"command": "certdraft certify"})
    text = page.read_text()
    links = Links()
    links.feed(text)
    assert links.found
    assert all(link.startswith("data:image/png;base64,") for link in links.found)
    assert not links.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"url\(|@import", text)
    data = json.loads((tmp_path / "certify.json").read_text())
    assert data["schema"] == "certdraft.certify/1"
    assert list(data) == (
        "schema direction trace mass certificates survival runs p0 margin provenance".split()
    )
    strict = data["certificates"][0]
    assert list(strict) == "rule mean median p5 p25 mean_capped ceiling unbounded short_head".split()
    assert f"{strict['median']:.3f}" in text
    tables = (tmp_path / "tables.md").read_text()
    for table in certify_tables(report):
        assert table.caption in tables
        assert table.caption in unescape(text)
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert len(list(tmp_path.glob("figure*.png"))) == 7
