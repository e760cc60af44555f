"""fit, validate and test: LightningCLI with strict parsing, run folders and exact resuming."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

# Imported so that a config may call their classes by their short names.
import certdraft.data
import certdraft.drafters
import certdraft.losses
from certdraft.train.commands.devices import check_devices
from certdraft.train.commands.parsing.parser import Strict, check_syntax
from certdraft.train.compiling import CompileLayers as CompileLayers
from certdraft.train.drafter_module import DrafterModule
from certdraft.train.loss_check import check_loss
from certdraft.train.runs import run_folder
from certdraft.train.runs.checkpoint_file import WholeCheckpointIO, first_whole
from certdraft.train.runs.loggers import Speed, name_loggers
from certdraft.train.runs.metrics_csv import RunMetrics
from certdraft.train.runs.progress_bar import RunProgress
from certdraft.train.runs.run_callbacks import GracefulStop, Provenance, RunCheckpoint, RunFolder, StepRNG
from certdraft.train.runs.trackio_logger import TrackioLogger as TrackioLogger
from certdraft.train.target_module import TargetModule as TargetModule

_DEFAULT_CLASS = {"model": DrafterModule, "data": certdraft.data.TraceDataModule}
_NOISE = ("litlogger", "GPU available", "TPU available", "HPU available", "💡", "Seed set to", "max_steps=")


class StrictLightningParser(Strict, LightningArgumentParser):
    """Parser of the Trainer's commands."""


class CertdraftCLI(LightningCLI):
    """LightningCLI with run folders and exact resuming.

    `--name` and `--runs_dir` decide the run's folder; `--ckpt_path last` (or best) finds the newest
    checkpoint of that name and goes on in its folder; settings that differ from the checkpoint's are refused
    unless `--allow_change` names them. Reseeding, checkpoints, metrics.csv and a progress bar are always on.
    """

    locks: contextlib.ExitStack  # on the run's folder, until the command ends
    folder: Path | None = None  # of this run; None for commands that leave nothing behind
    checkpoint: Path | None = None
    resuming = False  # asked to, whether there is a checkpoint or not
    resume_step = 0
    tabulate = False  # print the metrics of validate or test

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="name of the run; the config's file name"
        )
        parser.add_argument("--runs_dir", type=str, default="runs", help="parent of all run folders")
        parser.add_argument(
            "--allow_change",
            type=list[str],
            default=[],
            help="settings a resumed run may change (dotted keys, *)",
        )
        parser.add_class_arguments(RunCheckpoint, "checkpoint")
        parser.set_defaults({key: {"class_path": _path(cls)} for key, cls in _DEFAULT_CLASS.items()})

    def before_instantiate_classes(self) -> None:
        settings = self._settings()
        settings.name = _name(settings, str(self.subcommand))
        if settings.get("weights_only") is False:
            raise ValueError("weights_only: false would run code from the checkpoint; leave the key out")
        settings.weights_only = True
        check_devices(settings.trainer.accelerator, settings.trainer.devices)
        if self.subcommand in ("validate", "test"):  # Lightning's own table has sixteen digits
            self.tabulate, settings.verbose = settings.verbose, False
        if self.checkpoint is not None:
            self._compare_with_checkpoint(self.checkpoint)
        self.folder = self._choose_folder(settings)
        if self.folder is not None:
            run_folder.pass_on(self.folder)
            if settings.trainer.default_root_dir is None:
                settings.trainer.default_root_dir = str(self.folder)
            name_loggers(settings.trainer.logger, self.folder)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self._get(self.config_init, "trainer", default={})
        text, settings = self._resolved()
        own: list[pl.Callback] = []
        if given.get("enable_progress_bar") is not False:
            own.append(RunProgress())
        if self.subcommand == "fit":
            own += [StepRNG(), GracefulStop(), Provenance(text), Speed()]
        if self.folder is not None:
            own.append(RunFolder(self.folder, text, settings))
            named = [c for c in given.get("callbacks") or [] if isinstance(c, ModelCheckpoint)]
            if given.get("enable_checkpointing") is not False and not named:
                checkpoint = self._get(self.config_init, "checkpoint")
                checkpoint.dirpath = checkpoint.dirpath or str(self.folder / "checkpoints")
                own.append(checkpoint)
            metrics = RunMetrics(self.folder, self.resume_step)
            logger = given.get("logger")
            kwargs["logger"] = False if logger is False else [*_as_list(logger), metrics]
        elif given.get("logger") in (None, True):
            kwargs["logger"] = False
        kwargs["plugins"] = [*_as_list(given.get("plugins")), WholeCheckpointIO()]
        callbacks = [*(_as_list(given.get("callbacks"))), *own]
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def before_fit(self) -> None:
        """Refuse a loss that the first step would refuse, before a recording of hours."""
        model, data = self.model, self.datamodule
        if isinstance(model, DrafterModule) and isinstance(data, certdraft.data.TraceDataModule):
            num_kept, vocab_size = certdraft.data.recorded_sizes(data.train_path, data.record, data.num_kept)
            check_loss(
                model.loss, model.step_weights, paths=model.drafter.reads_target, num_kept=num_kept,
                vocab_size=vocab_size, online=None if model.online is None else model.online.settings,
                on_policy=model.on_policy is not None,
            )  # fmt: skip

    def after_validate(self) -> None:
        self._print_metrics()

    def after_test(self) -> None:
        self._print_metrics()

    def _print_metrics(self) -> None:
        """One line for each metric, on the first rank."""
        if self.tabulate and self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name:30} {float(value):8.4f}")

    def _parse_ckpt_path(self) -> None:
        """Resolve "last" and "best"; unlike Lightning's method it takes no settings from the checkpoint."""
        if not self.config.get("subcommand"):
            return
        command, settings = self.config.subcommand, self.config[self.config.subcommand]
        given = settings.get("ckpt_path")
        if not given:
            return
        if given not in ("last", "best"):
            if not Path(given).exists():
                raise FileNotFoundError(f"--ckpt_path {given}: no such checkpoint; try --ckpt_path last")
            if Path(given).is_dir() and not Path(given, "meta.pt").exists():  # FSDP2 writes a folder
                raise ValueError(
                    f"--ckpt_path: {given} is a folder; give the .ckpt file in it, or --ckpt_path last"
                )
            self.checkpoint = first_whole([Path(given)])
            return
        self.resuming = True
        where = Path(settings.runs_dir, _name(settings, command))
        self.checkpoint = run_folder.find_checkpoint(where, given)
        settings.ckpt_path = None if self.checkpoint is None else str(self.checkpoint)
        if self.checkpoint is None and command == "fit" and given == "last":
            print(f"no last.ckpt under {where} yet: starting from the beginning", file=sys.stderr)
        elif self.checkpoint is None:
            raise FileNotFoundError(f"no {given}.ckpt under {where}; train first, or name a checkpoint file")

    def _compare_with_checkpoint(self, checkpoint: Path) -> None:
        settings = self._resolved()[1]
        if self.subcommand == "fit":
            run_folder.refuse_changed(checkpoint, settings, self._settings().allow_change)
            self.resume_step = run_folder.step_of(checkpoint)
        else:  # other commands load weights only: the drafter must be the same
            free = tuple(
                f"model.init_args.{key}"
                for key in ("optimizer.*", "validation.*", "loss*", "decoder", "step_weights*", "on_policy*")
            )
            allowed = (*free, *self._settings().allow_change)
            run_folder.refuse_changed(checkpoint, {"model": settings.get("model")}, allowed, only="model.")

    def _choose_folder(self, settings: Namespace) -> Path | None:
        if self.subcommand != "fit" or settings.trainer.fast_dev_run:
            return None
        own = None if self.checkpoint is None else run_folder.run_folder(self.checkpoint)
        folder = own or run_folder.new_run_folder(settings.runs_dir, settings.name)
        if not run_folder.is_other_rank():
            self.locks.enter_context(run_folder.held(folder))
            if own is None:
                run_folder.refuse_other_run(folder, self._resolved()[1], self.resuming)
        return folder

    def _settings(self) -> Namespace:
        return self.config[self.subcommand]

    def _resolved(self) -> tuple[str, dict[str, Any]]:
        """The settings of this command as YAML and as plain data."""
        config = copy.deepcopy(self._settings())
        text = self._parser(self.subcommand).dump(config, skip_none=False, skip_link_targets=False)
        return text, yaml.safe_load(text)


