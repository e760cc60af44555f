"""Texts continued side by side, each place taken by the next prompt once a text has ended."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles.models.architectures import LINEAR, V, made
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

from certdraft.data import Generation, LogitHead, Prompt, RecordedRow, record_prompts
from certdraft.support import text_body

ENDS = frozenset(range(V // 8))
LENGTHS = (3, 30, 1, 12, 7, 21, 2, 9, 5, 16, 4, 1)  # some longer than a window of 16
NEW = 24
WINDOW = {"sliding_window": 16}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {}),
    "window": ("Mistral", WINDOW),
    "both": ("Gemma3Text", WINDOW | {"final_logit_softcapping": None}),
    "eager": ("Llama", {"attn_implementation": "eager"}),
    "linear": ("Qwen3_5Text", LINEAR),
}


def prompts_of(*lengths: int) -> list[Prompt]:
    draw = np.random.default_rng(5)
    ids = [draw.integers(V // 8, V, length).astype(np.int32) for length in lengths]
    return [Prompt(row, len(row), f"chats.jsonl:{n + 1}") for n, row in enumerate(ids)]


def record(
    target: PreTrainedModel,
    prompts: list[Prompt],
    batch_size: int,
    head: LogitHead | None = None,
    **settings: Any,
) -> list[RecordedRow]:
    generation = Generation(**{"max_new_tokens": NEW, "loops": "keep"} | settings)
    rows = dict(
        record_prompts(
            target, head or LogitHead(target), prompts, generation,
            batch_size=batch_size, num_kept=4, eos_ids=ENDS,
        )
    )  # fmt: skip
    return [rows[index] for index in range(len(prompts))]


class Passes:
    """Rows and columns of the passes of a model's body."""

    def __init__(self, target: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        text_body(target).register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, body: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


@pytest.mark.parametrize("name", TARGETS)
def test_texts_are_those_of_each_prompt_alone(name: str) -> None:
    architecture, changes = TARGETS[name]
    target = made(architecture, **changes)
    prompts = prompts_of(*LENGTHS)
    rows = record(target, prompts, batch_size=4)
    for prompt, row in zip(prompts, rows, strict=True):
        given, ids = len(prompt.ids), row.input_ids
        assert np.array_equal(ids[:given], prompt.ids)
        with torch.inference_mode():
            logits = target(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
        assert np.array_equal(ids[given:], logits[given - 1 : -1].argmax(-1))
        ended = [int(token) in ENDS for token in ids[given:]]
        assert not any(ended[:-1])
        assert row.finish == ("eos" if ended[-1] else "length")
        assert ended[-1] or len(ended) == NEW
        gap = (logits.amax(-1, keepdim=True) - logits).sort(-1).values[given - 1 : -1, :4]
        np.testing.assert_allclose(row.top_gap[given - 1 : -1], gap, rtol=2**-9, atol=2e-3)
    assert len({row.finish for row in rows}) == 2


def test_places_that_are_free_are_taken() -> None:
    """Four rows at most; one is never empty for long while prompts wait, and none is carried to the end."""
    target, prompts = made("Llama"), prompts_of(*LENGTHS)
    passes = Passes(target)
    rows = record(target, prompts, batch_size=4)
    written = sum(len(row.input_ids) - len(prompt.ids) for row, prompt in zip(rows, prompts, strict=True))
    joins = [shape for shape in passes.shapes[2:] if shape[1] > 1]  # after the two of `LogitHead`
    steps = [shape[0] for shape in passes.shapes[2:] if shape[1] == 1]
    assert joins[0] == (4, 30)
    assert len(joins) > 3
    assert max(steps) == 4
    # every token but the last of a text is read once
    assert written - len(rows) <= sum(steps) <= 1.2 * (written - len(rows))
    by_batches = sum(
        max(
            len(row.input_ids) - len(prompt.ids)
            for row, prompt in list(zip(rows, prompts, strict=True))[at : at + 4]
        )
        for at in range(0, len(rows), 4)
    )
    assert len(steps) < by_batches


def test_linear_attention_begins_anew_when_all_have_ended() -> None:
    target, prompts = made("Qwen3_5Text", **LINEAR), prompts_of(5, 4, 3, 2, 6)
    passes = Passes(target)
    record(target, prompts, batch_size=2)
    assert [shape for shape in passes.shapes[2:] if shape[1] > 1] == [(2, 6), (2, 4), (1, 2)]


class Counting(LogitHead):
    """Counts the positions it is applied to."""

    positions = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.positions += len(hidden)
        return super().__call__(hidden)


@pytest.mark.parametrize(
    "settings", [{}, {"corpus_positions": True}, {"max_new_tokens": 0}, {"max_length": 30}], ids=str
)
def test_the_head_reads_learned_positions_only(settings: dict[str, Any]) -> None:
    target = made("Llama")
    prompts = [Prompt(p.ids, 1 + len(p.ids) // 2, p.where) for p in prompts_of(*LENGTHS)]
    head = Counting(target)
    head.positions = 0  # it was tried out
    rows = record(target, prompts, 4, head, **settings)
    assert head.positions == sum(int(row.loss_mask.sum()) for row in rows)
    assert head.positions > 0


def test_bf16_texts_differ_at_near_ties_only(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target().to(torch.bfloat16)
    prompts = prompts_of(*LENGTHS)
    together, alone = record(target, prompts, 4), [record(target, [prompt], 1)[0] for prompt in prompts]
    equal = 0
    for prompt, one, other in zip(prompts, together, alone, strict=True):
        short = min(len(one.input_ids), len(other.input_ids))
        differs = (one.input_ids[:short] != other.input_ids[:short]).nonzero()[0]
        if len(differs):
            assert one.top_gap[differs[0] - 1, 1] < 0.25, (
                prompt.where
            )  # bf16 logits of 16 are multiples of 1/8
        equal += not len(differs)
    assert equal > len(prompts) // 2
