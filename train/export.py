"""`certdraft export`: a training checkpoint as a folder that engines load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from certdraft.data import load_tokenizer
from certdraft.drafters import CardFacts, CausalDrafter, export
from certdraft.train.module import DrafterModule


def export_run(
    run: str,
    out: str,
    format: str = "transformers",
    draft_length: int = 4,
    name: str | None = None,
    license: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the drafter of a training run as a folder that serving engines load, with a model card.

    The folder is loaded again and compared with the drafter before it gets its name.

    Args:
        run: run folder (its best checkpoint, or its last), or a checkpoint file.
        out: folder to create.
        format: "transformers".
        draft_length: draft tokens per round, written where engines read it.
        name: what to call the drafter; the folder's name when not given.
        license: SPDX identifier of the drafter's weights.
        dtype: of the weights in the file; the drafter's when not given.
        adapter: also write the LoRA adapter alone.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: not a checkpoint of a drafter, or an export that does not load as the same drafter.
    """
    checkpoint = find(run)
    module, content = load_module(checkpoint)
    card = card_facts(module, content, name, license)
    folder = export(
        module.drafter, out, format, tokenizer=load_tokenizer(card.target), draft_length=draft_length,
        card=card, dtype=dtype, adapter=adapter, overwrite=overwrite,
    )  # fmt: skip
    print(f"exported {checkpoint} to {folder}")
    return folder


def find(run: str | Path) -> Path:
    """The checkpoint meant by a run folder or a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is sharded over several files.
    """
    path = Path(run).expanduser()
    choices = (
        [path] if path.suffix == ".ckpt" else [path / "checkpoints" / f"{k}.ckpt" for k in ("best", "last")]
    )
    found = next((file for file in choices if file.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path}: no checkpoint there; give a run folder with checkpoints/, or a .ckpt"
        )
    if found.is_dir():
        raise ValueError(
            f"{found} is a sharded checkpoint; merge it first with "
            f"`python -m pytorch_lightning.utilities.consolidate_checkpoint {found}`"
        )
    return found


def load_module(checkpoint: Path) -> tuple[DrafterModule, dict[str, Any]]:
    """The module a checkpoint was saved from, in eval mode, and the checkpoint's content.

    Raises:
        ValueError: the checkpoint does not say how to make its drafter.
    """
    content = torch.load(checkpoint, weights_only=True, map_location="cpu")
    facts = content.get("certdraft", {})
    if not facts.get("target") or not facts.get("config"):
        raise ValueError(
            f"{checkpoint} is no checkpoint of `certdraft fit` on a trace; nothing says what it is"
        )
    module = instantiate(yaml.safe_load(facts["config"])["model"])
    if not isinstance(module, DrafterModule):
        raise ValueError(f"{checkpoint} holds a {type(module).__name__}, not a drafter")
    if isinstance(module.drafter, CausalDrafter):
        module.drafter.init_from_target = False  # the trained weights follow
        module.drafter.build(facts["target"]["vocab_size"])
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return module.eval(), content


def instantiate(settings: dict[str, Any]) -> Any:
    """The object that a `class_path`, `init_args` pair of a config describes."""
    import pytorch_lightning as pl
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", fail_untyped=False)
    return parser.instantiate(parser.parse_object({"model": settings})).model


def card_facts(
    module: DrafterModule, content: dict[str, Any], name: str | None = None, license: str | None = None
) -> CardFacts:
    """What the model card says, from the settings, target and metrics that the checkpoint carries."""
    facts = content["certdraft"]
    settings, target = yaml.safe_load(facts["config"]), facts["target"]
    optimizer = settings["model"]["init_args"]["optimizer"]
    data = settings["data"]["init_args"]
    record = data.get("record") or {}
    metrics = dict(facts["metrics"])
    step = metrics.pop("step", None)
    training = {
        "steps": content["global_step"],
        "seed": settings["seed_everything"],
        "learning rate": optimizer["lr"],
        "batch": f"{data['batch_size']} rows of {data['seq_len']} tokens per device",
        "learned tokens in the trace": target["num_counted"],
    }
    return CardFacts(
        target=target["target"],
        target_vocab_size=target["vocab_size"],
        tokenizer_fingerprint=target["tokenizer_fingerprint"],
        target_revision=target["target_revision"],
        name=name,
        loss=repr(module.loss),
        datasets=(record["corpus"]["source"],) if record else (),
        evaluated_on="the validation trace" + (f", at step {step}" if step is not None else ""),
        metrics=metrics,
        training=training,
        license=license,
    )
