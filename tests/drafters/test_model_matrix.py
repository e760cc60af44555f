"""Models × drafter kinds: recorded, trained on, decoded, exported and linted, or refused by name.

Each cell is *equal* (to plain passes of the model) or *refused*, with a message that names the model's class
or the fact.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.models.architectures import EXPERTS, GEMMA, LINEAR, LLAMA_3_ROPE, V, made
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from certdraft.data import Batch, Generation, Prompts, Trace, TraceDataModule, open_trace, record_trace
from certdraft.decoding import BestFirst, Chain, TreeBuilder, decode
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CausalDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
    TargetLayers,
    export,
    lint_export,
    load_drafter,
)
from certdraft.train import DrafterModule, Online, OptimizerSettings, TargetSettings

LAYERS = (0, 1, 2)
EOS, NEW_TOKENS, MAX_LENGTH = 88, 24, 40  # so that rows of a batch end at different steps
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "qwen3 moe": ("Qwen3Moe", EXPERTS),
    "llama 3 rope": ("Llama", {"rope_parameters": LLAMA_3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 100}),
    "mistral, short window": ("Mistral", {"sliding_window": 16}),
    "phi with a bias": ("Phi", {"num_key_value_heads": 4}),
    "gemma 3": ("Gemma3", GEMMA | {"sliding_window": 100}),
    "gemma 3, soft-capped": ("Gemma3", GEMMA | {"sliding_window": 100, "final_logit_softcapping": 3.0}),
    "qwen3 next": ("Qwen3Next", EXPERTS | LINEAR),
    "qwen3.5": ("Qwen3_5Text", LINEAR),
}
KINDS = ("causal", "eagle3", "dflash", "dspark")
_CAP = r"Gemma3ForConditionalGeneration changes its logits .*\(final_logit_softcapping"
_WINDOW = "MistralForCausalLM has layers that attend to the last 16 tokens only"
_BIAS = "lm_head of PhiForCausalLM has a bias"
# what is refused, by model, step and kind where it depends on them; every other cell is equal
REFUSED: dict[tuple[str, ...], str] = {
    (
        "gemma 3, soft-capped",
        "record",
    ): r"Gemma3ForConditionalGeneration scales or soft-caps its logits \(final_logit_softcapping",
    ("gemma 3, soft-capped", "online"): _CAP,
    ("gemma 3, soft-capped", "decode"): _CAP,
    ("mistral, short window", "fit", "causal"): _WINDOW,
    ("mistral, short window", "decode"): "the target reads at most 16 positions",
    ("phi with a bias", "fit", "causal"): _BIAS,
    ("phi with a bias", "fit", "dflash"): "PhiForCausalLM has a bias, and a BlockDrafter uses only",
    ("phi with a bias", "fit", "dspark"): "PhiForCausalLM has a bias, and a DSparkDrafter uses only",
    **{
        (model, *step): "has linear_attention layers"
        for model in ("qwen3 next", "qwen3.5")
        for step in (("fit", "causal"), ("trees",))
    },
}


def refusal(*cell: str) -> str | None:
    """The message of a cell that is refused."""
    return REFUSED.get(cell)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(90)}, unk_token="w89"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w89", eos_token="w88")


@torch.no_grad()
def plain(model: PreTrainedModel, ids: list[int]) -> Any:
    """A pass over the whole text, without a cache or a mask of our own."""
    return model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)


def greedy(model: PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(plain(model, ids).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model in a folder with a tokenizer, and prompts longer than the short window."""
    name, changes = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = made(name, eos_token_id=None, **changes)
    model.save_pretrained(folder / "target")
    tokenizer().save_pretrained(folder / "target")
    drawn = torch.randint(0, 88, (4, 22), generator=torch.Generator().manual_seed(3)).tolist()
    prompts = [ids[: 22 - 3 * row] for row, ids in enumerate(drawn)]
    return SimpleNamespace(name=request.param, model=model, folder=folder, prompts=prompts)


@pytest.fixture(scope="module")
def trace(case: Any) -> Trace | None:
    """Greedy continuations with features of three layers; None where recording is refused."""

    def record() -> Trace:
        record_trace(
            str(case.folder / "trace"), str(case.folder / "target"),
            prompts=Prompts(template="none", max_prompt_tokens=30),
            generation=Generation(max_new_tokens=NEW_TOKENS, max_length=MAX_LENGTH, loops="keep"),
            num_kept=8, batch_size=4, feature_layers=LAYERS, accelerator="cpu",
            rows=[{"prompt": " ".join(f"w{i}" for i in ids)} for ids in case.prompts],
        )  # fmt: skip
        return open_trace(case.folder / "trace")

    message = refusal(case.name, "record")
    if message is None:
        return record()
    with pytest.raises(ValueError, match=message):
        record()
    return None


