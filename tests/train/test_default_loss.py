"""The loss that `model.decoder` chooses: what the shipped presets say, named in fit's first lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import certdraft
from certdraft import losses
from certdraft.drafters import CausalDrafter, Drafter, EagleDrafter
from certdraft.losses import Loss
from certdraft.train.commands.cli import captured
from certdraft.train.default_loss import DECODERS, Decoder, default_loss
from certdraft.train.drafter_module import DrafterModule

PRESETS = Path(certdraft.__file__).parent / "configs" / "loss"
CHAIN: list[tuple[Decoder, str]] = [("chain", "ce-kl"), ("m-ary", "runner-up-8-kl"), ("sampling", "lk")]


def causal() -> Drafter:
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 32,
    }  # fmt: skip
    return CausalDrafter(config=sizes, vocab_size=64)


def preset(name: str) -> Loss:
    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(item) for item in value]
        if not isinstance(value, dict):
            return value
        arguments = {key: made(item) for key, item in value.get("init_args", {}).items()}
        return getattr(losses, value["class_path"].rpartition(".")[2])(**arguments)

    loss: Loss = made(yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
    return loss


@pytest.mark.parametrize(
    ("decoder", "name", "paths"),
    [
        *((decoder, name, paths) for decoder, name in CHAIN for paths in (False, True)),
        ("best-first", "runner-up-4-sharp-1.5", False),
        ("best-first", "by-depth", True),
    ],
)
def test_it_is_the_preset_for_that_decoder(decoder: Decoder, name: str, paths: bool) -> None:
    drafter = EagleDrafter() if paths else causal()
    assert repr(default_loss(decoder, drafter)) == repr(preset(name))
    module = DrafterModule(drafter, decoder=decoder)
    assert repr(module.loss) == repr(preset(name))
    assert module.decoder == decoder


def test_a_given_loss_wins_and_chains_are_the_default() -> None:
    given = DrafterModule(causal(), loss=losses.HardCE(), decoder="best-first")
    assert (repr(given.loss), given.decoder) == ("HardCE()", None)
    assert given.unread_decoder == "best-first"
    assert repr(DrafterModule(causal()).loss) == repr(preset("ce-kl"))


def test_another_decoder_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="decoder='beam': choose one of chain, best-first, m-ary, sampling"):
        DrafterModule(causal(), decoder="beam")  # type: ignore[arg-type]
    code, _, said = captured(["fit", "--config", "demo", "--model.decoder", "beam"])
    assert code == 2
    assert all(decoder in said for decoder in DECODERS)


def test_fit_names_decoder_and_loss_first(tmp_path: Path) -> None:
    """The command itself, for one step."""
    rows = [{"text": f"The tower number {n} stands near the river. " * 4} for n in range(40)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, err = captured([
        "fit", "--config", "demo", "--model.decoder", "m-ary", "--model.step_weights", "LowMarginWeights",
        "--runs_dir", str(tmp_path / "runs"), "--trainer.max_steps", "1",
        "--data.train", str(tmp_path / "train"), "--data.validation", str(tmp_path / "validation"),
        "--data.record.corpus.source", str(corpus), "--data.record.generation.max_new_tokens", "8",
        "--data.seq_len", "64", "--data.batch_size", "2", "--data.validation_rows", "2",
        "--trainer.val_check_interval", "1",
    ])  # fmt: skip
    assert code == 0, err
    said = out + err
    assert "trained for: m-ary\n" in said
    assert "not read" not in said
    assert f"loss: {preset('runner-up-8-kl')!r}\n" in said
    assert "step weights: LowMarginWeights(threshold=0.1, boost=2.0)\n" in said
