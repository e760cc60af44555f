"""BlockDrafter against DFlash written out plainly: training blocks, cached decoding, visibility, anchors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.mathematics.rotary import YARN
from oracles.models.decoding_models import tiny_qwen3
from oracles.models.feature_drafters import (
    assert_checkpointing_changes_nothing,
    block_logits,
    enlarge,
    packed_paths,
)
from torch import Tensor

from certdraft.drafters import BlockConfig, BlockDrafter
from certdraft.drafters.dflash.model import sample_anchors, stretch

V = 40
TARGET = tiny_qwen3(0, V, layers=6)
MIXED = ("sliding_attention", "full_attention")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"layer_types": MIXED, "sliding_window": 3},
    {"layer_types": MIXED[::-1], "sliding_window": 2, "causal": False},
    {"layer_types": MIXED[:1] * 2, "sliding_window": 7, "causal": True},
    {"causal": True, "rope_scaling": YARN},
]


def block(seed: int = 0, num_anchors: int = 512, **config: Any) -> BlockDrafter:
    config = {"num_hidden_layers": 2, "block_size": 5, "mask_token_id": V - 1} | config
    drafter = BlockDrafter(BlockConfig(**config), num_anchors=num_anchors).build(V, TARGET).eval()
    enlarge(drafter, seed)
    return drafter


def text(num: int, seed: int = 0, layers: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(V - 1, (num,), generator=generator),
        torch.randn(num, layers, TARGET.config.hidden_size, generator=generator),
    )


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_training_blocks_are_the_reference(every: bool, config: dict[str, Any]) -> None:
    """B1 with the definition: every block of a packed row, from its context alone."""
    drafter = block(**config)
    ids, features = text(13)
    with torch.no_grad():
        paths = packed_paths(drafter, ids, features, every)
        logits = drafter.head(paths.hidden).double()
    assert sorted(paths.steps[:, 0].tolist()) == list(range(11))
    for path in range(len(logits)):
        start = int(paths.steps[path, 0])
        first, last = (0, 5) if start < 5 else (5, 11)
        assert paths.mask[path].tolist() == [start + d < last for d in range(4)]
        wanted = block_logits(drafter, int(ids[start]), features[first:start])
        torch.testing.assert_close(logits[path], wanted, rtol=1e-4, atol=2e-4, msg=f"anchor {start}")


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_decoding_is_the_training_forward(config: dict[str, Any]) -> None:
    """B1, A5: the cached draft equals the packed one at every round, however the text was committed."""
    drafter = block(**config)
    ids, features = text(16)
    args = ids[None], torch.arange(16)[None], torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        paths = drafter.paths(*args, torch.ones(1, 16, dtype=torch.bool), features[None], every=True)
        wanted = drafter.head(paths.hidden)
    state = drafter.start(ids[:2], features[:2])
    known = 2
    for num, drafted in ((1, True), (3, True), (2, False), (4, True), (1, True)):
        if drafted:
            found = drafter.draft(state, [3, int(ids[known])], [-1, 0])  # what precedes the root is not read
            torch.testing.assert_close(found, wanted[known], rtol=1e-4, atol=1e-4)
            drafter.commit(state, [])
            again = drafter.draft(state, [int(ids[known])], [-1])
            assert torch.equal(found, again)
        drafter.commit(state, [0] if drafted else [], features[known : known + num])
        known += num
    torch.testing.assert_close(
        drafter.draft(state, [int(ids[known])], [-1]),
        drafter.draft(drafter.start(ids[:known], features[:known]), [int(ids[known])], [-1]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_hidden_is_the_first_position_of_every_block() -> None:
    drafter = block()
    ids, features = text(70)  # more than one slice of anchors
    with torch.no_grad():
        hidden = drafter.hidden(ids[None], features=features[None])
        paths = drafter.paths(
            ids[None], torch.arange(70)[None], torch.zeros(1, 70, dtype=torch.long),
            torch.ones(1, 70, dtype=torch.bool), features[None],
        )  # fmt: skip
    torch.testing.assert_close(paths.hidden[:, 0], hidden[0])


def test_nothing_leaks() -> None:
    """B2: a block reads its anchor and the features strictly before it, of its document; no other block."""
    drafter = block()
    ids, features = text(12)
    args = (torch.arange(12)[None] % 6, torch.arange(12)[None] // 6, torch.ones(1, 12, dtype=torch.bool))

    def logits(ids: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            return drafter.head(drafter.paths(ids[None], *args, features[None]).hidden)

    before = logits(ids, features)
    for changed in range(12):
        other = ids.clone()
        other[changed] = (ids[changed] + 1) % (V - 1)
        for start, value in enumerate(logits(other, features)):
            assert torch.equal(value, before[start]) != (changed == start), (changed, start)
        moved = features.clone()
        moved[changed] += 1
        for start, value in enumerate(logits(ids, moved)):
            reads = changed // 6 == start // 6 and changed < start
            assert torch.equal(value, before[start]) != reads, (changed, start)


def test_anchors_are_drawn_from_counted_steps() -> None:
    torch.manual_seed(0)
    eligible = torch.rand(3, 40) < 0.5
    eligible[2] = False
    eligible[2, [3, 9]] = True
    seen = torch.zeros_like(eligible)
    for _ in range(50):
        anchors, chosen = sample_anchors(eligible, 6)
        assert anchors.shape == (3, 6)
        assert (anchors.diff(dim=-1) > 0).all()
        assert chosen.sum(-1).tolist() == [6, 6, 2]
        seen.scatter_(1, anchors, chosen)
    assert torch.equal(seen, eligible), "every counted step has its turn, no other has"
    torch.manual_seed(4)
    one = sample_anchors(eligible, 6)[0]
    torch.manual_seed(4)
    assert torch.equal(one, sample_anchors(eligible, 6)[0])


def test_few_anchors_are_rows_of_the_whole() -> None:
    drafter = block(num_anchors=3)
    ids, features = text(12)
    args = ids[None], torch.arange(12)[None], torch.zeros(1, 12, dtype=torch.long), torch.arange(12)[None] > 4
    with torch.no_grad():
        whole = drafter.paths(*args, features[None], every=True)
        some = drafter.paths(*args, features[None])
    assert len(some.steps) == 3
    index = [whole.steps[:, 0].tolist().index(s) for s in some.steps[:, 0].tolist()]
    torch.testing.assert_close(some.hidden, whole.hidden[index])


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("depth", [None, 2])
def test_only_eligible_positions_are_drafted_from(depth: int | None, config: dict[str, Any]) -> None:
    """Drafts are those of blocks at every token, at the price of the longest row's eligible ones."""
    drafter = block(**config)
    num = 150
    ids, features = (torch.stack(part) for part in zip(text(num, 1), text(num, 2), strict=True))
    documents = torch.arange(num).div(40, rounding_mode="floor").expand(2, -1)
    mask = torch.rand(2, num, generator=torch.Generator().manual_seed(3)) < torch.tensor([[0.2], [0.6]])
    args = ids, torch.arange(num).remainder(40).expand(2, -1), documents
    tokens: list[int] = []
    drafter.layers[0].mlp.register_forward_hook(lambda _, given, __: tokens.append(given[0].shape[1]))
    with torch.no_grad():
        whole = drafter.paths(*args, torch.ones_like(mask), features, every=True)
        assert sum(tokens) == num * 5
        tokens.clear()
        some = drafter.paths(*args, mask, features, depth, every=True)
    size = 3 if config.get("causal") and depth else 5  # a later mask of such a block is seen by nobody
    assert sum(tokens) == int(mask.sum(-1).max()) * size
    starts = mask.flatten().nonzero().flatten()
    assert torch.equal(some.steps[:, 0], starts)
    torch.testing.assert_close(some.hidden, whole.hidden[starts][:, :depth], rtol=1e-4, atol=1e-5)


