"""flex_attention block masks against the attention that runs anywhere, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_mask

from certdraft.drafters import CausalDrafter
from certdraft.drafters.features.flex import (
    document_block_mask,
    grouped_flex_attention,
    joined_keys,
    use_block_masks,
)
from certdraft.drafters.features.grouped_attention import grouped_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize(("groups", "queries", "own"), [(19, 1, 0), (19, 1, 3), (5, 4, 4), (33, 2, 1)])
def test_groups_as_one_flex_call(groups: int, queries: int, own: int, windows: bool) -> None:
    torch.manual_seed(groups)
    rows, heads, kv, num, size = 2, 4, 2, 37, 8
    visible = torch.rand(rows, groups, num) < 0.4
    visible[..., 0] = True
    shapes = [(rows, heads, groups, queries, size), *[(rows, kv, num, size)] * 2]
    shapes += [(rows, kv, groups, own, size)] * 2 if own else []
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    hidden = ()
    if windows and own:
        last = torch.randint(num, (rows, groups, 1)) + torch.arange(queries)
        hidden = (last - 9, torch.ones(queries, own, dtype=torch.bool).tril())
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    with torch.no_grad():
        pair = tuple(inputs[3:]) if own else None
        expected = grouped_attention(inputs[0], (inputs[1], inputs[2]), pair, visible, *hidden)
        flexed = grouped_flex_attention(inputs[0], (inputs[1], inputs[2]), pair, visible, *hidden)
    torch.testing.assert_close(flexed, expected, atol=1e-6, rtol=1e-6)

    def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        """The same mask, read entry by entry: flex_attention has no backward pass on a CPU."""
        pair = (rest[0], rest[1]) if rest else None
        keys, values, sees = joined_keys((k, v), pair, visible, queries, *hidden)
        mask = create_mask(sees, rows, 1, groups * queries, keys.shape[2], device="cpu")
        mixed = functional.scaled_dot_product_attention(
            q.flatten(2, 3), keys, values, attn_mask=mask, enable_gqa=True
        )
        return mixed.unflatten(2, (groups, queries))

    def grouped(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return grouped_attention(q, (k, v), (rest[0], rest[1]) if rest else None, visible, *hidden)

    gradients = []
    for attend in (grouped, dense):
        leaves = [x.clone().requires_grad_() for x in inputs]
        gradients.append(torch.autograd.grad((attend(*leaves) * upstream).sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_packed_documents_of_a_causal_drafter(make_drafter: Callable[..., CausalDrafter]) -> None:
    """Block masks give the hidden states of additive masks, and decoding goes on as before."""
    drafter = make_drafter(seed=3).eval()
    documents = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [2] * 20])
    positions = torch.tensor([[*range(7), *range(9), *range(4)], [*range(20)]])
    ids = torch.randint(0, drafter.vocab_size, (2, 20))
    with torch.no_grad():
        expected = drafter.hidden(ids, positions, documents)
        plain = drafter.draft(drafter.start(ids[0, :5]), [1, 2, 3], [-1, 0, 0])
        use_block_masks(drafter.model)
        output = drafter.model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=document_block_mask(documents),
            use_cache=False,
        )  # fmt: skip
        after = drafter.draft(drafter.start(ids[0, :5]), [1, 2, 3], [-1, 0, 0])
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after, plain)
