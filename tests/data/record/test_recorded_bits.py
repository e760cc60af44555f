"""What is recorded of a position: the bits of a head, and no question to the device on the way to them."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from certdraft.certificates import Head
from certdraft.data import Generation, LogitHead, Prompt, record_prompts
from certdraft.data.record.generation import packed_head

ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero")  # the host waits


@pytest.mark.parametrize("vocab_size", [320, 40_001])
@pytest.mark.parametrize("rows", [1, 5, 900])
def test_bits_are_those_of_a_head(vocab_size: int, rows: int) -> None:
    """Few levels, so that rows tie at the top too; some tokens impossible; a confident row."""
    rows = min(rows, 20 if vocab_size > 1000 else rows)
    z = torch.randint(200, (rows, vocab_size)) / 10.0 + torch.randn(rows, 1)
    z[:, 7], z[0, 3] = -torch.inf, 60.0
    head = Head.from_logits(z, 9)
    packed = packed_head(z, 9)
    assert head.entropy is not None
    assert torch.equal(packed[:, :9].contiguous().view(torch.int32).long(), head.ids)
    assert torch.equal(packed[:, 9:18].contiguous().view(torch.int32), head.gap.view(torch.int32))
    assert torch.equal(packed[:, 18], head.lse_gap)
    assert torch.equal(packed[:, 19], head.entropy)


@pytest.mark.parametrize("row", [[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf] * 3])
def test_what_no_head_is_cut_from_shows_in_lse_gap(row: list[float]) -> None:
    z = torch.tensor([[1.0, 2.0, 3.0], row])
    with pytest.raises(ValueError, match=r"row \[1\]"):
        Head.from_logits(z, 2)
    assert torch.isfinite(packed_head(z, 2)[:, -2]).tolist() == [True, False]


def test_nothing_on_the_way_asks_the_device() -> None:
    """A meta tensor has no values: whatever would make the host wait for one raises here."""
    assert packed_head(torch.empty(5, 40_001, device="meta"), 9).shape == (5, 20)


@pytest.mark.parametrize(("attention", "asked_by_transformers"), [("eager", 0), ("sdpa", 1)])
def test_a_pass_waits_once(
    make_target: Callable[..., Qwen3ForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    asked_by_transformers: int,
) -> None:
    """Ten more passes are ten more copies to the host, features and all, and none of our own questions."""
    target = make_target(attn_implementation=attention)
    head = LogitHead(target)
    calls = Counter[str]()

    def counted(name: str) -> Callable[..., object]:
        method = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *args: object) -> object:
            calls[name] += 1
            return method(self, *args)

        return call

    for name in ("cpu", *ASKING):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    prompts = [Prompt(np.arange(3, 3 + n, dtype=np.int32), n, "here") for n in (4, 9)]
    seen = []
    for new in (10, 20):
        calls.clear()
        settings = Generation(max_new_tokens=new, loops="keep")
        rows = dict(
            record_prompts(
                target, head, prompts, settings,
                batch_size=2, num_kept=8, eos_ids=frozenset(), feature_layers=(1, 0),
            )
        )  # fmt: skip
        assert all(row.hidden is not None and row.hidden[:-1].any() for row in rows.values())
        seen.append((calls["cpu"], sum(calls[name] for name in ASKING)))
    (few_copies, few_waits), (many_copies, many_waits) = seen
    assert many_copies - few_copies == 10
    assert many_waits - few_waits == 10 * asked_by_transformers