def test_a_stretch_gives_every_position_its_turn() -> None:
    eligible = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    first, second = eligible.sum(-1).tolist()
    kept = torch.zeros(2, 40)
    for start in range(first * second):
        mask = stretch(eligible, torch.tensor([start, 7 * start]), 6)
        assert mask.sum(-1).tolist() == [6, 6]
        places = torch.nonzero(mask[0][eligible[0]]).flatten().tolist()
        assert places == sorted((start + i) % first for i in range(6))
        kept += mask
    assert torch.equal(kept, torch.where(eligible, torch.tensor([[6.0 * second], [6.0 * first]]), 0.0))
    assert torch.equal(stretch(eligible, torch.tensor([3, 5]), 40), eligible)
    assert not stretch(torch.zeros_like(eligible), torch.tensor([3, 5]), 4).any()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="mask_token_id is None"):
        BlockDrafter(BlockConfig(num_hidden_layers=2)).build(V, TARGET)
    with pytest.raises(ValueError, match="row of the target's embedding"):
        BlockDrafter(BlockConfig(num_hidden_layers=2, mask_token_id=V)).build(V, TARGET)
    with pytest.raises(ValueError, match="at least 1, 2 and 1"):
        BlockDrafter(BlockConfig(block_size=1))
    with pytest.raises(ValueError, match="hidden_size is 8"):
        BlockDrafter(BlockConfig(hidden_size=8, num_hidden_layers=2, mask_token_id=0)).build(V, TARGET)
    with pytest.raises(ValueError, match="layers 0 to 5"):
        BlockDrafter(BlockConfig(target_layer_ids=(1, 5), mask_token_id=0)).build(V, TARGET)
    with pytest.raises(ValueError, match="ascending"):
        BlockDrafter(BlockConfig(target_layer_ids=(3, 1), mask_token_id=0)).build(V, TARGET)
    drafter = block()
    state = drafter.start([])
    with pytest.raises(ValueError, match="one chain"):
        drafter.draft(state, [1, 2], [-1, -1])
    with pytest.raises(ValueError, match="got no features"):
        drafter.commit(state, [0])


def test_small_targets_clamp_the_layers_and_say_so() -> None:
    with pytest.warns(RuntimeWarning, match="too small"):
        drafter = BlockDrafter(BlockConfig(num_hidden_layers=3, mask_token_id=0)).build(
            V, tiny_qwen3(0, V, layers=4)
        )
    assert drafter.taps == (1,)
    assert drafter.fc.in_features == 32


def test_weights_train_and_the_targets_do_not() -> None:
    drafter = block().train()
    assert_checkpointing_changes_nothing(drafter, *text(10))
    assert not drafter.head_weight.requires_grad
    assert not any("embed" in name or "lm_head" in name for name in drafter.state_dict())
