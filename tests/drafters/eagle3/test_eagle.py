"""EagleDrafter against EAGLE-3 written out plainly: unroll, cached decoding, leakage, draft vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.mathematics.rotary import LINEAR, LLAMA3, YARN
from oracles.models.decoding_models import tiny_qwen3
from oracles.models.feature_drafters import assert_checkpointing_changes_nothing, eagle_logits, enlarge
from torch import Tensor

from certdraft.drafters import EagleConfig, EagleDrafter
from certdraft.drafters.eagle3.draft_vocab import ABSENT, choose, coverage, from_tables, to_tables

V = 40
TARGET = tiny_qwen3(0, V, layers=7)
VARIANTS: list[dict[str, Any]] = [
    {"norm_before_residual": True},
    {"norm_before_fc": True, "norm_output": True, "rope_scaling": LLAMA3},
    {"fc_norm": True, "norm_before_residual": True, "norm_output": True, "rope_scaling": YARN},
    {"rope_scaling": LINEAR},
]
COUNTS = (torch.arange(V) * 37 % 101) + 1


def eagle(seed: int = 0, **config: Any) -> EagleDrafter:
    head = EagleDrafter(EagleConfig(**config), unroll=4, max_lost_coverage=1.0)
    drafter = head.build(V, TARGET, COUNTS).eval()
    enlarge(drafter, seed)
    return drafter


def text(num: int, seed: int = 0, layers: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(V, (num,), generator=generator),
        torch.randn(num, layers, TARGET.config.hidden_size, generator=generator),
    )


@pytest.mark.parametrize("config", [{}, {"draft_vocab_size": 25}, {"qk_norm": True}, *VARIANTS], ids=str)
def test_unroll_is_the_sequential_rollout(config: dict[str, Any]) -> None:
    """C1: depth d of the path from t is the draft after the true tokens t + 1 … t + d, in packed rows."""
    drafter = eagle(**config)
    ids, features = text(14)
    documents = torch.tensor([0] * 5 + [1] * 7 + [-1] * 2)
    positions = torch.tensor([*range(5), *range(7), 0, 1])
    counted = documents >= 0
    with torch.no_grad():
        paths = drafter.paths(ids[None], positions[None], documents[None], counted[None], features[None])
        logits = drafter.head(paths.hidden).double()
    assert paths.mask.sum() == sum(min(4, 5 - t) for t in range(1, 5)) + sum(
        min(4, 7 - t) for t in range(1, 7)
    )
    for path in range(len(paths.steps)):
        start = int(paths.steps[path, 0])
        first = 0 if start < 5 else 5
        assert start not in (0, 5), "the first token of a document has no features before it"
        for depth in range(int(paths.mask[path].sum())):
            assert paths.steps[path, depth] == start + depth
        drafted = ids[start + 1 : start + int(paths.mask[path].sum())].tolist()
        wanted = eagle_logits(drafter, ids[first : start + 1].tolist(), features[first:start], drafted)
        torch.testing.assert_close(
            logits[path, : len(wanted)], wanted, rtol=1e-4, atol=2e-4, msg=f"path from {start}"
        )


def test_hidden_is_the_first_step_of_the_unroll() -> None:
    drafter = eagle()
    ids, features = text(9)
    args = ids[None], torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        paths = drafter.paths(*args, torch.ones(1, 9, dtype=torch.bool), features[None])
        hidden = drafter.hidden(*args, features[None])
    torch.testing.assert_close(paths.hidden[:, 0], hidden[0, 1:])


def test_nothing_leaks() -> None:
    """A path reads tokens up to its draft and features before its root, within its document."""
    drafter = eagle()
    ids, features = text(12)
    args = (torch.arange(12)[None] % 6, (torch.arange(12)[None] // 6))
    counted = torch.ones(1, 12, dtype=torch.bool)

    def logits(ids: Tensor, features: Tensor) -> dict[tuple[int, int], Tensor]:
        with torch.no_grad():
            paths = drafter.paths(ids[None], *args, counted, features[None])
            found = drafter.head(paths.hidden)
        return {
            (int(p), d): found[i, d]
            for i, p in enumerate(paths.steps[:, 0])
            for d in range(int(paths.mask[i].sum()))
        }

    before = logits(ids, features)
    for changed in range(12):
        other = ids.clone()
        other[changed] = (ids[changed] + 1) % V
        for (start, depth), value in logits(other, features).items():
            reads = changed // 6 == start // 6 and start - start % 6 < changed <= start + depth
            assert torch.equal(value, before[start, depth]) != reads, (changed, start, depth)
        moved = features.clone()
        moved[changed] += 1
        for (start, depth), value in logits(ids, moved).items():
            reads = changed // 6 == start // 6 and changed < start
            assert torch.equal(value, before[start, depth]) != reads, (changed, start, depth)


@pytest.mark.parametrize("config", [{}, *VARIANTS], ids=str)
def test_decoding_is_the_reference_over_rounds(config: dict[str, Any]) -> None:
    """Cached trees, rounds of every shape: each node's logits are those of its root path (A3, A5)."""
    drafter = eagle(draft_vocab_size=33, **config)
    tokens, features = text(34)
    ids = tokens.tolist()
    generator = torch.Generator().manual_seed(5)
    known = 4  # committed tokens with features; ids[known] is the root
    state = drafter.start(ids[:known], features[:known])
    pending: list[int] = []
    for round_ in range(7):
        root = ids[known]
        chain = [*pending, root]
        logits = drafter.draft(state, chain, list(range(-1, len(chain) - 1)))
        wanted = eagle_logits(drafter, ids[: known + 1], features[:known], [])
        torch.testing.assert_close(logits[-1:].double(), wanted, rtol=1e-4, atol=2e-4, msg=f"round {round_}")
        # two levels: true next tokens and wrong ones, read over several calls
        front = len(chain) - 1
        true, wrong = ids[known + 1], (ids[known + 1] + 3) % V
        first = drafter.draft(state, [wrong, true], [front, front])
        second = drafter.draft(state, [ids[known + 2], 7], [front + 2, front + 1])
        for found, drafted in (
            (first[0], [wrong]), (first[1], [true]),
            (second[0], [true, ids[known + 2]]), (second[1], [wrong, 7]),
        ):  # fmt: skip
            wanted = eagle_logits(drafter, ids[: known + 1], features[:known], drafted)[-1]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-4)
        accepted = int(torch.randint(4, (), generator=generator))  # 3: one beyond what was read
        path = [*range(front + 1), *[front + 2, front + 3][:accepted]]
        drafter.commit(state, path, features[known : known + 1 + accepted])
        pending = ids[known + 3 : known + 4] if accepted == 3 else []
        known += 1 + accepted
    assert state.cache.length + len(state.waiting) + len(pending) == known - 1


