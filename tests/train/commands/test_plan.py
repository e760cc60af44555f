"""Plans: sizes from configs, formulas against what really happens, and words instead of surprises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from oracles.models.architectures import GEMMA, made
from transformers import Qwen3Config, Qwen3ForCausalLM

import certdraft
from certdraft.data import bytes_per_token, load_target
from certdraft.drafters import CausalDrafter, Drafter, TargetLayers
from certdraft.drafters.causal.layer_cut import cut_from
from certdraft.train import Online, TargetSettings, fit_to_target
from certdraft.train.plan.formulas import DEVICES, activation_bytes, decode_step_s, state_bytes, step_flop
from certdraft.train.plan.model_sizes import drafter_sizes, sizes_of
from certdraft.train.plan.plan_command import load_config, plan

SIZES = {
    "hidden_size": 64, "intermediate_size": 208, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "body"), [("Qwen/Qwen3-8B", 8.19e9, 6.95e9), ("Qwen/Qwen3-0.6B", 0.596e9, 0.44e9)]
)
def test_published_sizes(name: str, parameters: float, body: float) -> None:
    sizes = sizes_of(name)
    assert sizes.parameters == pytest.approx(parameters, rel=0.01)
    assert sizes.body == pytest.approx(body, rel=0.01)


def test_sizes_of_a_folder_and_of_keys(tmp_path: Path) -> None:
    network = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=3))
    network.config.save_pretrained(tmp_path)
    count = sum(parameter.numel() for parameter in network.parameters())
    for sizes in (sizes_of(str(tmp_path)), sizes_of({**SIZES, "num_hidden_layers": 3})):
        assert (sizes.parameters, sizes.layers, sizes.query, sizes.key_value) == (count, 3, 96, 32)
        assert sizes.embedding == 128 * 64
    with pytest.raises(FileNotFoundError, match="no config of '/nowhere' here.*config.json"):
        sizes_of("/nowhere")


def saved_bytes(layers: int, checkpointing: bool) -> int:
    """What autograd really keeps of a forward pass of 3 × 61 tokens under bf16 autocast."""
    network = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=layers)).train()
    if checkpointing:
        enable = (
            getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    storages: dict[int, int] = {}
    kept = []
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    casts = {2 * parameter.numel() for parameter in network.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes() not in casts:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids, positions = torch.zeros(3, 61, dtype=torch.long), torch.arange(61).expand(3, 61)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        network.model(
            input_ids=ids, position_ids=positions, attention_mask=torch.zeros(3, 1, 61, 61), use_cache=False
        )
    return sum(storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing: bool) -> None:
    def estimated(layers: int) -> float:
        return activation_bytes(sizes_of({**SIZES, "num_hidden_layers": layers}), 3 * 61, checkpointing)

    measured = saved_bytes(4, checkpointing) - saved_bytes(2, checkpointing)
    assert estimated(4) - estimated(2) == pytest.approx(measured, rel=0.05)


def test_state_is_what_the_optimiser_holds() -> None:
    network = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2))
    optimizer = torch.optim.AdamW(network.parameters())
    network(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    held = sum(p.nbytes + p.grad.nbytes for p in network.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    count = sum(p.numel() for p in network.parameters())
    assert state_bytes(count, 0, "32-true") == held
    assert state_bytes(count, 0, "bf16-mixed") == held + 2 * count


def test_arithmetic_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=2))
    sizes = sizes_of({**SIZES, "num_hidden_layers": 2})
    with FlopCounterMode(display=False) as counter:
        network(input_ids=torch.zeros(2, 32, dtype=torch.long)).logits.sum().backward()
    counted = counter.get_total_flops()
    assert step_flop(sizes, 64, 64, 32, sizes.parameters, False) == pytest.approx(counted, rel=0.1)


def test_a_plan_in_words_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(nodes=2, devices=8, prompts=1000, out=str(tmp_path / "plan.json"))
    said = capsys.readouterr().out
    assert "2 node(s) × 8 × h100" in said
    assert "assumed: mfu 0.4" in said
    assert found.fits
    assert found.trace_gb == pytest.approx(1000 * 700 * bytes_per_token(32) / 1e9)
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    one = plan(prompts=1000)
    assert found.record_hours == pytest.approx(one.record_hours / 16)
    shared = plan(nodes=2, devices=8, fsdp2=True)
    key = "weights, gradients, AdamW"
    assert shared.train_memory_gb[key] < found.train_memory_gb[key] / 3
    big = plan(batch_size=32, checkpointing=False)
    assert not big.fits
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert plan(mfu=0.2).step_seconds == pytest.approx(2 * one.step_seconds)


def test_rows_of_the_config_are_what_is_recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = load_config(CONFIGS / "qwen3-8b-0.6b.yaml")
    settings["data"]["record"]["corpus"]["max_rows"] = 2000
    settings["data"]["record"]["generation"]["max_new_tokens"] = 100
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    found = plan(run=str(tmp_path / "run.yaml"))
    assert "recording 2,000 prompts of 300 tokens with answers of 100\n" in capsys.readouterr().out
    assert found.trace_gb == pytest.approx(2000 * 400 * bytes_per_token(32) / 1e9)


def test_a_precision_that_fit_refuses_is_not_planned_for(tmp_path: Path) -> None:
    settings = load_config(CONFIGS / "qwen3-8b-0.6b.yaml")
    settings["trainer"]["precision"] = "bf16-true"
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="trainer.precision is bf16-true.* Use bf16-mixed"):
        plan(run=str(tmp_path / "half.yaml"))


def test_sizes_of_a_multimodal_model_are_those_of_its_text(tmp_path: Path) -> None:
    model = made("Gemma3", **GEMMA)
    model.config.save_pretrained(tmp_path)
    found = sizes_of(str(tmp_path))
    assert (found.layers, found.hidden, found.vocabulary, found.query, found.key_value) == (4, 32, 96, 32, 16)
    one = {"num_hidden_layers": 1}
    for kind, config in (("EagleDrafter", {}), ("BlockDrafter", one), ("DSparkDrafter", one)):
        settings = {"class_path": kind, "init_args": {"config": config | {"target_layer_ids": [0, 1, 2]}}}
        sizes = drafter_sizes(settings, str(tmp_path))
        assert (sizes.hidden, sizes.query) == (32, 32)


def test_decoding_reads_the_weights_or_computes() -> None:
    sizes, device = sizes_of("Qwen/Qwen3-8B"), DEVICES["h100"]
    alone, many = (decode_step_s(sizes, rows, 500, device, 0.4) for rows in (1, 4096))
    assert alone == pytest.approx(2 * sizes.parameters / (3350e9 * 0.7), rel=0.02)
    assert many > 4 * alone


def test_configs_name_files_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter" / "a.yaml").write_text("class_path: CausalDrafter\ninit_args: {config: x}\n")
    (tmp_path / "run.yaml").write_text("model: {drafter: drafter/a.yaml}\n")
    assert load_config(tmp_path / "run.yaml")["model"]["drafter"]["init_args"] == {"config": "x"}
    with pytest.raises(FileNotFoundError, match=r"plan: no config .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "empty.yaml").write_text("seed_everything: 0\n")
    with pytest.raises(ValueError, match="names no target; give --target and --drafter"):
        plan(run=str(tmp_path / "empty.yaml"))


CONFIGS = Path(certdraft.__file__).parent / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*/*.yaml")])


def test_lora_trains_little() -> None:
    lora = {
        "class_path": "CausalDrafter",
        "init_args": {"pretrained": "Qwen/Qwen3-0.6B", "lora": {"rank": 32}},
    }
    sizes = drafter_sizes(lora, "Qwen/Qwen3-8B")
    assert sizes.trained == pytest.approx(20.2e6, rel=0.01)  # all linear layers
    assert sizes.parameters - sizes.trained == sizes_of("Qwen/Qwen3-0.6B").parameters


@pytest.mark.parametrize("frozen", [False, True])
def test_a_drafter_that_goes_on_from_a_checkpoint_is_counted_as_it_is_built(
    tmp_path: Path, frozen: bool
) -> None:
    """Configs of checkpoints hold keys that transformers does not know, those of GGUF files for one."""
    target = load_target("embedded")
    model = cut_from(target, TargetLayers(1))
    model.config._model_name_or_path = "a name of its own"
    model.save_pretrained(tmp_path)
    assert "_model_name_or_path" in (tmp_path / "config.json").read_text()
    init = {"pretrained": str(tmp_path), "freeze_embeddings": frozen}
    found = drafter_sizes({"class_path": "CausalDrafter", "init_args": init}, "embedded")
    built = CausalDrafter(**init).build(target.config.vocab_size)
    assert found.parameters == sum(p.numel() for p in built.parameters())
    assert found.trained == sum(p.numel() for p in built.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=f"the drafter {tmp_path} has a vocabulary of "):
        drafter_sizes({"class_path": "CausalDrafter", "init_args": init}, "Qwen/Qwen3-8B")


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ({"from_target": {"layers": 1}}, "a causal drafter needs either config"),
        ({"lora": {"rank": 4}, "freeze_embeddings": True}, "and lora freezes them anyway"),
        ({"init_from_target": True}, "init_from_target overwrites embeddings"),
    ],
)
def test_what_fit_refuses_is_not_counted(init: dict[str, object], said: str) -> None:
    settings = {"class_path": "CausalDrafter", "init_args": {"pretrained": "Qwen/Qwen3-0.6B"} | init}
    with pytest.raises(ValueError, match=said):
        drafter_sizes(settings, "Qwen/Qwen3-8B")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(run=str(path))
    sizes = found.drafter
    assert sizes.layers >= 1
    assert 2e5 < sizes.trained <= sizes.parameters
    assert sizes.parameters < found.target.parameters * 1.05, "a drafter is the smaller one, adapters aside"
    beside = (load_config(path)["model"].get("target") or {}).get("name")
    assert ("target beside the drafter" in found.train_memory_gb) is (beside is not None)
    assert found.train_hours > 0


def test_a_mixture_of_experts_computes_with_few_of_its_parameters() -> None:
    found = sizes_of("Qwen/Qwen3-30B-A3B")
    assert found.parameters == pytest.approx(30.5e9, rel=0.01)
    assert found.active == pytest.approx(3.3e9, rel=0.03)
    dense = sizes_of("Qwen/Qwen3-8B")
    assert dense.active == dense.parameters


def test_how_often_a_drafter_reads_a_token() -> None:
    """EAGLE-3: each unrolled step, half of the training one alone; DFlash: blocks at the anchors."""

    def passes(kind: str, seq_len: int, **init: object) -> tuple[float, float]:
        found = drafter_sizes({"class_path": kind, "init_args": init}, "Qwen/Qwen3-8B", seq_len)
        return found.passes, found.most_passes

    assert passes("EagleDrafter", 4096, unroll=5) == (3.0, 5.0)
    assert passes("EagleDrafter", 4096, unroll=5, short_until=0.0) == (5.0, 5.0)
    block = {"config": {"block_size": 16, "num_hidden_layers": 1}}
    assert passes("BlockDrafter", 4096, num_anchors=512, **block) == (2.0, 2.0)
    assert passes("BlockDrafter", 256, num_anchors=512, **block) == (16.0, 16.0)
    assert passes("DSparkDrafter", 4096, num_anchors=512, **block) == (2.0, 2.0)
    assert passes("CausalDrafter", 4096, pretrained="Qwen/Qwen3-0.6B") == (1.0, 1.0)


def test_sizes_of_published_shapes() -> None:
    """An EAGLE-3 head counted by hand: fusion, one layer that reads 2 H, four norms, 32,000 draft tokens."""
    recipe = load_config(CONFIGS / "recipes" / "qwen3-8b" / "eagle3.yaml")
    found = drafter_sizes(recipe["model"]["drafter"], "Qwen/Qwen3-8B")
    h = 4096
    layer = 2 * h * (32 + 8 + 8) * 128 + 32 * 128 * h + 3 * h * 12288
    assert found.parameters == 3 * h * h + layer + 4 * h + 32_000 * h
    assert (found.trained, found.embedding, found.vocabulary) == (found.parameters, 32_000 * h, 32_000)


@pytest.mark.parametrize("name", ["demo", "eagle3-embedded", "dflash-embedded"])
def test_sizes_are_those_of_the_network_that_fit_builds(name: str) -> None:
    """The embedded target's drafters, built with its weights."""
    drafter = load_config(CONFIGS / f"{name}.yaml")["model"]["drafter"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Drafter, "drafter")
    built = parser.instantiate(parser.parse_object({"drafter": drafter})).drafter
    target = load_target("embedded")
    fit_to_target(built, Online(TargetSettings("embedded")), None)
    planned = drafter_sizes(drafter, "embedded")
    assert planned.parameters == sum(p.numel() for p in built.parameters())
    assert planned.trained == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert planned.parameters < sum(p.numel() for p in target.parameters())


