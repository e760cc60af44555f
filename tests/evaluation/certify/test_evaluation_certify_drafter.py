"""`certify` with a drafter: a real export joined with a real trace, against a walk through every step."""

import json
from pathlib import Path

import pytest
import torch
from oracles.runs.outcomes import with_other_tokenizer

from certdraft.certificates import Additive, Coverage, StrictGreedy, kl_divergence_logp, radius
from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    load_target,
    load_tokenizer,
    open_trace,
    record_trace,
    tokenizer_fingerprint,
)
from certdraft.data.targets import embedded_target_path
from certdraft.decoding import Chain
from certdraft.drafters import CardFacts, CausalDrafter, EagleConfig, EagleDrafter, export
from certdraft.evaluation import run_certify
from certdraft.evaluation.measure.acceptance import MARGIN_EDGES, measure_acceptance
from certdraft.evaluation.measure.trace_reading import features_for

CORPUS, PROMPTS = Corpus(split="test", max_rows=4), Prompts(prompt_tokens=16)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with noise on its weights: close enough for certificates, far enough to be rejected."""
    torch.manual_seed(0)
    made = CausalDrafter(pretrained=str(embedded_target_path()))
    tokenizer = load_tokenizer()
    vocab_size = load_target("embedded").config.vocab_size
    made.build(vocab_size)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.15 * weight.std() * torch.randn_like(weight) if weight.ndim == 2 else 0.0
    facts = CardFacts("embedded", vocab_size, tokenizer_fingerprint(tokenizer))
    where = tmp_path_factory.mktemp("drafter") / "noisy"
    return export(made, where, tokenizer=tokenizer, draft_length=4, card=facts)


@pytest.fixture(scope="module")
def certified(drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`certdraft certify --target embedded --drafter …`: records, certifies, joins."""
    out = tmp_path_factory.mktemp("certify") / "out"
    run_certify(
        str(out),
        target="embedded",
        corpus=CORPUS,
        prompts=PROMPTS,
        generation=Generation(max_new_tokens=24, loops="keep"),
        num_kept=32,
        accelerator="cpu",
        drafter=str(drafter),
        builders=[Chain(3)],
        device="cpu",
    )
    return out


@torch.no_grad()
def test_every_number_of_the_joined_view_is_that_of_a_walk_through_the_trace(
    certified: Path, drafter: Path
) -> None:
    """Full distributions of both models, one document at a time; no code of the joined view."""
    found = json.loads((certified / "certify.json").read_text())["drafter"]
    trace, target = open_trace(certified / "trace"), load_target("embedded")
    model = CausalDrafter(pretrained=str(drafter))
    model.build(trace.meta.vocab_size)
    model.eval()
    rules = {"strict": StrictGreedy(), "additive(t=0.1)": Additive(0.1), "coverage(m=2)": Coverage(2)}
    buckets = len(MARGIN_EDGES) - 1
    realised = {name: [0] * buckets for name in rules}
    exact = dict.fromkeys(rules, 0)
    steps, causes, rounds = [0] * buckets, [0, 0, 0], [0, 0, 0, 0]
    for row in (trace.row(i) for i in range(len(trace))):
        ids = row.input_ids.long()[None]
        place = torch.arange(ids.shape[1])[None]
        logp = target(ids).logits[0].double().log_softmax(-1)
        logq = model.head(model.hidden(ids, place, torch.zeros_like(ids))[0]).double().log_softmax(-1)
        counted = row.loss_mask.nonzero().squeeze(-1).tolist()
        right = []
        for t in counted:
            p, greedy, token = logp[t].exp(), int(logp[t].argmax()), int(logq[t].argmax())
            top = p.sort(descending=True).values
            bucket = max(b for b in range(buckets) if float(top[0] - top[1]) >= MARGIN_EDGES[b])
            rank = int((logq[t] >= logq[t, greedy]).sum())
            steps[bucket] += 1
            realised["strict"][bucket] += token == greedy
            realised["additive(t=0.1)"][bucket] += token == greedy or float(p[token]) > float(top[0]) - 0.1
            realised["coverage(m=2)"][bucket] += rank <= 2
            kl = float(kl_divergence_logp(logp[t], logq[t]))
            for name, rule in rules.items():
                exact[name] += kl < float(radius(p, rule))
            right.append((token == greedy, rank, float(logp[t, greedy] - logp[t, token])))
            if token != greedy:
                causes[2 if right[-1][2] <= 1e-3 else int(rank <= 4)] += 1
        lead = [float(logp[t].topk(2).values.diff().neg()) for t in counted]
        start = 0
        while start < len(right):  # chains of three drafted from the target's text
            depth = min(3, len(right) - start - 1)
            accepted = next((a for a in range(depth) if not right[start + a][0]), depth)
            rounds[0] += 1
            if accepted < depth:
                at = start + accepted
                rounds[3 if lead[at] <= 1e-3 else 1 + int(right[at][1] <= 4)] += 1
            start += accepted + 1

    by_rule = {row["rule"]: row for row in found["acceptance"]["rules"]}
    for name in rules:
        row = by_rule[name]
        assert [b["steps"] for b in row["buckets"]] == steps
        shares = [(b["realised"] or {"value": 0})["value"] for b in row["buckets"]]
        assert [round(x * n) for x, n in zip(shares, steps, strict=True)] == realised[name]
        certified_share = row["certified"]["value"]
        assert 0 < certified_share < row["realised"]["value"] < 1
        # heads certify by the coarse divergence: at least as many steps as the full KL, never a rejected one
        assert round(certified_share * sum(steps)) >= exact[name] > 0
        assert all((b["certified"] or 0) <= x for b, x in zip(row["buckets"], shares, strict=True))
    seen = found["acceptance"]["rejections"]
    assert [seen["not_in_top_m"], seen["in_top_m"], seen["numerical_tie"]] == causes
    assert seen["rejected"] == sum(causes) > 0
    seen = found["lengths"]["chain(depth=3)"]["rejections"]
    keys = ("rounds", "not_in_top_m", "not_in_tree", "numerical_tie")
    assert [seen[k] for k in keys] == rounds
    assert seen["rejected"] == sum(rounds[1:]) > 0