def test_rounds_without_a_draft_and_abandoned_ones() -> None:
    drafter = eagle()
    tokens, features = text(20)
    ids = tokens.tolist()
    fresh = drafter.draft(drafter.start(ids[:9], features[:9]), [ids[9]], [-1])
    for begin in (0, 1, 5):
        state = drafter.start(ids[:begin], features[:begin])
        drafter.draft(state, [ids[begin]], [-1])
        drafter.commit(state, [])  # abandoned: nothing happened
        drafter.commit(state, [], features[begin : begin + 2])  # root and one more, neither of them read
        drafter.draft(state, ids[begin : begin + 3], [-1, 0, 1])
        drafter.commit(state, [0, 1, 2], features[begin + 2 : begin + 3])
        drafter.commit(state, [], features[begin + 3 : 9])
        again = drafter.draft(state, ids[begin + 3 : 10], list(range(-1, 9 - begin - 3)))
        torch.testing.assert_close(again[-1:], fresh, rtol=1e-4, atol=1e-4)


def test_misuse_is_refused() -> None:
    drafter = eagle()
    ids, features = text(6)
    with pytest.raises(ValueError, match="got no features"):
        drafter.start(ids)
    with pytest.raises(ValueError, match="expected"):
        drafter.start(ids, features[:, :2])
    state = drafter.start(ids[:3], features[:3])
    with pytest.raises(ValueError, match="as a chain"):
        drafter.draft(state, [1, 2], [0, -1])
    drafter.draft(state, [1], [-1])
    with pytest.raises(ValueError, match="only the first node"):
        drafter.draft(state, [1], [-1])
    with pytest.raises(ValueError, match="at least 1"):
        EagleDrafter(unroll=0)
    with pytest.raises(ValueError, match="call build"):
        EagleDrafter().vocab_size  # noqa: B018


def test_draft_vocabulary_round_trip() -> None:
    """C2: offsets, membership, coverage."""
    ids = choose(COUNTS, 30)
    assert len(ids) == 30
    assert COUNTS[ids].min() >= COUNTS[[i for i in range(V) if i not in ids.tolist()]].max()
    d2t, t2d = to_tables(ids, V)
    assert torch.equal(from_tables(d2t, t2d, V), ids)
    assert int(t2d.sum()) == 30
    found = coverage(COUNTS, ids)
    outside = [i for i in range(V) if not t2d[i]]
    assert found.lost == pytest.approx(int(COUNTS[outside].sum()) / int(COUNTS.sum()))
    assert found.missed[0][1] == int(COUNTS[outside].max())
    with pytest.raises(ValueError, match="Absolute ids"):
        from_tables(ids, t2d, V)
    with pytest.raises(ValueError, match="name different"):
        from_tables(d2t, t2d.roll(1), V)
    with pytest.raises(ValueError, match="draft_vocab_size"):
        choose(COUNTS, V + 1)
    drafter = eagle(draft_vocab_size=30)
    assert torch.equal(drafter.draft_ids, ids)
    logits = drafter.head(torch.randn(2, TARGET.config.hidden_size))
    assert (logits[:, outside] == -1e4).all()
    assert logits.shape == (2, V)


def test_narrow_logits_are_those_of_the_draft_vocabulary() -> None:
    drafter = eagle(draft_vocab_size=30)
    ids, features = text(6)
    whole, narrow = (
        draft(drafter.start(ids[:-1], features[:-1]), [int(ids[-1]), 3], [-1, 0])
        for draft in (drafter.draft, drafter.draft_narrow)
    )
    assert narrow.shape == (2, 30)
    assert torch.equal(narrow, whole[:, drafter.draft_ids])
    assert int((whole > ABSENT).sum()) == narrow.numel()


def test_target_parts_stay_outside_the_state_dict() -> None:
    drafter = eagle()
    assert not any("embed" in name for name in drafter.state_dict())
    assert drafter.ends.embeddings.data_ptr() == TARGET.get_input_embeddings().weight.data_ptr()
    assert all(parameter.requires_grad for parameter in drafter.parameters())
    drafter.to(torch.bfloat16)
    assert drafter.embed(torch.tensor([1])).dtype == torch.bfloat16
    assert TARGET.get_input_embeddings().weight.dtype == torch.float32


def test_gradient_checkpointing_changes_nothing() -> None:
    assert_checkpointing_changes_nothing(eagle().train(), *text(10))
