"""flex_attention block masks against the attention that runs anywhere, in value and gradient.

A CPU has no kernels for them: compiled copies run torch's own reference here, which reads the mask's function
and not its lists of blocks, so those are tested apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.models.decoding_models import tiny_qwen3
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from certdraft.drafters import BlockConfig, BlockDrafter, CausalDrafter, Drafter, EagleConfig, EagleDrafter
from certdraft.drafters.features import flex, visible_spans
from certdraft.drafters.features.flex import grouped_flex_attention, joined, use_block_masks
from certdraft.drafters.features.grouped_attention import grouped_attention
from certdraft.drafters.features.visible_spans import VisibleSpans, document_block_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor"
    ),  # dynamo looks; it hides the warning
]
V = 40
TARGET = tiny_qwen3(0, V, layers=7)
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [2] * 20])
POSITIONS = torch.tensor([[*range(7), *range(9), *range(4)], [*range(20)]])
WINDOWS: dict[str, Any] = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Let this CPU take block masks as CUDA does, backward passes too; the graphs that are made."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    monkeypatch.setitem(flex._BACKENDS, "cpu", backend)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    return made


def spans(groups: int, queries: int, own: int, num: int, windows: bool, rows: int = 2) -> VisibleSpans:
    """Runs of random lengths at random places; without own keys none is empty."""
    stop = torch.randint(0 if own else 1, num + 1, (rows, groups))
    start = (torch.rand(rows, groups, 1) * stop[..., None]).long()
    if windows:
        start = torch.maximum(start, stop[..., None] - 9 + torch.arange(queries))
    return VisibleSpans(start, stop, torch.ones(queries, own, dtype=torch.bool).tril() if windows else None)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(
    ("groups", "queries", "own"), [(19, 1, 0), (19, 1, 3), (5, 4, 4), (33, 2, 1), (300, 1, 2)]
)
def test_groups_as_one_flex_call(groups: int, queries: int, own: int, windows: bool) -> None:
    torch.manual_seed(groups)
    windows = windows and own >= queries
    rows, heads, kv, num, size = 2, 4, 2, 37, 8
    visible = spans(groups, queries, own, num, windows)
    shapes = [(rows, heads, groups, queries, size), *[(rows, kv, num, size)] * 2]
    shapes += [(rows, kv, groups, own, size)] * 2 if own else []
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    with torch.no_grad():
        pair = tuple(inputs[3:]) if own else None
        expected = grouped_attention(inputs[0], (inputs[1], inputs[2]), pair, visible)
        flexed = grouped_flex_attention(inputs[0], (inputs[1], inputs[2]), pair, visible)
    torch.testing.assert_close(flexed, expected, atol=1e-6, rtol=1e-6)

    def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        """The same mask, read entry by entry: flex_attention has no backward pass on a CPU."""
        keys, values = joined((k, v), (rest[0], rest[1]) if rest else None)
        sees = visible.block_mask(queries, num, own).mask_mod
        mask = create_mask(sees, rows, 1, groups * queries, keys.shape[2], device="cpu")
        mixed = functional.scaled_dot_product_attention(
            q.flatten(2, 3), keys, values, attn_mask=mask, enable_gqa=True
        )
        return mixed.unflatten(2, (groups, queries))

    def grouped(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return grouped_attention(q, (k, v), (rest[0], rest[1]) if rest else None, visible)

    gradients = []
    for attend in (grouped, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad((attend(*leaves) * upstream).sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(
    ("groups", "queries", "own", "num"),
    [(300, 1, 0, 300), (300, 1, 3, 300), (70, 5, 5, 513), (128, 2, 128, 256), (3, 2, 2, 2)],
)
def test_blocks_hold_all_that_is_seen(groups: int, queries: int, own: int, num: int, windows: bool) -> None:
    """Kernels read no block that is not listed, and do not ask the mask in one that is listed as full."""
    torch.manual_seed(num)
    mask = spans(groups, queries, own, num, windows and own >= queries).block_mask(queries, num, own)
    num_queries, num_keys = mask.seq_lengths
    assert (num_queries, num_keys) == (groups * queries, num + groups * own)
    seen = create_mask(mask.mask_mod, 2, 1, num_queries, num_keys, device="cpu")
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    partial, full = (_entries(counts, indices)[..., :num_queries, :num_keys] for counts, indices in lists)
    assert not (partial & full).any()
    assert not (seen & ~(partial | full)).any()
    assert not (full & ~seen).any()
    backward = ((mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices))
    for (counts, indices), blocks in zip(backward, (partial, full), strict=True):
        assert torch.equal(_entries(counts, indices).mT[..., :num_queries, :num_keys], blocks)


def _entries(counts: Tensor, indices: Tensor) -> Tensor:
    """A list of blocks as a mask of entries."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    blocks = torch.zeros_like(listed).scatter(-1, indices.long(), listed)
    return blocks.repeat_interleave(128, -1).repeat_interleave(128, -2)


def test_blocks_of_documents_are_those_of_torch() -> None:
    documents = torch.tensor([[0] * 100 + [1] * 300 + [2] * 30 + [-1] * 70, [4] * 500])

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    wanted, found = create_block_mask(sees, 2, None, 500, 500, device="cpu"), document_block_mask(documents)
    for name in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(found, f"{name}_num_blocks"), getattr(wanted, f"{name}_num_blocks"))
        assert torch.equal(getattr(found, f"{name}_indices"), getattr(wanted, f"{name}_indices"))
    assert torch.equal(
        create_mask(found.mask_mod, 2, 1, 500, 500, device="cpu"),
        create_mask(sees, 2, 1, 500, 500, device="cpu"),
    )