def run(name: str, args: list[str], prog: str) -> None:
    """Run one of the Trainer's commands with arguments as typed."""
    _quieten()
    check_syntax(args)
    skipped = CertdraftCLI.subcommands()[name]

    class OneCommand(CertdraftCLI):
        """Only the parser that is needed: each takes a second to build."""

        locks = contextlib.ExitStack()

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {name: skipped}

    with OneCommand.locks:
        OneCommand(
            pl.LightningModule,
            pl.LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"prog": prog.rpartition(" ")[0]},
            parser_class=StrictLightningParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=[name, *args],
        )


def _name(settings: Namespace, command: str) -> str:
    """The run's name: as given, or the first config file's."""
    files = [str(getattr(file, "relative", file)) for file in settings.get("config") or []]
    return settings.name or (Path(files[0]).stem if files else command)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _as_list(value: Any) -> list[Any]:
    if value is None or value is True or value is False:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _quieten() -> None:
    """Silence adverts and device lists of Lightning, and warnings that do not apply here."""
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "lightning_fabric.utilities.seed",
        "lightning_fabric",
    ):
        logging.getLogger(name).addFilter(_is_news)
    for message in (
        ".*does not have many workers.*",  # loading is mapping memory
        ".*isinstance\\(treespec, LeafSpec\\).*",
        "The number of training batches .* is smaller than the logging interval.*",
        "LightningCLI's args parameter is intended.*",
        "Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its folder
        "Be aware that when using `ckpt_path`, callbacks.*",  # validate needs none of them
    ):
        warnings.filterwarnings("ignore", message=message)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _NOISE)
