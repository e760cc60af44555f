"""Recording against a slow obvious twin: one prompt at a time, no padding, no cache, a fresh pass a token."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM

from certdraft.certificates import Head
from certdraft.data import Generation, LogitHead, Prompt, RecordedRow, TargetError, record_prompts
from certdraft.data.record.generation import eos_ids_of
from certdraft.data.record.learned_positions import loop_onset

K = 8
LENGTHS = (1, 9, 4, 17, 4)


def prompts_of(*lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(3)
    ids = [rng.integers(1, 300, n).astype(np.int32) for n in lengths]
    return [Prompt(i, len(i), f"chats.jsonl:{n + 1}") for n, i in enumerate(ids)]


def record(
    target: PreTrainedModel,
    prompts: list[Prompt],
    eos: frozenset[int] = frozenset(),
    *,
    batch_size: int = 8,
    **settings: object,
) -> list[RecordedRow]:
    """Rows in the order of the prompts."""
    generation = Generation(**({"max_new_tokens": 24, "loops": "keep"} | settings))
    rows = dict(
        record_prompts(
            target, LogitHead(target), prompts, generation, batch_size=batch_size, num_kept=K, eos_ids=eos
        )
    )
    return [rows[index] for index in range(len(prompts))]


@torch.inference_mode()
def twin(target: PreTrainedModel, prompt: Prompt, new: int, eos: frozenset[int] = frozenset()) -> list[int]:
    ids = prompt.ids.tolist()
    for _ in range(new):
        ids.append(int(target(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_says_what_each_prompt_alone_says(
    make_target: Callable[..., Qwen3ForCausalLM], attention: str
) -> None:
    target = make_target(attn_implementation=attention)
    prompts = prompts_of(*LENGTHS)
    for prompt, row in zip(prompts, record(target, prompts), strict=True):
        ids = twin(target, prompt, 24)
        assert row.input_ids.tolist() == ids
        with torch.inference_mode():
            logits = target(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        # the greedy id is the token that follows, from the last prompt token on
        given = len(prompt.ids)
        assert np.array_equal(row.top_ids[given - 1 : -1, 0], row.input_ids[given:])
        learned, others = slice(given - 1, -1), [*range(given - 1), -1]
        assert row.loss_mask.nonzero()[0].tolist() == list(range(given - 1, len(ids) - 1))
        head = Head.from_logits(logits[learned], K)
        assert np.array_equal(row.top_ids[learned, 0], head.greedy)
        np.testing.assert_allclose(row.top_gap[learned], head.gap, rtol=2**-10, atol=1e-4)
        np.testing.assert_allclose(row.lse_gap[learned], head.lse_gap, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(row.entropy[learned], head.entropy, rtol=1e-4, atol=1e-4)
        uniform = Head.from_logits(torch.zeros(len(others), logits.shape[1]), K)
        assert np.array_equal(np.sort(row.top_ids[others]), np.tile(np.arange(K), (len(others), 1)))
        assert (row.top_gap[others] == 0).all()
        np.testing.assert_allclose(row.lse_gap[others], uniform.lse_gap, rtol=1e-6)
        np.testing.assert_allclose(row.entropy[others], uniform.entropy, rtol=1e-6)
        assert row.finish == "length"


def test_rows_end_at_end_of_text_or_at_their_own_length(target: Qwen3ForCausalLM) -> None:
    prompts = prompts_of(*LENGTHS)
    free = record(target, prompts)
    eos = frozenset({int(free[0].input_ids[5])})
    rows = record(target, prompts, eos, max_length=28)
    for prompt, row in zip(prompts, rows, strict=True):
        new = min(24, 28 - len(prompt.ids))
        expected = twin(target, prompt, new, eos)
        assert row.input_ids.tolist() == expected  # the end-of-text token belongs to the row
        assert row.finish == ("eos" if expected[-1] in eos else "length")
    assert {row.finish for row in rows} == {"eos", "length"}  # both were met, so rows left the batch early
    assert 28 in [len(row.input_ids) for row in rows]


def test_batch_composition_does_not_matter(target: Qwen3ForCausalLM) -> None:
    prompts = prompts_of(*LENGTHS)
    together, alone = record(target, prompts), [record(target, [p])[0] for p in prompts]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        np.testing.assert_allclose(one.top_gap, other.top_gap, rtol=2**-9, atol=1e-3)


def test_exact_tie_takes_the_lowest_id(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target()
    tied = [250, 3, 7, 120]
    with torch.no_grad():
        target.lm_head.weight[tied] = target.lm_head.weight[3] * 9
    [row] = record(target, prompts_of(5), corpus_positions=True)
    winners = np.isin(row.top_ids[:, 0], tied) & row.loss_mask
    assert winners.sum() > 5
    assert set(row.top_ids[winners, 0].tolist()) == {3}
    assert (row.top_gap[winners, 1:4] == 0).all()
    assert np.array_equal(np.sort(row.top_ids[winners, :4]), np.tile(sorted(tied), (winners.sum(), 1)))
    assert np.array_equal(row.top_ids[4:-1, 0], row.input_ids[5:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_name_row_and_position(
    make_target: Callable[..., Qwen3ForCausalLM], value: float
) -> None:
    target, prompts = make_target(), prompts_of(6, 3)
    prompts[1].ids[2] = 77
    prompts[0].ids[prompts[0].ids == 77] = 78
    with torch.no_grad():
        target.model.embed_tokens.weight[77] = value
    with pytest.raises(TargetError, match=r"chats\.jsonl:2: .* after token 2 of the document hold NaN"):
        record(target, prompts)


def test_teacher_forced_and_corpus_positions(target: Qwen3ForCausalLM) -> None:
    ids = np.arange(10, 22, dtype=np.int32)
    whole, answer = Prompt(ids, 1, "a"), Prompt(ids, 7, "b")
    rows = record(target, [whole, answer], max_new_tokens=0)
    with torch.inference_mode():
        head = Head.from_logits(target(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0], K)
    for row, first in zip(rows, (1, 7), strict=True):
        assert np.array_equal(row.input_ids, ids)
        assert np.array_equal(row.top_ids[first - 1 : -1, 0], head.greedy[first - 1 : -1])
        assert row.loss_mask.nonzero()[0].tolist() == list(range(first - 1, 11))
        assert row.finish == "given"
    [row] = record(target, prompts_of(9), corpus_positions=True)
    assert row.loss_mask.tolist() == [True] * (9 + 24 - 1) + [False]
    with torch.inference_mode():
        logits = target(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0]
    assert np.array_equal(row.top_ids[:-1, 0], logits[:-1].argmax(-1))


def test_loops_are_cut_where_they_begin(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target(seed=2, initializer_range=0.05)  # its first prompt falls into a loop
    prompts = prompts_of(*LENGTHS)
    settings = {"max_new_tokens": 90}
    rows = {loops: record(target, prompts, loops=loops, **settings) for loops in ("keep", "cut", "mask")}
    onsets = [loop_onset(row.input_ids[len(p.ids) :]) for p, row in zip(prompts, rows["keep"], strict=True)]
    assert any(onset is not None for onset in onsets)
    for prompt, onset, keep, cut, mask in zip(prompts, onsets, *rows.values(), strict=True):
        end = len(keep.input_ids) if onset is None else len(prompt.ids) + onset
        assert np.array_equal(cut.input_ids, keep.input_ids[:end])
        assert np.array_equal(mask.input_ids, keep.input_ids)
        assert not mask.loss_mask[end - 1 :].any()
        assert np.array_equal(mask.loss_mask[: end - 1], keep.loss_mask[: end - 1])
        assert not cut.loss_mask[-1]
        assert cut.finish == mask.finish == ("length" if onset is None else "loop")


def test_bf16_target_gives_fp32_logits(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target().to(torch.bfloat16)
    head = LogitHead(target)
    hidden = torch.randn(50, 32, dtype=torch.bfloat16)
    logits = head(hidden)
    exact = hidden.double() @ target.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    rounded = target.lm_head(hidden).double()
    assert (rounded - exact).abs().max() > 100 * (logits - exact).abs().max()  # what is avoided


def test_scaled_or_missing_output_layer_is_refused(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target()
    plain = target.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    target.forward = capped
    with pytest.raises(TargetError, match="scales or soft-caps its logits"):
        LogitHead(target)
    with pytest.raises(TargetError, match="no linear output layer"):
        LogitHead(target.model)


def test_end_of_text_ids_come_from_all_configs(
    make_target: Callable[..., Qwen3ForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    target = make_target(eos_token_id=5)
    target.generation_config.eos_token_id = [6, 7]
    assert eos_ids_of(target, tokenizer) == {5, 6, 7, tokenizer.eos_token_id}


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="max_new_tokens -1 must be at least 0"):
        Generation(max_new_tokens=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bf16_on_a_gpu_gives_fp32_logits(make_target: Callable[..., Qwen3ForCausalLM]) -> None:
    target = make_target().to("cuda", torch.bfloat16)
    hidden = torch.randn(50, 32, dtype=torch.bfloat16, device="cuda")
    logits = LogitHead(target)(hidden)
    exact = hidden.double() @ target.lm_head.weight.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    rows = record(target, prompts_of(*LENGTHS))
    assert all(
        np.array_equal(row.top_ids[len(row.input_ids) - 25 : -1, 0], row.input_ids[-24:]) for row in rows
    )
