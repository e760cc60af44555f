"""Causal drafters: documents do not mix, training and decoding agree, bad input is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from certdraft.drafters import CausalDrafter, Drafter, LoraSettings, load_causal_lm

V = 96
Make = Callable[..., CausalDrafter]

# Two rows: documents of 5, 1 and 6 tokens; documents of 7 and 3 tokens and two of padding.
DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 7 + [4] * 3 + [-1] * 2])
POSITIONS = torch.tensor([[*range(5), 0, *range(6)], [*range(7), *range(3), 0, 0]])
TOKENS = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_equal_separate_ones(make_drafter: Make, attention: str) -> None:
    drafter = make_drafter(attention)
    packed = drafter.logits(TOKENS, POSITIONS, DOCUMENTS)
    for document in range(5):
        place = document == DOCUMENTS
        alone = drafter.model(TOKENS[place][None]).logits[0]
        torch.testing.assert_close(packed[place], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_a_document_does_not_see_another(make_drafter: Make, attention: str, training: bool) -> None:
    drafter = make_drafter(attention).train(training)
    before = drafter.logits(TOKENS, POSITIONS, DOCUMENTS)
    changed = torch.where((DOCUMENTS == 0) | (DOCUMENTS == -1), (TOKENS + 1) % V, TOKENS)
    after = drafter.logits(changed, POSITIONS, DOCUMENTS)
    others = DOCUMENTS > 0
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


def test_no_gradient_flows_between_documents(make_drafter: Make) -> None:
    drafter = make_drafter()
    seen = {}
    drafter.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: seen.setdefault("x", out))
    drafter.logits(TOKENS, POSITIONS, DOCUMENTS)[DOCUMENTS == 2].square().sum().backward(inputs=[seen["x"]])
    touched = seen["x"].grad.abs().sum(-1) > 0
    assert torch.equal(touched, DOCUMENTS == 2)


def test_head_of_hidden_is_the_models_logits(make_drafter: Make) -> None:
    drafter = make_drafter()
    assert torch.equal(drafter.head(drafter.hidden(TOKENS)), drafter.model(TOKENS).logits)
    assert torch.equal(drafter(TOKENS), drafter.logits(TOKENS))
    hidden = drafter.hidden(TOKENS)
    torch.testing.assert_close(hidden @ drafter.head_weight.T, drafter.head(hidden))


def test_documents_need_positions(make_drafter: Make) -> None:
    with pytest.raises(ValueError, match="position_ids that restart"):
        make_drafter().hidden(TOKENS, document_ids=DOCUMENTS)


def test_drafting_agrees_with_the_training_forward(make_drafter: Make) -> None:
    drafter = make_drafter()
    text = [3, 1, 4, 1, 5]
    state = drafter.start(text)
    # Round 1: root 9, children 2 and 6, grandchild 5 of 6. Its leaf 5 is accepted, and so is 8, never fed.
    logits = torch.cat([drafter.draft(state, [9], [-1]), drafter.draft(state, [2, 6, 5], [0, 0, 2])])
    expected = drafter.logits(torch.tensor([[*text, 9, 6, 5]]))[0]
    torch.testing.assert_close(logits[[0, 2, 3]], expected[5:], atol=1e-5, rtol=0)
    drafter.commit(state, [0, 2, 3])
    # Round 2: what was accepted unread comes first, then the new root.
    logits = drafter.draft(state, torch.tensor([8, 7]), torch.tensor([-1, 0]))
    expected = drafter.logits(torch.tensor([[*text, 9, 6, 5, 8, 7]]))[0, -2:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    drafter.commit(state, [])
    assert state.length == len(text) + 3
    assert isinstance(drafter, Drafter)
    assert drafter.kind == "conditional"
    assert drafter.taps == ()
    assert drafter.max_context == 256


def test_bf16_autocast_trains(make_drafter: Make) -> None:
    drafter = make_drafter()
    with torch.autocast("cpu", torch.bfloat16):
        logits = drafter.logits(TOKENS, POSITIONS, DOCUMENTS)
    logits.float().square().mean().backward()
    reference = make_drafter().logits(TOKENS, POSITIONS, DOCUMENTS)
    # bf16 keeps 8 bits, so a few per cent of the largest logit; a mask lost to rounding costs 50 %.
    assert (logits - reference).abs().max() < 0.06 * reference.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drafter.parameters())


def test_casting_spares_the_rotary_frequencies(make_drafter: Make, sizes: dict[str, Any]) -> None:
    exact = make_drafter().model.base_model.rotary_emb.inv_freq
    for drafter in (make_drafter().bfloat16(), CausalDrafter(config=sizes, vocab_size=V, dtype="bfloat16")):
        assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
        assert torch.equal(drafter.model.base_model.rotary_emb.inv_freq, exact)
    module = torch.nn.ModuleDict({"drafter": make_drafter()}).to(torch.bfloat16)  # as a trainer casts it
    assert torch.equal(module["drafter"].model.base_model.rotary_emb.inv_freq, exact)
    assert make_drafter().double().model.base_model.rotary_emb.inv_freq.dtype == torch.float64


def test_gradient_checkpointing_changes_no_gradient(sizes: dict[str, Any], make_drafter: Make) -> None:
    grads = []
    for checkpointing in (False, True):
        drafter = CausalDrafter(config=sizes, vocab_size=V, gradient_checkpointing=checkpointing)
        drafter.load_state_dict(make_drafter().state_dict())
        drafter.train().logits(TOKENS, POSITIONS, DOCUMENTS).square().mean().backward()
        assert drafter.model.base_model.layers[0].gradient_checkpointing is checkpointing
        grads.append([p.grad for p in drafter.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


class TestBuild:
    """Fitting a drafter to its target."""

    def test_vocabulary_comes_with_the_target(self, sizes: dict[str, Any]) -> None:
        drafter = CausalDrafter(config=sizes)
        with pytest.raises(ValueError, match="no network yet"):
            drafter.logits(TOKENS)
        assert drafter.build(V).vocab_size == V
        before = drafter.head_weight.clone()
        assert torch.equal(drafter.build(V).head_weight, before)
        with pytest.raises(ValueError, match=r"vocabulary of 96, the target of 97"):
            drafter.build(97)

    def test_embeddings_start_as_the_targets(self, sizes: dict[str, Any], target: Qwen3ForCausalLM) -> None:
        drafter = CausalDrafter(config=sizes, init_from_target=True).build(V, target)
        assert torch.equal(drafter.model.get_input_embeddings().weight, target.get_input_embeddings().weight)
        assert torch.equal(drafter.head_weight, target.lm_head.weight)
        assert drafter.head_weight.data_ptr() != target.lm_head.weight.data_ptr()

    def test_embeddings_that_do_not_fit(self, sizes: dict[str, Any], target: Qwen3ForCausalLM) -> None:
        with pytest.raises(ValueError, match="needs the target model"):
            CausalDrafter(config=sizes, init_from_target=True).build(V)
        narrow = CausalDrafter(config=sizes | {"hidden_size": 16}, init_from_target=True)
        with pytest.raises(ValueError, match="set hidden_size to 32"):
            narrow.build(V, target)
        tied = CausalDrafter(config=sizes | {"tie_word_embeddings": True}, init_from_target=True)
        with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
            tied.build(V, target)


class TestLora:
    """Adapters through peft."""

    def test_starts_as_the_base_and_trains_adapters_alone(self, pretrained: Path) -> None:
        base = CausalDrafter(pretrained=str(pretrained)).eval()
        drafter = CausalDrafter(pretrained=str(pretrained), lora=LoraSettings(rank=2, dropout=0.1)).eval()
        assert torch.equal(drafter.logits(TOKENS), base.logits(TOKENS))
        before = {name: p.detach().clone() for name, p in drafter.named_parameters()}
        trainable = [p for p in drafter.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.1)
        for _ in range(2):  # B starts at zero, so A moves in the second step
            optimizer.zero_grad()
            drafter.train().logits(TOKENS, POSITIONS, DOCUMENTS).square().mean().backward()
            optimizer.step()
        moved = {name for name, p in drafter.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if "lora_" in name}
        assert len(moved) == 2 * 2 * 7  # A and B, two layers, seven modules
        state = drafter.eval().start([1, 2])
        torch.testing.assert_close(
            drafter.draft(state, [3], [-1])[0], drafter.logits(torch.tensor([[1, 2, 3]]))[0, -1]
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"rank": 0}, "rank 0"), ({"dropout": 1.0}, "dropout"), ({"target_modules": ()}, "is empty")],
    )
    def test_settings_are_checked(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LoraSettings(**settings)

    def test_unknown_module(self, pretrained: Path) -> None:
        with pytest.raises(ValueError, match="qq_proj"):
            CausalDrafter(pretrained=str(pretrained), lora=LoraSettings(target_modules=("qq_proj",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either config"),
        ({"config": {}, "pretrained": "x"}, "either config"),
        ({"config": {}, "lora": LoraSettings()}, "not for a fresh config"),
        ({"pretrained": "x", "init_from_target": True}, "not for pretrained"),
        ({"config": {}, "from_target": {"layers": 2}}, "either config"),
        ({"from_target": {"layers": 2}, "lora": LoraSettings()}, "not for a fresh config or from_target"),
        ({"config": {}, "freeze_embeddings": True}, "freeze_embeddings is for pretrained or from_target"),
        ({"pretrained": "x", "lora": LoraSettings(), "freeze_embeddings": True}, "freezes them anyway"),
        ({"config": {"hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"config": {"hidden_size": 8}}, "num_attention_heads.*head_dim missing"),
        ({"config": {"model_type": "qwen33"}}, "no model_type 'qwen33'"),
        ({"config": {"vocab_size": 5}, "vocab_size": 6}, "leave one out"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalDrafter(**arguments)


class TestPretrained:
    """Checkpoints load completely or not at all."""

    def test_it_is_the_saved_network_in_the_asked_dtype(self, pretrained: Path, make_drafter: Make) -> None:
        saved = make_drafter(seed=3)
        assert torch.equal(CausalDrafter(pretrained=str(pretrained)).logits(TOKENS), saved.logits(TOKENS))
        drafter = CausalDrafter(pretrained=str(pretrained), dtype="bfloat16")
        assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
                "missing keys: model.layers.1.mlp.up_proj",
            ),
            (lambda w: w.update(extra=torch.zeros(1)), "unexpected keys: extra"),
            (
                lambda w: w.update({"lm_head.weight": torch.zeros(V + 1, 32)}),
                "mismatched keys: .*lm_head.weight",
            ),
        ],
        ids=["missing", "unexpected", "mismatched"],
    )
    def test_weights_that_do_not_fit(self, pretrained: Path, damage: Callable, message: str) -> None:
        weights = load_file(pretrained / "model.safetensors")
        damage(weights)
        save_file(weights, pretrained / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            CausalDrafter(pretrained=str(pretrained))

    def test_another_vocabulary(self, pretrained: Path) -> None:
        with pytest.raises(ValueError, match="vocabulary of 96, the target of 128"):
            CausalDrafter(pretrained=str(pretrained), vocab_size=128)

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no config.json"):
            load_causal_lm(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_causal_lm(tmp_path / "nowhere")
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="LoRA adapter, not a model"):
            load_causal_lm(tmp_path)

    def test_weights_that_are_gone(self, pretrained: Path) -> None:
        (pretrained / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"cannot be loaded: .*model.safetensors"):
            load_causal_lm(pretrained)

    def test_remote_code_is_never_run(self, pretrained: Path) -> None:
        config = pretrained / "config.json"
        text = config.read_text().replace('"qwen3"', '"homemade"')
        config.write_text(text.replace("{", '{"auto_map": {"AutoModelForCausalLM": "evil.Model"},', 1))
        (pretrained / "evil.py").write_text("raise SystemExit('remote code ran')\n")
        with pytest.raises(ValueError, match="cannot be loaded as a causal LM"):
            load_causal_lm(pretrained)

    @pytest.mark.parametrize("offline", ["1", None])
    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch, offline: str | None) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        if offline is None:
            monkeypatch.delenv("HF_HUB_OFFLINE")
        with pytest.raises(FileNotFoundError, match=r"config.json of it\. Run `hf download no/such-model"):
            load_causal_lm("no/such-model")


def made(drafter: Drafter) -> Drafter:
    """A command with a drafter among its options."""
    return drafter


def test_options_build_a_drafter(pretrained: Path, sizes: dict[str, Any]) -> None:
    fresh = {
        "class_path": "certdraft.drafters.CausalDrafter",
        "init_args": {"config": sizes, "vocab_size": V},
    }
    lora = {"rank": 3, "target_modules": ["q_proj", "v_proj"]}
    adapted = {"class_path": "CausalDrafter", "init_args": {"pretrained": str(pretrained), "lora": lora}}
    for options in (fresh, adapted):
        arguments = [f"--drafter={json.dumps(options)}"]
        drafter = jsonargparse.auto_cli(made, args=arguments, as_positional=False)
        assert drafter.logits(TOKENS).shape == (2, 12, V)
    assert drafter.lora == LoraSettings(rank=3, target_modules=("q_proj", "v_proj"))