def test_the_page_shows_the_joined_view(certified: Path) -> None:
    data = json.loads((certified / "certify.json").read_text())
    text, tables = (certified / "certify.html").read_text(), (certified / "tables.md").read_text()
    assert data["drafter"]["name"] == "noisy"
    assert "sha-256 of drafter noisy" in data["provenance"]
    assert "With the drafter noisy" in text
    assert "No drafter was involved" not in text
    for table in ("Table 7.", "Table 8.", "Table 9."):
        assert table in tables
        assert table in text
    strict = next(row for row in data["drafter"]["acceptance"]["rules"] if row["rule"] == "strict")
    assert f"{100 * strict['certified']['value']:.1f} [" in tables
    for lines in tables.split("\n\n"):
        grid = [line.replace("\\|", "").count("|") for line in lines.splitlines() if line.startswith("|")]
        assert len(set(grid)) <= 1
    assert len(list(certified.glob("figure*.png"))) == 9


def test_a_drafter_of_another_tokenizer_is_refused_before_anything_is_written(
    certified: Path, drafter: Path, tmp_path: Path
) -> None:
    other = with_other_tokenizer(drafter, tmp_path / "other")
    mine = open_trace(certified / "trace").meta.tokenizer_fingerprint
    with pytest.raises(ValueError, match=rf"{mine[:12]}.*f{{12}}"):
        run_certify(str(tmp_path / "out"), trace=str(certified / "trace"), drafter=str(other))
    with pytest.raises((FileNotFoundError, OSError), match="nowhere"):
        run_certify(str(tmp_path / "out"), trace=str(certified / "trace"), drafter=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_m": 0}, "top_m=0 must be 1 or more"),
        ({"max_documents": 0}, "max_documents=0 must be 1 or more"),
        ({"replay_documents": 0}, "replay_documents=0 must be 1 or more"),
        ({"tie_gap": -1.0}, "tie_gap=-1.0 is a lead in nats"),
        ({"drafter": "./no such folder"}, "drafter ./no such folder: no such folder; .*certdraft export"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_is_recorded(
    wrong: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_certify(str(tmp_path / "out"), target="embedded", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_eagle_head_reads_the_hidden_states_of_the_trace(certified: Path, tmp_path: Path) -> None:
    """The joined view is that of features computed by the target, up to the trace's bf16."""
    target, tokenizer = load_target("embedded"), load_tokenizer()
    torch.manual_seed(0)
    head = EagleDrafter(EagleConfig(target_layer_ids=(1, 3, 5))).build(target.config.vocab_size, target)
    facts = CardFacts("embedded", target.config.vocab_size, tokenizer_fingerprint(tokenizer))
    exported = export(head.eval(), tmp_path / "eagle", tokenizer=tokenizer, draft_length=3, card=facts)
    record_trace(
        str(tmp_path / "trace"), "embedded", CORPUS, PROMPTS, Generation(max_new_tokens=12, loops="keep"),
        num_kept=32, accelerator="cpu", feature_layers=(0, 1, 3, 5),
    )  # fmt: skip
    run_certify(
        str(tmp_path / "out"), trace=str(tmp_path / "trace"), drafter=str(exported), builders=[Chain(3)],
        device="cpu",
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "certify.json").read_text())["drafter"]["acceptance"]
    features = features_for({"eagle": head}, target)["eagle"]
    expected = measure_acceptance(head, open_trace(tmp_path / "trace"), features=features).summary(0)
    assert found["steps"] == expected["steps"] > 0
    assert found["kl"]["mean"] == pytest.approx(expected["kl"]["mean"], rel=1e-2)
    with pytest.raises(ValueError, match=r"layers \[1, 3, 5\], and the trace holds none"):
        run_certify(
            str(tmp_path / "none"), trace=str(certified / "trace"), drafter=str(exported), device="cpu"
        )