class Largest(TorchDispatchMode):
    """The most entries of any tensor made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return out


def test_no_mask_of_every_query_and_key() -> None:
    num = 4096
    with Largest() as largest:
        document_block_mask(torch.zeros(1, num, dtype=torch.long))
        start, stop = torch.zeros(1, num, 1, dtype=torch.long), torch.arange(1, num + 1)[None]
        VisibleSpans(start, stop).block_mask(1, num, 3)
    assert largest.entries < 16 * num


def text(rows: int, layers: int = 3) -> tuple[Tensor, ...]:
    """Packed rows for `Drafter.paths`."""
    features = torch.randn(rows, 20, layers, TARGET.config.hidden_size)
    return (
        torch.randint(V - 1, (rows, 20)),
        POSITIONS[:rows],
        DOCUMENTS[:rows],
        DOCUMENTS[:rows] >= 0,
        features,
    )


def built(name: str, checkpointing: bool = False) -> Drafter:
    """A drafter of each kind, its attention the name of the callers of its layers."""
    torch.manual_seed(1)
    options = {"short_until": 0.0, "gradient_checkpointing": checkpointing}
    if name == "eagle":
        return EagleDrafter(EagleConfig(), unroll=4, **options).build(V, TARGET)
    sizes = {"num_hidden_layers": 2, "block_size": 5, "mask_token_id": V - 1, "target_layer_ids": (1, 3, 5)}
    return BlockDrafter(BlockConfig(**sizes, **WINDOWS), **options).build(V, TARGET)


@pytest.mark.parametrize(("name", "masks"), [("eagle", 4), ("block", 2)])
def test_training_through_block_masks(
    name: str, masks: int, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of a step; a mask is made once a step or view, not again when layers rerun."""
    made = []
    original = visible_spans.span_block_mask
    monkeypatch.setattr(visible_spans, "span_block_mask", lambda *args: made.append(1) or original(*args))
    results = []
    for block_masks in (True, False):
        if not block_masks:
            assert (len(made), len(graphs) > 0) == (masks, True)
            monkeypatch.delitem(flex._BACKENDS, "cpu")
        drafter = built(name, checkpointing=block_masks)
        torch.manual_seed(2)
        hidden = drafter.paths(*text(2)).hidden
        hidden.square().mean().backward()
        results.append([hidden, *(x.grad for x in drafter.parameters() if x.grad is not None)])
    for flexed, plain in zip(*results, strict=True):
        torch.testing.assert_close(flexed, plain, atol=1e-5, rtol=1e-4)


def test_each_caller_has_a_limit_of_graphs_to_itself(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of every kind, one row and two, with gradients and without; torch's limit is 8 for all."""
    monkeypatch.setattr(flex, "_MOST_GRAPHS", 10)
    for name in ("eagle", "block"):
        drafter = built(name)
        for rows in (2, 1):
            drafter.paths(*text(rows)).hidden.sum().backward()
            with torch.inference_mode():
                drafter.paths(*text(rows), every=True)
                drafter.hidden(*text(rows)[:3], text(rows)[4])
    assert 10 < len(graphs) < 16
    graphs.clear()
    built("eagle").paths(*text(2), depth=3).hidden.sum().backward()
    assert not graphs, "what was compiled is used again"


def test_beyond_the_limit_of_graphs_is_an_error(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled flex_attention holds all scores: it would run out of memory, or be slow without a word."""
    monkeypatch.setattr(flex, "_MOST_GRAPHS", 2)
    drafter = built("eagle")
    drafter.paths(*text(2), depth=2)
    assert len(graphs) == 2
    with torch.no_grad(), pytest.raises(FailOnRecompileLimitHit):
        drafter.paths(*text(2))


def test_packed_documents_of_a_causal_drafter(make_drafter: Callable[..., CausalDrafter]) -> None:
    """Block masks give the hidden states of additive masks, and decoding goes on as before."""
    drafter = make_drafter(seed=3).eval()
    ids = torch.randint(0, drafter.vocab_size, (2, 20))
    with torch.no_grad():
        expected = drafter.hidden(ids, POSITIONS, DOCUMENTS)
        plain = drafter.draft(drafter.start(ids[0, :5]), [1, 2, 3], [-1, 0, 0])
        use_block_masks(drafter.model)
        output = drafter.model.base_model(
            input_ids=ids, position_ids=POSITIONS, attention_mask=document_block_mask(DOCUMENTS),
            use_cache=False,
        )  # fmt: skip
        after = drafter.draft(drafter.start(ids[0, :5]), [1, 2, 3], [-1, 0, 0])
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, plain)


def test_autocast_gives_queries_keys_and_values_one_type(
    make_drafter: Callable[..., CausalDrafter], graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms of an fp32 network leave queries and keys in fp32 beside bf16 values."""
    ids = torch.randint(0, 96, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        flexed = make_drafter(seed=3).hidden(ids, POSITIONS, DOCUMENTS)
        flexed.float().square().mean().backward()
        monkeypatch.delitem(flex._BACKENDS, "cpu")
        plain = make_drafter(seed=3).hidden(ids, POSITIONS, DOCUMENTS)
    inputs = [node.meta["example_value"] for node in graphs[0].graph.nodes if node.op == "placeholder"]
    floats = [x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    assert floats == [torch.bfloat16] * 3
    torch.testing.assert_close(flexed, plain, atol=0.1, rtol=0.1)
