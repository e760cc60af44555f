"""`certdraft export`: a training checkpoint as a folder that engines load."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml

from certdraft.data import load_target, load_target_ends, load_tokenizer, target_config
from certdraft.drafters import CardFacts, export, lint_export
from certdraft.train import drafter_module
from certdraft.train.commands.parsing.known_classes import refuse_foreign_classes
from certdraft.train.drafter_module import DrafterModule
from certdraft.train.drafter_setup import target_source
from certdraft.train.plan.model_sizes import drafter_sizes
from certdraft.train.runs.checkpoint_file import read_checkpoint


def export_run(
    run: str,
    out: str | None = None,
    format: str | None = None,
    draft_length: int | None = None,
    name: str | None = None,
    license: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
    overwrite: bool = False,
    trust_classes: bool = False,
) -> Path:
    """Write the drafter of a training run as a folder that serving engines load, with a model card.

    The folder is loaded again and compared with the drafter before it gets its name.

    Args:
        run: run folder (its best checkpoint, or its last), or a checkpoint file.
        out: folder to create; `export` in the run folder when not given.
        format: "transformers" (causal and block drafters), "eagle3", "dflash", "dspark" or "speculators" (all
            that read hidden states); the one that most engines read when not given.
        draft_length: draft tokens per round, written where engines read it; when not given 4, or a whole
            block.
        name: what to call the drafter; when not given the name of `out`, or of the run where that is missing.
        license: SPDX identifier of the drafter's weights.
        dtype: of the weights in the file; the drafter's when not given.
        adapter: also write the LoRA adapter by itself.
        overwrite: replace an existing folder.
        trust_classes: also build classes that are neither certdraft's nor registered: read the run's
            config.yaml first, building them runs their code.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        ValueError: not a checkpoint of a drafter, one of foreign classes, or an export that does not load
            as the same drafter.
    """
    checkpoint = find(run)
    if out is None:
        folder = checkpoint.parent.parent
        out, name = str(folder / "export"), name or folder.parent.name
    module, content = load_module(checkpoint, trust_classes)
    card, drafter = card_facts(module, content, name, license), module.drafter
    if draft_length is None:
        draft_length = drafter.max_draft_length or 4
    beside = (("run.yaml", "run.yaml"), ("config.yaml", "training.yaml"))
    records = {name: checkpoint.parent.parent / source for source, name in beside}
    records = {name: file for name, file in records.items() if file.is_file()}
    folder = export(
        drafter, out, format, tokenizer=load_tokenizer(card.target), draft_length=draft_length,
        card=card, dtype=dtype, adapter=adapter, overwrite=overwrite, copies=records,
    )  # fmt: skip
    print(f"exported {checkpoint} to {folder}")
    for finding in lint_export(folder):
        print(f"  {finding}")
    return folder


def lint(path: str, target: str | None = None) -> None:
    """Check the files of an exported drafter against every rule that engines rely on.

    Args:
        path: folder with config.json and safetensors: a causal LM, an EAGLE-3 head or a DFlash drafter, in
            any layout, from any trainer.
        target: folder of the target, or its config.json; checks the pair too.

    Raises:
        FileNotFoundError: no such folder, or files missing.
        ValueError: an engine would refuse the folder, or draft badly with it.
    """
    findings = lint_export(path, target)
    errors = [finding for finding in findings if finding.severity == "error"]
    listed = "\n".join(f"  {finding}" for finding in findings)
    if errors:
        raise ValueError(f"{path} breaks {len(errors)} rule{'s' * (len(errors) > 1)}:\n{listed}")
    print(f"{path}: no error" + (f"\n{listed}" if listed else ""))


def find(run: str | Path) -> Path:
    """Return the checkpoint meant by a run folder or a file."""
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


def load_module(checkpoint: Path, trust: bool = False) -> tuple[DrafterModule, dict[str, Any]]:
    """Load the module a checkpoint was saved from, in eval mode, and the checkpoint's content."""
    content = read_checkpoint(checkpoint)
    facts = content.get("certdraft", {})
    if not facts.get("target") or not facts.get("config"):
        raise ValueError(
            f"{checkpoint} is not a checkpoint of `certdraft fit` on a trace: it names no target and config"
        )
    model = yaml.safe_load(facts["config"])["model"]
    refuse_foreign_classes(model, checkpoint, trust)
    path, _, name = model["class_path"].rpartition(".")
    kind = getattr(import_module(path) if path else drafter_module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, DrafterModule)):
        raise ValueError(f"{checkpoint} holds a {model['class_path']}, not a drafter")
    target, prefix = facts["target"], "drafter."
    _check_size(model["init_args"]["drafter"], target["target"], content["state_dict"], checkpoint)
    module = instantiate(model)
    source = target_source(
        target["target"],
        target["vocab_size"],
        load=lambda: load_target(target["target"], revision=target["target_revision"]),
        ends=lambda: load_target_ends(target["target"], revision=target["target_revision"]),
    )
    state = content["state_dict"].items()
    module.drafter.restore(source, {n.removeprefix(prefix): v for n, v in state if n.startswith(prefix)})
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"], strict=module.strict_loading)
    return module.eval(), content


def _check_size(drafter: dict[str, Any], target: str, state: dict[str, Any], checkpoint: Path) -> None:
    """Raise if the settings describe more weights than the checkpoint holds, before they are allocated."""
    described, held = drafter_sizes(drafter, target).trained, sum(value.numel() for value in state.values())
    if described > held:
        raise ValueError(
            f"{checkpoint} describes a drafter with {described:,} trained weights, but holds {held:,}; the "
            "two do not belong together"
        )


def instantiate(settings: dict[str, Any]) -> Any:
    """Make the object that a `class_path`, `init_args` pair of a config describes."""
    import pytorch_lightning as pl
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", fail_untyped=False)
    return parser.instantiate(parser.parse_object({"model": settings})).model


def card_facts(
    module: DrafterModule, content: dict[str, Any], name: str | None = None, license: str | None = None
) -> CardFacts:
    """Facts of the model card, from the settings, target and metrics in the checkpoint."""
    facts = content["certdraft"]
    settings, target = yaml.safe_load(facts["config"]), facts["target"]
    optimizer = settings["model"]["init_args"]["optimizer"]
    data = settings["data"]["init_args"]
    record = data.get("record") or {}
    metrics = dict(facts["metrics"])
    step = metrics.pop("step", None)
    if step is not None and step != content["global_step"]:
        metrics = {}  # measured on earlier weights than these
    training = {
        "steps": content["global_step"],
        "seed": settings["seed_everything"],
        "learning rate": optimizer["lr"],
        "batch": f"{data['batch_size']} rows of {data['seq_len']} tokens per device",
        "learned tokens in the trace": target["num_counted"],
    }
    architectures = None
    if module.drafter.taps:  # for formats that name the target's class
        architectures = target_config(target["target"], revision=target["target_revision"]).architectures
    return CardFacts(
        target=target["target"],
        target_architecture=architectures[0] if architectures else None,
        target_vocab_size=target["vocab_size"],
        tokenizer_fingerprint=target["tokenizer_fingerprint"],
        target_revision=target["target_revision"],
        target_weights=target.get("weights_origin"),
        name=name,
        loss=repr(module.loss),
        datasets=(record["corpus"]["source"],) if record else (),
        evaluated_on="the validation trace" + (f", at step {step}" if metrics and step is not None else ""),
        metrics=metrics,
        training=training,
        license=license,
    )