def test_a_class_that_is_no_drafter() -> None:
    for path in ("Eagle", "torch.nn.Linear"):
        with pytest.raises(ValueError, match=f"{path} is not a drafter class; give CausalDrafter, "):
            drafter_sizes({"class_path": path}, "embedded")


def test_a_config_for_the_cpu_is_planned_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Its speed is measured, its memory read; a GPU can still be asked for."""
    config = str(Path(certdraft.__file__).parent / "configs" / "eagle3-embedded.yaml")
    here = plan(config)
    shown = capsys.readouterr().out
    assert "this CPU" in shown
    assert "CUDA" not in shown
    assert 1 < here.device_memory_gb < 100_000
    there = plan(config, device="h100")
    assert "CUDA" in capsys.readouterr().out
    assert there.step_seconds < here.step_seconds
    assert there.target == here.target


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("demo", "50,000 prompts of 300 tokens with answers of 96 (assumed: give --prompts)"),
        ("eagle3-embedded", "50,000 pieces of text of 240 tokens (assumed: give --prompts)"),
    ],
)
def test_what_is_recorded_is_what_the_config_says(
    name: str, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths are the config's, what is assumed is called so, and small networks are not "0.00 B"."""
    config = str(CONFIGS / f"{name}.yaml")
    plan(config)
    said = capsys.readouterr().out
    assert texts in said
    assert "0.00 B" not in said
    found = plan(config, prompts=10, prompt_tokens=20, answer_tokens=30)
    assert "recording 10 prompts of 20 tokens with answers of 30\n" in capsys.readouterr().out
    assert found.trace_gb < 0.01
