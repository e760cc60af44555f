"""DSparkDrafter against DSpark written out plainly: training blocks, decoding by node, confidence, cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles.models.decoding_models import tiny_qwen3
from oracles.models.feature_drafters import dspark_drafts, enlarge, packed_paths
from torch import Tensor

from certdraft.decoding import Chain, CutChain, TargetRunner, decode, greedy
from certdraft.drafters import BlockConfig, BlockDrafter, DSparkConfig, DSparkDrafter

V = 40
TARGET = tiny_qwen3(0, V, layers=6)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"sample_from_anchor": False},
    {"confidence_head_with_markov": False},
    {"enable_confidence_head": False, "markov_rank": 1},
]


def dspark(seed: int = 0, num_anchors: int = 512, **config: Any) -> DSparkDrafter:
    config = {"num_hidden_layers": 2, "block_size": 5, "mask_token_id": V - 1, "markov_rank": 6} | config
    drafter = DSparkDrafter(DSparkConfig(**config), num_anchors=num_anchors).build(V, TARGET).eval()
    enlarge(drafter, seed)
    return drafter


def text(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(V - 1, (num,), generator=generator),
        torch.randn(num, 2, TARGET.config.hidden_size, generator=generator),
    )


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_training_blocks_are_the_reference(every: bool, config: dict[str, Any]) -> None:
    """Every block of a packed row from its context alone, each draft token after the true one before it."""
    drafter = dspark(**config)
    depth = drafter.max_draft_length
    ids, features = text(13)
    with torch.no_grad():
        paths = packed_paths(drafter, ids, features, every)
        logits = drafter.head(paths.hidden).double()
        sure = drafter.confidence(paths.hidden).sigmoid().double() if drafter.confidence_weight else None
    assert sorted(paths.steps[:, 0].tolist()) == list(range(11))
    assert paths.mask.shape[1] == depth == (4 if config.get("sample_from_anchor") is False else 5)
    for path in range(len(logits)):
        start = int(paths.steps[path, 0])
        first, last = (0, 5) if start < 5 else (5, 11)
        counted = [start + d < last for d in range(depth)]
        assert paths.mask[path].tolist() == counted
        following = ids[start + 1 : start + sum(counted)].tolist()
        wanted, chances = dspark_drafts(drafter, int(ids[start]), features[first:start], following)
        torch.testing.assert_close(logits[path][: sum(counted)], wanted, rtol=1e-4, atol=2e-4)
        if sure is not None:
            torch.testing.assert_close(sure[path][: sum(counted)], chances, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_nodes_are_the_reference(config: dict[str, Any]) -> None:
    """A tree drafted in several calls, after rounds that committed more, less and nothing."""
    drafter = dspark(**config)
    ids, features = text(16)
    state = drafter.start(ids[:2], features[:2])
    known = 2
    for num, pending in ((1, 0), (3, 2), (2, 1), (4, 0)):
        front = [*ids[known - pending : known].tolist(), int(ids[known])]
        logits = drafter.draft(state, front, range(-1, len(front) - 1))
        assert len(logits) == len(front)
        assert bool(logits[:-1].isnan().all()), "rows of committed tokens are nobody's"
        sure = [] if state.confidence is None else [state.confidence[-1:]]
        rows, paths, numbers = [logits[-1:]], [[]], [pending]
        for level in ([(7, 0), (8, 0)], [(9, 1), (9, 2), (3, 1)], [(4, 3)]):
            tokens, above = [token for token, _ in level], [parent for _, parent in level]
            rows.append(drafter.draft(state, tokens, [numbers[parent] for parent in above]))
            sure += [] if state.confidence is None else [state.confidence]
            paths += [[*paths[parent], token] for token, parent in level]
            numbers += range(numbers[-1] + 1, numbers[-1] + 1 + len(level))
        for node, (row, path) in enumerate(zip(torch.cat(rows), paths, strict=True)):
            wanted, chances = dspark_drafts(drafter, int(ids[known]), features[:known], path)
            torch.testing.assert_close(row.double(), wanted[-1], rtol=1e-4, atol=2e-4)
            if sure:
                torch.testing.assert_close(torch.cat(sure)[node].double(), chances[-1], rtol=1e-4, atol=1e-5)
        drafter.commit(state, [0], features[known : known + num])
        assert state.confidence is None
        known += num


def test_without_its_correction_it_is_a_block_drafter() -> None:
    drafter = dspark(sample_from_anchor=False, enable_confidence_head=False)
    drafter.markov_head.markov_w2.weight.data.zero_()
    block = BlockDrafter(BlockConfig(num_hidden_layers=2, block_size=5, mask_token_id=V - 1)).build(V, TARGET)
    block.load_state_dict({k: v for k, v in drafter.state_dict().items() if "markov" not in k})
    ids, features = text(9)
    args = ids[None], torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9).bool()
    with torch.no_grad():
        mine = drafter.head(drafter.paths(*args, features[None], every=True).hidden)
        theirs = block.eval().head(block.paths(*args, features[None], every=True).hidden)
    assert torch.equal(mine, theirs)


def test_losses_see_one_head() -> None:
    """`head_weight` gives `head`'s logits, so that chunked losses and whole ones agree."""
    drafter = dspark()
    ids, features = text(9)
    with torch.no_grad():
        hidden = drafter.hidden(ids[None], features=features[None])[0]
        torch.testing.assert_close(hidden @ drafter.head_weight.T, drafter.head(hidden), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert drafter.head_weight.dtype == torch.bfloat16
    first = drafter.draft(drafter.start(ids[:8], features[:8]), [int(ids[8])], [-1])[0]
    torch.testing.assert_close(drafter.head(hidden)[8], first, rtol=1e-4, atol=1e-4)


def test_every_weight_trains_and_the_targets_do_not() -> None:
    drafter = dspark().train()
    ids, features = text(10)
    args = ids[None], torch.arange(10)[None], torch.zeros(1, 10, dtype=torch.long), torch.ones(1, 10).bool()
    hidden = drafter.paths(*args, features[None]).hidden
    head = drafter.head_weight
    loss = (hidden @ head.T).square().mean() + drafter.confidence(hidden).square().mean()
    loss.backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert drafter.ends.head.grad is None
    assert drafter.ends.embeddings.grad is None
    assert not any("embed" in name or "lm_head" in name for name in drafter.state_dict())


def test_a_fresh_one_starts_near_a_block_drafter() -> None:
    torch.manual_seed(0)
    drafter = DSparkDrafter(DSparkConfig(num_hidden_layers=2, mask_token_id=V - 1)).build(V, TARGET)
    with torch.no_grad():
        bias = drafter.markov_head.markov_w2(drafter.markov_head(torch.arange(V)))
    assert 0 < float(bias.std()) < 0.05
    assert drafter.confidence_head.proj.bias.tolist() == [0.0]


PROMPTS = [[1, 2, 3], [7], [30, 31, 32, 33, 34, 35, 36]]


def test_a_cut_chain_is_a_chain_until_its_first_doubtful_token() -> None:
    """What is verified is what a threshold leaves of the whole chain; the text is the target's."""
    drafter = dspark()
    target = TargetRunner(TARGET, drafter.taps)
    lengths = set()
    for prompt in PROMPTS:
        wanted = greedy(target, prompt, 20)
        whole = decode(target, drafter, prompt, CutChain(5, 0.0), max_new_tokens=20)
        assert whole.tokens == wanted
        plain = decode(target, drafter, prompt, Chain(5), max_new_tokens=20)
        assert [r.nodes for r in whole.rounds] == [r.nodes for r in plain.rounds]
        for threshold in (0.3, 0.6, 1.0):
            found = decode(target, drafter, prompt, CutChain(5, threshold), max_new_tokens=20)
            assert found.tokens == wanted
            lengths |= {r.nodes for r in found.rounds}
        assert {r.nodes for r in found.rounds} == {0}, "nothing is as sure as that"
    assert len(lengths) > 2


def test_a_cut_is_where_the_reference_says() -> None:
    drafter = dspark()
    ids, features = text(9)
    builder, seen = CutChain(5, 0.5), []

    class Propose:
        kind = "conditional"

        def __init__(self) -> None:
            self.state = drafter.start(ids[:-1], features[:-1])

        def __call__(self, tokens: list[int], parents: list[int]) -> Tensor:
            logits = drafter.draft(self.state, tokens, parents)
            self.confidence = self.state.confidence
            seen.append(float(self.confidence[-1]))
            return logits

    tree = builder.build(Propose(), int(ids[-1]), max_depth=8)
    drafted = list(tree.tokens[1:])
    wanted, chances = dspark_drafts(drafter, int(ids[-1]), features[:-1], drafted)
    assert drafted == wanted.argmax(-1).tolist()[: len(drafted)]
    sure = (chances >= 0.5).tolist()
    assert len(drafted) == (sure.index(False) if False in sure else 5)
    torch.testing.assert_close(torch.tensor(seen).double(), chances[: len(seen)], rtol=1e-4, atol=1e-5)


def test_depths_end_with_the_block() -> None:
    """Builders that ask for more get what the block has."""
    drafter = dspark(block_size=3)
    target = TargetRunner(TARGET, drafter.taps)
    found = decode(target, drafter, PROMPTS[0], Chain(8), max_new_tokens=20)
    assert found.tokens == greedy(target, PROMPTS[0], 20)
    assert max(r.depth for r in found.rounds) == 3


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="without windows"):
        DSparkConfig(num_hidden_layers=1, layer_types=("sliding_attention",), sliding_window=4)
    with pytest.raises(ValueError, match="both directions"):
        DSparkConfig(causal=True)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        DSparkConfig(block_size=2, sample_from_anchor=False)
    with pytest.raises(ValueError, match="markov_rank is 0"):
        DSparkConfig(markov_rank=0)
    with pytest.raises(ValueError, match="enable_confidence_head: false"):
        DSparkDrafter(confidence_weight=0.0)
    with pytest.raises(ValueError, match="not both"):
        DSparkDrafter(DSparkConfig(), pretrained="x")
    drafter = dspark(enable_confidence_head=False)
    ids, features = text(3)
    with pytest.raises(ValueError, match="no confidence head"):
        drafter.confidence(torch.zeros(1, 38))
    with pytest.raises(ValueError, match="this drafter has none"):
        decode(TARGET, drafter, [1], CutChain(), max_new_tokens=4)
    with pytest.raises(ValueError, match="probability"):
        CutChain(3, 1.5)
    state = drafter.start(ids[:2], features[:2])
    with pytest.raises(ValueError, match="one chain that ends in its root"):
        drafter.draft(state, [1, 2], [-1, -1])
    drafter.draft(state, [1, 2], [-1, 0])
    with pytest.raises(ValueError, match="only the first node"):
        drafter.draft(state, [1], [0])
    for depth in range(4):
        drafter.draft(state, [1], [depth + 1])
    with pytest.raises(ValueError, match="this block drafts 5 tokens"):
        drafter.draft(state, [1], [5])
