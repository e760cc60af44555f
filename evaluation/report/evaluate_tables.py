"""The tables of `evaluate`, from the numbers in report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from certdraft.evaluation.report.page import Table, interval, number, percent

Data = Mapping[str, Any]
CAUSES = ("not_in_top_m", "not_in_tree", "numerical_tie")  # why rounds end, in columns and in bars


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
                percent(value_of(certified.get("coverage(m=4)"))),
                *(interval(entry["lengths"][b]["tau"], 2) for b in builders),
            ]
        )
    return Table(
        "The drafters on held-out text",
        ["drafter", "coverage@1", "coverage@4", "coverage@4, margin < 0.1", "certified coverage@4"]
        + [f"τ {short(b)}" for b in builders],
        rows,
        "coverage@m: steps whose greedy token is among the drafter's m best. Certified: guaranteed by the "
        "divergence alone. τ: tokens per target pass, bonus included, pooled over texts, with a 95 % "
        "interval over texts.",
        "headline",
    )


def length_table(data: Data) -> Table:
    """τ of every drafter and tree on the recorded texts."""
    rows = []
    for name, entry in data["drafters"].items():
        for label, row in entry["lengths"].items():
            rows.append(
                [name, short(label), interval(row["tau"], 3), number(row["per_request_mean"], 3),
                 number(row["nodes_per_pass"], 1), str(row["prompts"])]
            )  # fmt: skip
    return Table(
        "Acceptance length τ on the recorded texts",
        ["drafter", "tree", "τ (tokens per target pass)", "mean over requests", "draft tokens per pass"]
        + ["texts"],
        rows,
        "τ = Σ tokens ÷ Σ target passes. The mean over requests of each request's own ratio weighs short "
        "texts as much as long ones; other projects sometimes report that.",
        "lengths",
        text_columns=2,
    )


def bench_table(bench: Data) -> Table:
    """Speed of every drafter and tree against plain decoding."""
    plain = bench["plain_tokens_per_s"]
    rows = [["plain decoding", "–", "1", interval(plain, 1), "1", "–", "–"]]
    for m in bench["methods"]:
        share = m["share"]
        rows.append(
            [
                m["drafter"],
                short(m["builder"]),
                number(m["tau"]["value"], 2),
                interval(m["tokens_per_s"], 1),
                interval(m["speedup"], 2),
                " / ".join(number(100 * share[k], 0) for k in ("draft", "verify", "host", "prefill")),
                f"{m['equal_texts']} / {m['prompts']}",
            ]
        )
    return Table(
        f"Real decoding of {bench['prompts']} prompts, batch 1, {bench['device']}",
        ["drafter", "tree", "τ", "tokens/s", "speed-up", "draft / verify / host / prefill, % of time"]
        + ["equal texts"],
        rows,
        "Methods take turns on every prompt; prefill counts on both sides. Speed-ups are ratios of pooled "
        "tokens per second, paired by prompt. On a tiny target the drafter is not much cheaper than the "
        "target, so a speed-up below 1 there does not carry over to a large one. τ does not depend on the "
        "machine, seconds do.",
        "bench",
        text_columns=2,
    )


def rule_table(acceptance: Data) -> Table:
    """Certified and accepted steps by rule."""
    names = [row["rule"] for row in next(iter(acceptance.values()))["rules"]]
    rows = []
    undecided = False
    for index, rule in enumerate(names):
        for name, found in acceptance.items():
            row = found["rules"][index]
            undecided |= row["unknown"] > 0
            certified, realised = value_of(row["certified"]), value_of(row["realised"])
            part = certified / realised if certified is not None and realised else None
            rows.append(
                [rule, name, interval(row["certified"], 1, 100), interval(row["realised"], 1, 100)]
                + [percent(part, 0), percent(row["unknown"] / found["steps"])]
            )
    shown = 6 if undecided else 5
    return Table(
        "Certified and accepted steps by rule (%)",
        ["rule", "drafter", "certified", "accepted", "certified ÷ accepted", "undecided"][:shown],
        [row[:shown] for row in rows],
        "strict is lossless greedy verification; the slack rules accept other likely tokens too; coverage(m) "
        "needs the greedy token among the drafter's m best. Intervals: 95 %, bootstrap over texts."
        + (
            " Undecided: the recorded head is too short to tell whether the rule accepts the drafter's "
            "token; such steps count as rejected. A longer head, or exact_kl, decides them."
            if undecided
            else ""
        ),
        "acceptance",
        text_columns=2,
    )


def coverage_table(acceptance: Data) -> Table:
    """Coverage of the greedy token by width."""
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


def depth_table(data: Data) -> Table:
    """Acceptance at each draft depth, of the rounds that get there."""
    return _by_depth(
        data,
        "Accepted at each draft depth, of the rounds that get there",
        "Depth d counts a round when its tree is that deep and its tokens before that depth were accepted.",
        "depths",
        lambda depth: percent(depth["accepted"] / depth["reached"], 0),
    )


def candidates_table(data: Data) -> Table:
    """Mean number of candidates at each draft depth, of the rounds that get there."""
    return _by_depth(
        data,
        "Candidates at each draft depth, of the rounds that get there",
        "Tokens that the tree offers after the accepted ones. Losses of a fixed number of candidates take "
        "such a list as m.",
        "candidates",
        lambda depth: number(depth["candidates"], 1),
    )


def _by_depth(
    data: Data, title: str, caption: str, name: str, cell: Callable[[Mapping[str, Any]], str]
) -> Table:
    """One row per drafter and tree, one column per draft depth."""
    deepest = max(len(row["depths"]) for e in data["drafters"].values() for row in e["lengths"].values())
    rows = []
    for drafter, entry in data["drafters"].items():
        for label, row in entry["lengths"].items():
            cells = [cell(depth) if depth["reached"] else "–" for depth in row["depths"]]
            rows.append([drafter, short(label), *cells, *["–"] * (deepest - len(cells))])
    columns = ["drafter", "tree", *map(str, range(1, deepest + 1))]
    return Table(title, columns, rows, caption, name, text_columns=2)


def expected_rows(data: Data) -> list[dict[str, Any]]:
    """Expected and accepted tokens by drafter and builder: from real decoding if known, else from replay."""
    live = [
        (m["drafter"], m["builder"], m["promises"]) for m in (data["bench"] or {"methods": []})["methods"]
    ]
    replayed = [
        (n, b, row["promises"]) for n, e in data["drafters"].items() for b, row in e["lengths"].items()
    ]
    chosen = live if any(found for *_, found in live) else replayed
    return [{"drafter": n, "builder": short(b), **found} for n, b, found in chosen if found]


def expected_table(data: Data) -> Table:
    """Expected and realised accepted draft tokens."""
    return Table(
        "Expected and accepted draft tokens of a drafted round",
        ["drafter", "tree", "expected", "accepted", "accepted ÷ expected", "rounds"],
        [
            [r["drafter"], r["builder"], number(r["expected"], 2), number(r["accepted"], 2)]
            + [interval(r["kept"], 2), str(r["rounds"])]
            for r in expected_rows(data)
        ],
        "Expected: the sum of the tree's path probabilities under the drafter. Above 1 the drafter is "
        "underconfident and a best-first tree spreads too wide: lower its temperature; below 1, raise it. "
        "Cost-aware trees learn the temperature.",
        "promises",
        text_columns=2,
    )


def group_table(data: Data) -> Table | None:
    """τ and speed by prompts file and category; None without prompts files."""
    bench = {(m["drafter"], m["builder"]): m for m in (data["bench"] or {"methods": []})["methods"]}
    rows = []
    for name, entry in data["drafters"].items():
        for label, row in entry["lengths"].items():
            timed = {g["group"]: g for g in bench.get((name, label), {"groups": []})["groups"]}
            for group in row["groups"]:
                speed = timed.get(group["group"]) or {"tokens_per_s": None, "speedup": None}
                cells = (group["tau"], 2), (speed["tokens_per_s"], 1), (speed["speedup"], 2)
                rows.append(
                    [group["group"], name, short(label), str(group["prompts"])]
                    + [_with_interval(found, digits) for found, digits in cells]
                )
    if not rows:
        return None
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    return Table(
        "By prompts file and category",
        ["prompts", "drafter", "tree", "texts", "τ", "tokens/s", "speed-up"],
        rows,
        "Pooled over the texts of each row, like the totals above; a category is part of its file.",
        "groups",
        text_columns=3,
    )


def _with_interval(found: Data | None, digits: int) -> str:
    """Format with the interval if there is more than one text."""
    return interval(found, digits) if found and found["prompts"] > 1 else number(value_of(found), digits)


def rejection_table(drafters: Data) -> Table:
    """Why first choices are rejected and rounds end before their tree does."""
    rows = []
    unknown = any(row["rejections"]["unknown"] for e in drafters.values() for row in e["lengths"].values())
    for name, entry in drafters.items():
        rows += [
            [name, row["label"], f"{row['of']} {row['unit']}", percent(row["rejected"] / max(row["of"], 1))]
            + [percent(row[cause] / max(row["rejected"], 1)) for cause in (*CAUSES, "unknown")]
            for row in cause_rows(entry)
        ]
    first = next(iter(drafters.values()))
    top_m, tie_gap = first["acceptance"]["rejections"]["top_m"], first.get("tie_gap", 1e-3)
    columns = ["drafter", "tree", "of", "rejected", f"not in top-{top_m}", f"in top-{top_m}, not in the tree"]
    shown = 8 if unknown else 7
    return Table(
        "Why the drafter is rejected",
        [*columns, "tie", "unknown"][:shown],
        [row[:shown] for row in rows],
        "The last columns share out the rejections. First choices: every step on its own, with the target's "
        "text before it; a tree of one node. Trees: rounds that end before the tree's full depth. "
        f"Not in top-{top_m}: train. In top-{top_m} but not in the tree: widen or reshape the tree. Tie: the "
        f"target's own token leads by at most {tie_gap:g} nats, so kernels and precision decide.",
        "rejections",
        text_columns=3,
    )


def cause_rows(entry: Data) -> list[dict[str, Any]]:
    """Rejections by cause: of the first choices, then of each tree's rounds."""
    first = entry["acceptance"]["rejections"]
    steps = {"label": "first choices", "of": first["steps"], "unit": "steps", "unknown": 0}
    rows = [{**first, **steps, "not_in_tree": first["in_top_m"]}]
    for label, row in entry["lengths"].items():
        rows.append(
            {**row["rejections"], "label": short(label), "of": row["rejections"]["rounds"], "unit": "rounds"}
        )
    return rows


def comparison_table(data: Data) -> Table:
    """Paired differences and ratios to the baseline."""
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


def _quantity(name: str) -> str:
    """The words for a comparison's key."""
    kind, _, rest = name.partition("/")
    if kind == "tau":
        return f"τ {short(rest)}"
    if kind == "tokens_per_s":
        return f"tokens/s {short(rest)}"
    if kind.startswith("low_margin_"):
        return kind.removeprefix("low_margin_") + ", margin < 0.1"
    return f"{kind} {rest}".strip()


def short(label: str) -> str:
    """A builder's label for a narrow column.

    Examples:
        >>> short("best_first(budget=16, max_depth=8)"), short("static(widths=4x2x1)")
        ('best-first 16/8', 'static 4x2x1')
    """
    name, _, arguments = label.partition("(")
    values = [a.split("=")[-1] for a in arguments.rstrip(")").split(", ")]
    return f"{name.replace('_', '-')} {'/'.join(values)}".strip()


def value_of(found: Data | None) -> float | None:
    return None if found is None else float(found["value"])
