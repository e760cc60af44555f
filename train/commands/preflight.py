"""What `certdraft fit` would refuse, found without weights: before a download, a recording or a queue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from certdraft.data import (
    TRACE_FILE,
    Recording,
    check_recording,
    check_settings,
    open_trace,
    recorded_sizes,
)
from certdraft.drafters import Drafter
from certdraft.losses import Loss, StepWeights
from certdraft.support import facts_of
from certdraft.train.commands.devices import lacks_gpu
from certdraft.train.default_loss import default_loss
from certdraft.train.drafter_setup import check_features, check_positions
from certdraft.train.loss_check import check_loss
from certdraft.train.optim import check_precision, check_steps
from certdraft.train.plan.model_sizes import meta_drafter, read_config
from certdraft.train.target_outputs import TargetSettings


def preflight(settings: dict[str, Any]) -> list[str]:
    """Check a resolved config of `certdraft fit`: traces, how they are recorded, drafter and target.

    The drafter's network is made on the meta device from the target's config.

    Returns:
        What was found, in a few words each.

    Raises:
        ValueError: what `fit` would refuse, with its own words.
        FileNotFoundError: the config of the target, or of a pretrained drafter, is not here and on no hub.
    """
    trainer, model = settings.get("trainer") or {}, _arguments(settings.get("model"))
    data = _arguments(settings.get("data"))
    if model.get("drafter"):
        check_precision(str(trainer.get("precision")))
        check_steps(int(trainer.get("max_steps") or 0))
    recording = _recording(data.get("record"))
    found = ["it asks for a GPU, and torch sees none here"] if lacks_gpu(trainer.get("accelerator")) else []
    metas, lengths = [], []
    for key in ("train", "validation"):
        if not (path := data.get(key)):
            continue
        if not (Path(path).expanduser() / TRACE_FILE).exists():
            if recording is None:
                raise ValueError(f"data.{key} {path} does not exist; record it with `certdraft trace`")
            found.append(f"{key} trace is recorded by the first run")
            continue
        if recording is not None:
            rows = data.get("validation_rows")
            held_out = replace(recording, corpus=recording.corpus.held_out("validation", rows))
            check_recording(Path(path).expanduser() / TRACE_FILE, recording if key == "train" else held_out)
        trace = open_trace(path)
        found.append(f"{key} trace of {trace.meta.num_tokens:,} tokens")
        metas.append(trace.meta)
        lengths += [int(trace.lengths.max())] if len(trace) else []
    beside = model.get("target")
    beside = beside.get("name") if isinstance(beside, dict) else beside
    target = beside or (metas[0].target if metas else recording.target if recording else None)
    if target is None or not model.get("drafter"):
        return found
    try:
        drafter = meta_drafter(model["drafter"], target)
    except FileNotFoundError as error:
        if recording is not None or beside is not None:
            raise
        return [*found, f"the drafter is not checked: {error}"]  # `fit` may not need more than the trace
    trainable = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    found.append(f"{type(drafter).__name__} for {target} with {trainable:,} trainable parameters")
    train = data.get("train")
    sizes = recorded_sizes(train, recording, data.get("num_kept")) if train else (None, None)
    _check_loss(model, drafter, *sizes)
    if beside is None:
        layers = metas[0].feature_layers if metas else recording.feature_layers if recording else ()
        if (data.get("server") or {}).get("url"):  # computes them while training
            layers = tuple(data.get("feature_layers") or ())
        check_features(drafter, layers, target)
    if lengths:
        check_positions(drafter, max(lengths), data.get("seq_len"))
    elif recording is not None:
        found += _may_be_too_long(recording)
    return found


def _check_loss(
    model: dict[str, Any], drafter: Drafter, num_kept: int | None, vocab_size: int | None
) -> None:
    """The loss and the step weights of a config, tried on made-up draft tokens."""
    parser = ArgumentParser(exit_on_error=False)
    for key, kind in (("loss", Loss), ("step_weights", StepWeights)):
        parser.add_subclass_arguments(kind, key, required=False)
    parser.add_argument("--target", type=TargetSettings | None)
    given = {key: model[key] for key in ("loss", "step_weights", "target") if model.get(key)}
    made = parser.instantiate(parser.parse_object(given))
    loss = made.get("loss") or default_loss(model.get("decoder") or "chain", drafter)
    check_loss(
        loss, made.get("step_weights"), paths=drafter.reads_target, num_kept=num_kept, vocab_size=vocab_size,
        online=made.get("target"), on_policy=bool(model.get("on_policy")),
    )  # fmt: skip


def _arguments(entry: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of a class entry, with or without its class path."""
    entry = entry or {}
    return (entry.get("init_args") or {}) if "class_path" in entry else entry


def _recording(record: dict[str, Any] | None) -> Recording | None:
    """The recording of `data.record`, checked against its target's config."""
    if not record:
        return None
    made = recording_of(record)
    read_config(made.target)
    check_settings(made)
    return made


def recording_of(record: dict[str, Any]) -> Recording:
    """The settings of `data.record` in a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recording, "record")
    return parser.instantiate(parser.parse_object({"record": record})).record


def _may_be_too_long(recording: Recording) -> list[str]:
    """A note where documents could outgrow the target, which their prompts decide."""
    generation, limit = recording.generation, facts_of(read_config(recording.target)).max_positions
    longest = min(recording.prompts.max_prompt_tokens + generation.max_new_tokens, generation.max_length)
    if limit is None or longest <= limit:
        return []
    return [f"documents may reach {longest} tokens, and {recording.target} has {limit} positions"]
