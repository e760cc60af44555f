"""Exports served by transformers itself: the text is greedy, and every draft is the one our loop verifies."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.mathematics.rotary import YARN
from oracles.models import drafter_layouts as layouts
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from certdraft.decoding import Chain, decode, greedy
from certdraft.drafters import BlockConfig, BlockDrafter, CausalDrafter, Drafter, export

V, NEW = layouts.V, 24
PROMPT = [4, 8, 15, 16, 23, 42]


def enlarge(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.4 * noise if parameter.ndim > 1 else 1 + 0.3 * noise


@pytest.fixture
def target() -> Qwen3ForCausalLM:
    """A random target of six layers that never stops."""
    sizes = {key: value for key, value in layouts.SIZES.items() if key not in ("rope_theta", "dtype")}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=layouts.LAYERS)).eval()
    enlarge(model, 7)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.requires_grad_(False)


@contextmanager
def passes(target: Qwen3ForCausalLM) -> Iterator[list[list[int]]]:
    """What every pass of the target reads."""
    read: list[list[int]] = []
    hook = target.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    yield read
    hook.remove()


def drafts(
    target: Qwen3ForCausalLM, drafter: Drafter, prompt: list[int], num: int, new: int
) -> list[list[int]]:
    """Root and draft of every round of our loop."""
    seen: list[list[int]] = []

    class Watching(Chain):
        def build(self, *args: Any, **kwargs: Any) -> Any:
            tree = super().build(*args, **kwargs)
            seen.append(list(tree.tokens))
            return tree

    result = decode(target, drafter, prompt, Watching(num), max_new_tokens=new)
    assert result.tokens == greedy(target, prompt, new)
    return seen


def generated(target: Qwen3ForCausalLM, **options: Any) -> list[int]:
    prompt = torch.tensor([PROMPT])
    output = target.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, **options
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("num", [3, 5])
def test_causal(
    target: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, num: int
) -> None:
    """A noisy copy of the target: some drafts are accepted, some are not."""
    drafter = CausalDrafter(config={**target.config.to_dict(), "tie_word_embeddings": False})
    generator = torch.Generator().manual_seed(1)
    drafter.load_state_dict(
        {
            f"network.{n}": v + 0.01 * torch.randn(v.shape, generator=generator)
            for n, v in target.state_dict().items()
        }
    )
    drafter.eval()
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=num)
    assistant = AutoModelForCausalLM.from_pretrained(folder)
    assistant.generation_config.eos_token_id = None
    with passes(target) as read:
        text = generated(target, assistant_model=assistant)
    assert text == greedy(target, PROMPT, NEW)
    mine = drafts(target, drafter, PROMPT, num, NEW)
    assert [*PROMPT[:-1], *mine[0]] == read[0]
    assert mine[1:] == read[1:]
    accepted = NEW - len(mine)
    assert 0.1 < accepted / sum(len(tree) - 1 for tree in mine) < 0.9


def test_native_dflash(target: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """transformers' own DFlash generator, on the renamed tensors; it drafts whole blocks to the last."""
    transformers = pytest.importorskip("transformers", minversion="5.19")
    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip("this transformers has no DFlash drafter of its own")
    config = BlockConfig(
        num_hidden_layers=2, block_size=5, mask_token_id=V - 1, target_layer_ids=layouts.TAPS
    )
    drafter = BlockDrafter(config).build(V, target).eval()
    enlarge(drafter, 3)
    folder = export(drafter, tmp_path / "out", "transformers", tokenizer=tokenizer, draft_length=4)
    assistant, info = transformers.MuseGlimmerAssistantModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with passes(target) as read:
        text = generated(target, assistant_model=assistant, speculation_type="dflash")
    assert text == greedy(target, PROMPT, NEW)
    assert read[0] == PROMPT  # it lets the target say the first token plainly
    mine = drafts(target, drafter, [*PROMPT, text[0]], 4, NEW + 4)
    assert len(read) > 10
    assert mine[: len(read) - 2] == read[1:-1]
    assert read[-1] == mine[len(read) - 2][: len(read[-1])]


@pytest.mark.parametrize("window", [None, 3, 6, 40])
def test_native_dflash_windows(
    target: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, window: int | None
) -> None:
    """Windows and rotary scaling as transformers' own DFlash class computes them, on one whole text."""
    transformers = pytest.importorskip("transformers", minversion="5.19")
    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip("this transformers has no DFlash drafter of its own")
    from transformers.cache_utils import DFlashCache

    kinds = None if window is None else ("sliding_attention", "full_attention")
    config = BlockConfig(
        num_hidden_layers=2, block_size=5, mask_token_id=V - 1, target_layer_ids=layouts.TAPS,
        layer_types=kinds, sliding_window=window, causal=False, rope_scaling=YARN,
    )  # fmt: skip
    drafter = BlockDrafter(config).build(V, target).eval()
    enlarge(drafter, 3)
    folder = export(drafter, tmp_path / "out", "transformers", tokenizer=tokenizer, draft_length=4)
    theirs, info = transformers.MuseGlimmerAssistantModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    num = 12
    features = torch.randn(num, 3, target.config.hidden_size, generator=torch.Generator().manual_seed(1))
    block = torch.tensor([7, *[V - 1] * 4])
    cache = DFlashCache(config=theirs.config)
    cache.set_previous_accepted_tokens(num)
    with torch.no_grad():
        hidden = theirs(
            noise_embeds=drafter.embed(block)[None], context_hidden_states=features.flatten(1)[None],
            past_key_values=cache,
        ).last_hidden_state  # fmt: skip
        mine = drafter.draft(drafter.start(list(range(num)), features), [7], [-1])
        torch.testing.assert_close(drafter.head(hidden[0, 1:]), mine, rtol=1e-5, atol=1e-5)
