"""From report.json to tables, figures and one page about drafters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certdraft.evaluation import plots
from certdraft.evaluation.evaluate import EvaluationReport
from certdraft.evaluation.report import (
    Figure,
    Page,
    Section,
    Table,
    interval,
    number,
    percent,
    write_json,
    write_page,
)

Data = Mapping[str, Any]
_PANEL_RULES = ("strict", "coverage(m=4)")


def write_evaluation(
    report: EvaluationReport, out: Path, provenance: Mapping[str, str], title: str = ""
) -> Path:
    """Write report.json, tables.md, the figures and report.html into an empty directory.

    Args:
        report: from `evaluate`.
        out: existing directory.
        provenance: label → text, shown at the end and kept in the JSON.
        title: page title; by default it names the target.

    Returns:
        Path of the HTML page.
    """
    data = report.data
    write_json(out / "report.json", {**data, "provenance": dict(provenance)})
    figures = _figures(data, out)
    title = title or f"Drafters for {target_name(data)}"
    return write_page(_page(data, figures, provenance, title), out)


def headline_table(data: Data) -> Table:
    """One row per drafter: coverage, certified share, τ by builder."""
    builders = list(next(iter(data["drafters"].values()))["lengths"])
    rows = []
    for name, entry in data["drafters"].items():
        found = {c["m"]: c for c in entry["acceptance"]["coverage"]}
        certified = {r["rule"]: r["certified"] for r in entry["acceptance"]["rules"]}
        low = found[4]["low_margin"]
        rows.append(
            [
                name,
                percent(found[1]["all"]["value"]),
                percent(found[4]["all"]["value"]),
                percent(low["value"] if low else None),
                percent(_value(certified.get("coverage(m=4)"))),
                *(interval(entry["lengths"][b]["tau"], 2) for b in builders),
            ]
        )
    return Table(
        "The drafters on held-out text",
        [
            "drafter",
            "coverage@1",
            "coverage@4",
            "coverage@4, margin < 0.1",
            "certified coverage@4",
            *(f"τ {short(b)}" for b in builders),
        ],
        rows,
        "coverage@m: steps whose greedy token is among the drafter's m best. Certified: guaranteed by the "
        "divergence alone. τ: tokens per target pass, bonus included, pooled over texts, with a 95 % "
        "interval over texts.",
        "headline",
    )


def _page(data: Data, figures: dict[str, Figure], provenance: Mapping[str, str], title: str) -> Page:
    acceptance = {name: entry["acceptance"] for name, entry in data["drafters"].items()}
    any_one = next(iter(acceptance.values()))
    bench = data["bench"]
    exact = any_one["kl"]["source"] == "exact"
    sections = [
        Section(
            "Acceptance length and speed",
            "τ is replayed on the recorded greedy texts; real decoding of fewer prompts gives the speed.",
            [_length_table(data), *([_bench_table(bench)] if bench else [])],
            [figures["lengths"]],
        ),
        Section(
            "Certified and realised acceptance",
            "Dark: steps where the divergence alone guarantees acceptance. Light: steps accepted. A "
            "certified step that is not accepted would be an error; there is none. What the dark bar misses "
            "is luck, or a divergence spent where it does not matter.",
            [_rule_table(acceptance)],
            [figures["certified"]],
        ),
        Section(
            "Coverage by width",
            "A tree of width m needs the greedy token among the drafter's m best. Near-ties are where width "
            "pays.",
            [_coverage_table(acceptance)],
            [figures["coverage"]],
        ),
        Section(
            "Depth and rejections",
            "How acceptance holds up along the draft, and why rounds end: train when the token is not in "
            "the top-m, change the tree when it is but no node was spent on it, change precision when the "
            "target itself is tied.",
            [_rejection_table(data)],
            [figures["depths"], figures["calibration"]],
        ),
    ]
    if data["comparisons"]:
        sections.append(Section(f"Against {data['baseline']}", "", [_comparison_table(data)]))
    kl = (
        "KL is exact: the target's full distributions were recomputed."
        if exact
        else "The target is known by its recorded heads: divergences are of the kept tokens and the rest."
    )
    trace = {k.replace("_", " "): str(v) for k, v in data["trace"].items()}
    return Page(
        title,
        f"{any_one['steps']} held-out steps of {any_one['documents']} texts. {kl} All "
        "intervals are 95 % bootstrap intervals over texts.",
        headline_table(data),
        sections,
        {**trace, **provenance},
        _tiles(data),
        _warnings(data),
    )


def _tiles(data: Data) -> list[tuple[str, str]]:
    best_name, best_label, best = max(
        ((n, b, row["tau"]) for n, e in data["drafters"].items() for b, row in e["lengths"].items()),
        key=lambda x: x[2]["value"],
    )
    checks = sum(e["acceptance"]["steps"] * len(e["acceptance"]["rules"]) for e in data["drafters"].values())
    tiles = [
        (number(best["value"], 2), f"best acceptance length τ: {best_name}, {short(best_label)}"),
        ("0", "certified steps rejected, of " + f"{checks:,} checked".replace(",", "\u202f")),
    ]
    bench = data["bench"]
    if bench:
        equal = sum(m["equal_texts"] for m in bench["methods"])
        total = bench["prompts"] * len(bench["methods"])
        tiles.append(
            (f"{equal} / {total}", "decoded texts equal to the target's own greedy text, token for token")
        )
        top = max(bench["methods"], key=lambda m: m["speedup"]["value"])
        tiles.append(
            (
                f"{number(top['speedup']['value'], 2)}×",
                f"best speed-up here: {top['drafter']}, {short(top['builder'])}",
            )
        )
    return tiles


def _warnings(data: Data) -> list[str]:
    found = []
    bench = data["bench"]
    if bench and not bench["lossless"]:
        cases = [(m, d) for m in bench["methods"] for d in m["differing"]]
        method, first = cases[0]
        lead = first["target_lead"]
        found.append(
            f"Decoding is not lossless here: {len(cases)} texts differ from the target's greedy text. First: "
            f"{method['drafter']}, {method['builder']}, prompt {first['prompt']}, token {first['token']}: "
            f"{first['got']} instead of {first['expected']}"
            + ("" if lead is None else f", where the target leads by {lead:.2g} nats")
            + ". Leads below 1e-3 in float32 (0.1 in bfloat16) are numerical ties; larger ones are a fault."
        )
    if bench and bench["changed_texts"]:
        found.append(
            f"{bench['changed_texts']} of {bench['prompts']} live greedy texts differ from the recorded "
            "ones. A few: the target runs in another dtype or with other kernels than when the trace was "
            "made. Most: this is not the target the trace was recorded from, and the trace's numbers are not "
            "about it."
        )
    for name, entry in data["drafters"].items():
        changed = entry["acceptance"]["greedy_changed"]
        if changed:
            found.append(
                f"{name}: the recomputed greedy token differs from the recorded one at {changed} steps."
            )
    return found


def _length_table(data: Data) -> Table:
    rows = []
    for name, entry in data["drafters"].items():
        for label, row in entry["lengths"].items():
            rows.append(
                [name, short(label), interval(row["tau"], 3), number(row["per_request_mean"], 3),
                 number(row["nodes_per_pass"], 1), str(row["prompts"])]
            )  # fmt: skip
    return Table(
        "Acceptance length τ on the recorded texts",
        [
            "drafter",
            "tree",
            "τ (tokens per target pass)",
            "mean over requests",
            "draft tokens per pass",
            "texts",
        ],
        rows,
        "τ = Σ tokens ÷ Σ target passes. The mean over requests of each request's own ratio weighs short "
        "texts as much as long ones; other projects sometimes report that.",
        "lengths",
        text_columns=2,
    )


def _bench_table(bench: Data) -> Table:
    plain = bench["plain_tokens_per_s"]
    rows = [["plain decoding", "–", "1", interval(plain, 0), "1", "–", "–"]]
    for m in bench["methods"]:
        share = m["share"]
        rows.append(
            [
                m["drafter"],
                short(m["builder"]),
                number(m["tau"]["value"], 2),
                interval(m["tokens_per_s"], 0),
                interval(m["speedup"], 2),
                " / ".join(number(100 * share[k], 0) for k in ("draft", "verify", "host", "prefill")),
                f"{m['equal_texts']} / {m['prompts']}",
            ]
        )
    return Table(
        f"Real decoding of {bench['prompts']} prompts, batch 1, {bench['device']}",
        [
            "drafter",
            "tree",
            "τ",
            "tokens/s",
            "speed-up",
            "draft / verify / host / prefill, % of time",
            "equal texts",
        ],
        rows,
        "Methods take turns on every prompt; prefill counts on both sides. Speed-ups are ratios of pooled "
        "tokens per second, paired by prompt. On a tiny target the drafter is not much cheaper than the "
        "target, so a speed-up below 1 there says nothing about a large one. τ does not depend on the "
        "machine, seconds do.",
        "bench",
        text_columns=2,
    )


def _rule_table(acceptance: Data) -> Table:
    names = [row["rule"] for row in next(iter(acceptance.values()))["rules"]]
    rows = []
    undecided = 0.0
    for index, rule in enumerate(names):
        for name, found in acceptance.items():
            row = found["rules"][index]
            share = row["unknown"] / found["steps"]
            undecided = max(undecided, share)
            rows.append(
                [rule, name, interval(row["certified"], 1, 100), interval(row["realised"], 1, 100)]
                + [number(100 * share, 1)]
            )
    shown = 5 if undecided else 4
    return Table(
        "Certified and accepted steps by rule (%)",
        ["rule", "drafter", "certified", "accepted", "undecided"][:shown],
        [row[:shown] for row in rows],
        "strict is lossless greedy verification; the slack rules accept other likely tokens too; coverage(m) "
        "asks for the greedy token among the drafter's m best."
        + (
            " Undecided: the recorded head is too short to tell whether the rule accepts the drafter's "
            "token; such steps count as rejected. A longer head, or exact_kl, decides them."
            if undecided
            else ""
        ),
        "acceptance",
        text_columns=2,
    )


def _coverage_table(acceptance: Data) -> Table:
    widths = [c["m"] for c in next(iter(acceptance.values()))["coverage"]]
    rows = []
    for name, found in acceptance.items():
        for key, label in (("all", "all"), ("low_margin", "margin < 0.1")):
            rows.append([name, label, *(interval(c[key], 1, 100) for c in found["coverage"])])
    return Table(
        "Greedy token among the drafter's m best (% of steps)",
        ["drafter", "steps", *(f"m = {m}" for m in widths)],
        rows,
        "Margin: the target's lead of its greedy token over the runner-up, in probability.",
        "coverage",
        text_columns=2,
    )


def _rejection_table(data: Data) -> Table:
    rows = []
    for name, entry in data["drafters"].items():
        top_m = entry["acceptance"]["rejections"]["top_m"]
        for label, row in entry["lengths"].items():
            r = row["rejections"]
            n = max(r["rejected"], 1)
            rows.append(
                [name, short(label), percent(r["rejected"] / max(r["rounds"], 1))]
                + [percent(r[cause] / n) for cause in ("not_in_top_m", "not_in_tree", "numerical_tie")]
            )
    return Table(
        "Why rounds end",
        [
            "drafter",
            "tree",
            "rounds rejected",
            f"not in top-{top_m}",
            f"in top-{top_m}, not in the tree",
            "tie",
        ],
        rows,
        "Of the rounds that end before the tree's full depth. Tie: the target itself leads by at most a "
        "thousandth of a nat, so kernels and precision decide.",
        "rejections",
        text_columns=2,
    )


def _comparison_table(data: Data) -> Table:
    rows = []
    for row in data["comparisons"]:
        share = row["quantity"].split("/")[0] not in ("tau", "tokens_per_s")
        difference = row["difference"]
        clear = not difference["low"] <= 0 <= difference["high"]
        rows.append(
            [
                row["drafter"],
                _quantity(row["quantity"]),
                interval(difference, 2, 100) + " pp" if share else interval(difference, 3),
                interval(row.get("ratio"), 3),
                "yes" if clear else "no",
            ]
        )
    return Table(
        f"Paired comparison with {data['baseline']}",
        ["drafter", "quantity", "difference", "ratio", "clear"],
        rows,
        "The same texts, resampled together; pp: percentage points; clear: the interval excludes 0. One "
        "training run each: spread between seeds is not in these intervals.",
        "comparisons",
        text_columns=2,
    )


def _figures(data: Data, out: Path) -> dict[str, Figure]:
    drafters = data["drafters"]
    panels = [
        panel
        for name, entry in drafters.items()
        for row in entry["acceptance"]["rules"]
        if row["rule"] in _PANEL_RULES
        for panel in [_panel(name, row)]
    ]
    lengths = [
        {"drafter": n, "builder": short(b), "tau": row["tau"]}
        for n, e in drafters.items()
        for b, row in e["lengths"].items()
    ]
    first = next(iter(next(iter(drafters.values()))["lengths"]))
    depths = [{"label": n, "depths": e["lengths"][first]["depths"]} for n, e in drafters.items()]
    return {
        "lengths": Figure(
            plots.acceptance_lengths(out / "acceptance-length.png", lengths),
            "Acceptance length by drafter and tree, with 95 % intervals over texts.",
            "Bars of acceptance length",
            wide=True,
        ),
        "certified": Figure(
            plots.certified_realised(out / "certified-realised.png", panels),
            "By the target's margin. Bars of rare buckets have wide intervals.",
            "Bars of certified and realised acceptance by margin",
            wide=True,
        ),
        "coverage": Figure(
            plots.coverage(
                out / "coverage.png", {n: e["acceptance"]["coverage"] for n, e in drafters.items()}
            ),
            "Coverage of the greedy token by width.",
            "Lines of coverage by width",
            wide=True,
        ),
        "depths": Figure(
            plots.depths(out / "depth.png", depths),
            f"Acceptance at each depth of {short(first)}, among the rounds that got there.",
            "Lines of acceptance by depth",
        ),
        "calibration": Figure(
            plots.calibration(
                out / "calibration.png", {n: e["acceptance"]["calibration"] for n, e in drafters.items()}
            ),
            "On the diagonal a drafter's confidence can be trusted, which is what best-first trees do.",
            "Reliability diagram",
        ),
    }


def _panel(name: str, row: Data) -> dict[str, Any]:
    buckets = row["buckets"]
    return {
        "title": f"{name}: {row['rule']}",
        "buckets": [f"{b['low']:g}–{b['high']:g}" for b in buckets],
        "steps": [b["steps"] for b in buckets],
        "certified": [b["certified"] for b in buckets],
        "realised": [_value(b["realised"]) for b in buckets],
        "low": [b["realised"]["low"] if b["realised"] else None for b in buckets],
        "high": [b["realised"]["high"] if b["realised"] else None for b in buckets],
    }


def _quantity(name: str) -> str:
    """A comparison's key in words."""
    kind, _, rest = name.partition("/")
    if kind == "tau":
        return f"τ {short(rest)}"
    if kind == "tokens_per_s":
        return f"tokens/s {short(rest)}"
    if kind.startswith("low_margin_"):
        return kind.removeprefix("low_margin_") + ", margin < 0.1"
    return f"{kind} {rest}".strip()


def target_name(data: Data) -> str:
    """What to call the target in a title."""
    name = data["trace"].get("target", "the target")
    return "the embedded target" if name == "embedded" else str(name)


def short(label: str) -> str:
    """A builder's label for a narrow column.

    Examples:
        >>> short("best_first(budget=16, max_depth=8)"), short("static(widths=4x2x1)")
        ('best-first 16/8', 'static 4x2x1')
    """
    name, _, arguments = label.partition("(")
    values = [a.split("=")[-1] for a in arguments.rstrip(")").split(", ")]
    return f"{name.replace('_', '-')} {'/'.join(values)}".strip()


def _value(found: Data | None) -> float | None:
    return None if found is None else float(found["value"])
