"""All families in the loop: the target's own text (A1), a reference's rounds, states (A5)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from oracles.models.decoding_models import tiny_qwen3
from oracles.models.feature_drafters import block_logits, dspark_drafts, eagle_logits, enlarge
from torch import Tensor
from torch.nn import functional

from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    CostModel,
    StaticTree,
    TargetRunner,
    acceptance_length,
    decode,
    greedy,
)
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)

V, NEW = 40, 16
MODEL = tiny_qwen3(0, V, layers=7)
PROMPTS = [[1, 2, 3], [7], [30, 31, 32, 33, 34, 35, 36], [5, 5]]
COST = CostModel.table([1 + 0.02 * n for n in range(33)], 0.1)
BUILDERS = {
    "chain": lambda: Chain(4),
    "static": lambda: StaticTree((3, 2)),
    "best_first_7": lambda: BestFirst(7),
    "best_first_40": lambda: BestFirst(40, max_depth=3),
    "cost_aware": lambda: CostAware(COST, "lambda", budget=32, max_depth=4),
}
NAMES = ["eagle", "block", "dspark", "eagle, 25 tokens", "random eagle", "random block", "random dspark"]
Features = EagleDrafter | BlockDrafter | DSparkDrafter


def features_of(ids: list[int], taps: tuple[int, ...]) -> Tensor:
    """[T, L, H] by transformers' own outputs: `hidden_states[l + 1]` is the output of layer l."""
    with torch.no_grad():
        states = MODEL(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([states[tap + 1][0] for tap in taps], 1)


def trained(drafter: Features, texts: list[list[int]], steps: int = 60) -> Features:
    """Cross-entropy on the very texts of these tests, packed into one row: right more often than not."""
    ids = [[*prompt, *text] for prompt, text in zip(PROMPTS, texts, strict=True)]
    features = torch.cat([features_of(row, drafter.taps) for row in ids])[None]
    documents = torch.tensor([number for number, row in enumerate(ids) for _ in row])[None]
    positions = torch.tensor([place for row in ids for place in range(len(row))])[None]
    packed = torch.tensor([token for row in ids for token in row])[None]
    counted = torch.cat([documents[:, 1:] == documents[:, :-1], torch.zeros(1, 1, dtype=torch.bool)], 1)
    labels = packed.roll(-1, 1).flatten()
    drafter.train()
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    torch.manual_seed(0)
    for _ in range(steps):
        paths = drafter.paths(packed, positions, documents, counted, features)
        logits = drafter.head(paths.hidden[paths.mask])
        loss = functional.cross_entropy(logits, labels[paths.steps[paths.mask]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


def make(family: str, **config: int) -> Features:
    torch.manual_seed(1)
    if family == "eagle":
        drafter = EagleDrafter(EagleConfig(**config), unroll=3, max_lost_coverage=1.0)
        return drafter.build(V, MODEL, torch.arange(V) % 7 + 1).eval()
    sizes = {"num_hidden_layers": 2, "mask_token_id": V - 1}
    if family == "dspark":
        corrected = DSparkConfig(**sizes, block_size=4, markov_rank=8)
        return DSparkDrafter(corrected, num_anchors=40).build(V, MODEL).eval()
    return BlockDrafter(BlockConfig(**sizes, block_size=5), num_anchors=40).build(V, MODEL).eval()


@pytest.fixture(scope="module")
def drafters(texts: list[list[int]]) -> dict[str, Features]:
    random = {family: make(family) for family in ("eagle", "block", "dspark")}
    for drafter in random.values():
        enlarge(drafter)
    reduced = make("eagle", draft_vocab_size=25)
    return {
        "eagle": trained(make("eagle"), texts),
        "block": trained(make("block"), texts),
        "dspark": trained(make("dspark"), texts),
        "eagle, 25 tokens": trained(reduced, texts),
        "random eagle": random["eagle"],
        "random block": random["block"],
        "random dspark": random["dspark"],
    }


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return [greedy(MODEL, prompt, NEW) for prompt in PROMPTS]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_targets_greedy_text(name: str, builder: str, drafters, texts) -> None:
    """A1."""
    target = TargetRunner(MODEL, drafters[name].taps)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        result = decode(target, drafters[name], prompt, BUILDERS[builder](), max_new_tokens=NEW)
        assert result.tokens == text


@pytest.mark.parametrize("family", ["eagle", "block"])
def test_garbage_changes_no_text(family: str, drafters, texts, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, generator = drafters[family], torch.Generator().manual_seed(0)

    def garbage(hidden: Tensor, weight: Tensor, **_: Any) -> Tensor:
        logits = torch.randn(*hidden.shape[:-1], len(weight), generator=generator)
        broken = torch.rand((), generator=generator) < 0.2
        return logits * torch.nan if broken else logits.round()

    if family == "eagle":
        monkeypatch.setattr("certdraft.drafters.eagle3.model.project_top", garbage)
    else:
        monkeypatch.setattr(drafter._project, "top", garbage, raising=False)
    target = TargetRunner(MODEL, drafter.taps)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        with pytest.warns(RuntimeWarning, match="not finite"):
            result = decode(target, drafter, prompt, BestFirst(7), max_new_tokens=NEW)
        assert result.tokens == text


def reference_rounds(drafter: Features, prompt: list[int], text: list[int], depth: int) -> list[int]:
    """Tokens committed per round of a chain, by the float64 definition on the true text, no cache."""
    ids, rounds, done = [*prompt, *text], [], 0
    features = features_of(ids, drafter.taps)
    while done < len(text):
        known = len(prompt) - 1 + done  # ids[known] is the root
        limit = min(depth, len(text) - done - 1)
        accepted = 0
        if drafter.family == "block":
            drafts = block_logits(drafter, ids[known], features[:known]).argmax(-1).tolist()
        while accepted < limit:
            following = ids[known + 1 : known + 1 + accepted]
            if isinstance(drafter, EagleDrafter):
                if known == 0:
                    break  # nothing to draft from: uniform, and the rounds below tell
                logits = eagle_logits(drafter, ids[: known + 1], features[:known], following)
                drafts = logits.argmax(-1).tolist()
            if isinstance(drafter, DSparkDrafter):
                logits, _ = dspark_drafts(drafter, ids[known], features[:known], following)
                drafts = logits.argmax(-1).tolist()
            if drafts[accepted] != ids[known + 1 + accepted]:
                break
            accepted += 1
        rounds.append(accepted + 1)
        done += accepted + 1
    return rounds


@pytest.mark.parametrize("name", ["eagle", "block", "dspark", "eagle, 25 tokens"])
def test_rounds_are_those_of_the_reference(name: str, drafters, texts) -> None:
    """Live loop against definition, number for number: the counts that a served drafter must reproduce."""
    drafter = drafters[name]
    results = []
    for prompt, text in zip(PROMPTS, texts, strict=True):
        if len(prompt) > 1:
            results.append(decode(MODEL, drafter, prompt, Chain(3), max_new_tokens=NEW))
            found = [r.committed for r in results[-1].rounds]
            assert found == reference_rounds(drafter, prompt, text, 3)
    assert acceptance_length(results) > 1.5, "a drafter that is never right shows nothing"


@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_validation_counts_the_live_rounds(family: str, drafters, texts) -> None:
    """val/tau_expected on greedy text is the chain's acceptance length, not a product of marginals."""
    from certdraft.train.validation import path_rounds

    drafter, prompt, text = drafters[family], PROMPTS[3], texts[3]
    live = decode(MODEL, drafter, prompt, Chain(3), max_new_tokens=NEW)
    ids = torch.tensor([[*prompt, *text]])
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = counted[:, -1] = False
    with torch.no_grad():
        paths = drafter.paths(
            ids, torch.arange(ids.shape[1])[None], torch.zeros_like(ids), counted,
            features_of(ids[0].tolist(), drafter.taps)[None], depth=3, every=True,
        )  # fmt: skip
        drafts = drafter.head(paths.hidden).argmax(-1)
    hits = (drafts == ids[0].roll(-1)[paths.steps]) & paths.mask
    assert path_rounds(hits.numpy()) == len(live.rounds)


@pytest.mark.parametrize("name", ["eagle", "block", "dspark"])
def test_state_is_that_of_the_committed_text(name: str, drafters, texts) -> None:
    """A5: after rounds of trees, the next draft is that of a drafter started afresh on the same text."""
    drafter, prompt, text = drafters[name], PROMPTS[2], texts[2]
    ids = [*prompt, *text]
    drafts: list[tuple[int, Tensor]] = []

    class Recorder:
        """Best-first trees, remembering what the drafter said at each root."""

        def __init__(self) -> None:
            self.inner = BestFirst(2, max_depth=1)

        def build(self, propose, root, *, max_depth, context=0):
            def watched(tokens, parents):
                logits = propose(tokens, parents)
                if list(parents) == [-1]:
                    drafts.append((context, logits[0]))
                return logits

            watched.kind = propose.kind
            return self.inner.build(watched, root, max_depth=max_depth, context=context)

    decode(MODEL, drafter, prompt, Recorder(), max_new_tokens=NEW)
    assert len(drafts) > 5
    assert any(later - earlier == 2 for (earlier, _), (later, _) in itertools.pairwise(drafts))
    features = features_of(ids, drafter.taps)
    for context, logits in drafts:
        state = drafter.start(ids[:context], features[:context])
        fresh = drafter.draft(state, [ids[context]], [-1])[0]
        torch.testing.assert_close(logits, fresh, rtol=1e-3, atol=1e-3)


def test_a_wrong_layer_is_seen(drafters, texts) -> None:
    """Layer ids off by one load, decode, and give the right text; only the counts tell."""
    drafter = drafters["eagle"]
    right = list(itertools.chain.from_iterable(
        [r.committed for r in decode(MODEL, drafter, p, Chain(3), max_new_tokens=NEW).rounds] for p in PROMPTS
    ))  # fmt: skip
    taps = drafter.taps
    try:
        drafter.taps = tuple(tap + 1 for tap in taps)
        wrong = [decode(MODEL, drafter, p, Chain(3), max_new_tokens=NEW) for p in PROMPTS]
    finally:
        drafter.taps = taps
    assert [result.tokens for result in wrong] == texts
    assert [r.committed for result in wrong for r in result.rounds] != right