def test_recordings_are_plain_greedy_text(case: Any, trace: Trace | None) -> None:
    if trace is None:
        return
    assert len(trace) == len(case.prompts)
    for index in range(len(trace)):
        columns = trace.columns(index)
        ids = columns.input_ids.tolist()
        prompt = next(prompt for prompt in case.prompts if ids[: len(prompt)] == prompt)
        output = plain(case.model, ids)
        logits = output.logits[0]
        end = min(len(prompt) + NEW_TOKENS, MAX_LENGTH)
        assert len(ids) == end or ids[-1] == EOS
        assert ids[len(prompt) :] == logits.argmax(-1).tolist()[len(prompt) - 1 : -1]
        gaps = torch.from_numpy(columns.top_gap.astype("float32"))
        top = logits.gather(1, torch.from_numpy(columns.top_ids.astype("int64")))
        learned = torch.from_numpy(columns.loss_mask)
        assert learned.nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, len(ids) - 1))
        torch.testing.assert_close((top[:, :1] - top)[learned], gaps[learned], atol=5e-3, rtol=1e-3)
        for place, layer in enumerate(LAYERS):
            found, plainly = trace.row(index).features[:, place].float(), output.hidden_states[layer + 1][0]
            torch.testing.assert_close(found[:-1], plainly[:-1], atol=2e-2, rtol=1e-2)


def fresh(kind: str) -> Drafter:
    if kind == "causal":
        return CausalDrafter(from_target=TargetLayers([0, 3]))
    if kind == "eagle3":
        return EagleDrafter(EagleConfig(target_layer_ids=LAYERS))
    sizes = {"num_hidden_layers": 1, "mask_token_id": 90, "target_layer_ids": LAYERS}
    if kind == "dspark":
        return DSparkDrafter(DSparkConfig(**sizes, block_size=3, markov_rank=4))
    return BlockDrafter(BlockConfig(**sizes, block_size=4))


def fit(case: Any, drafter: Drafter, target: TargetSettings | None = None) -> DrafterModule:
    """One training step on the trace; with `target`, on the distributions of the model run beside it."""
    module = DrafterModule(drafter, optimizer=OptimizerSettings(warmup_steps=0), target=target)
    data = TraceDataModule(
        str(case.folder / "trace"), validation=str(case.folder / "trace"), seq_len=96, batch_size=2
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning on loaders without workers
        trainer.fit(module, data)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_decodes_and_exports(
    case: Any, trace: Trace | None, kind: str, tmp_path: Path
) -> None:
    if trace is None:
        return
    drafter = fresh(kind)
    message = refusal(case.name, "fit", kind)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            fit(case, drafter)
        return
    fit(case, drafter)
    trained = dict(drafter.named_parameters())
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the seed of fresh weights in `fit`
        start: Any = fresh(kind)
        start.build(V, case.model)
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, trained[name]) is not parameter.requires_grad, name
    folder = export(drafter.eval(), tmp_path / "out", tokenizer=tokenizer(), draft_length=3)
    assert lint_export(folder, case.folder / "target") == ()
    loaded = load_drafter(folder, target=case.model)
    check_decoding(case, loaded, refusal(case.name, "decode"))


def check_decoding(case: Any, drafter: Drafter, message: str | None) -> None:
    """Texts of a chain and of a best-first tree are the target's greedy text, or refused."""
    prompt = case.prompts[0]
    builders: list[TreeBuilder] = [Chain(3), BestFirst(8)]
    for builder in builders:
        if isinstance(builder, BestFirst):
            message = message or refusal(case.name, "trees")
        if message is None:
            found = decode(case.model, drafter, prompt, builder, max_new_tokens=NEW_TOKENS)
            assert found.tokens == greedy(case.model, prompt, NEW_TOKENS)
        else:
            with pytest.raises(ValueError, match=message):
                decode(case.model, drafter, prompt, builder, max_new_tokens=NEW_TOKENS)


def test_targets_that_decode_nothing(case: Any) -> None:
    """Drafters of another model, where not every kind can be trained on this one."""
    message = refusal(case.name, "decode")
    if message is None and refusal(case.name, "trees") is None:
        return
    drafter = CausalDrafter(from_target=TargetLayers([0, 3])).build(V, made("Llama")).eval()
    check_decoding(case, drafter, message)


def test_running_targets_give_their_own_logits(case: Any) -> None:
    online = Online(TargetSettings(str(case.folder / "target"), num_kept=4))
    message = refusal(case.name, "online")
    if message is not None:
        with pytest.raises(ValueError, match=message):
            online.to(torch.device("cpu"))
        return
    online.to(torch.device("cpu"))
    ids = torch.randint(0, V, (1, 60), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    documents = torch.tensor([[0] * 25 + [1] * 35])
    batch = Batch(ids, positions, documents, torch.ones_like(ids).bool())
    outputs = online.read(batch, LAYERS)
    alone = [plain(case.model, part.tolist()) for part in ids[0].split([25, 35])]
    expected: Tensor = torch.cat([output.logits[0] for output in alone]).log_softmax(-1)
    assert outputs.online is not None
    target = outputs.online[:]
    torch.testing.assert_close(target.logp, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(target.greedy, expected.argmax(-1))
    hidden = torch.cat([output.hidden_states[LAYERS[0] + 1][0] for output in alone])
    torch.testing.assert_close(outputs.features[0, :, 0], hidden, atol=2e-4, rtol=1e-4)
