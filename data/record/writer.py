"""Recording a trace under the Lightning Trainer: `predict` runs the target, a callback writes the shards.

A shard is recorded by itself: which rows are in it, and which are continued side by side, depends only on
the settings. So a recording that was killed and resumed, or that several processes share, ends in the same
bytes as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter

from certdraft.data.corpus.chat import Prompts, PromptSet
from certdraft.data.corpus.corpora import Corpus, corpus_of_rows
from certdraft.data.record.generation import LogitHead, eos_ids_of, record_prompts
from certdraft.data.record.interruption import Stopped, StopSignals
from certdraft.data.record.learned_positions import Generation
from certdraft.data.record.recording import (
    DType,
    Recording,
    account,
    check_disk,
    check_fit,
    check_settings,
    close_recording,
    finish_trace,
    meta_without_shards,
    open_ledger,
    read_prompts,
    recorded_settings,
    shard_prompts,
)
from certdraft.data.record.server.http_server import Server
from certdraft.data.record.server.serve_command import serve_command
from certdraft.data.record.server.server_writer import record_from_server
from certdraft.data.targets import load_target, load_tokenizer
from certdraft.data.trace.recorded_row import RecordedRow
from certdraft.data.trace.shards import Ledger, RecordingError, refuse_foreign_content
from certdraft.data.trace.trace_metadata import TRACE_FILE, TraceMeta
from certdraft.support import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT = Recording()


def record_trace(
    out_dir: str,
    target: str = _DEFAULT.target,
    corpus: Corpus = _DEFAULT.corpus,
    prompts: Prompts = _DEFAULT.prompts,
    generation: Generation = _DEFAULT.generation,
    tokenizer: str | None = None,
    revision: str | None = None,
    dtype: DType = "float32",
    num_kept: int = 32,
    batch_size: int = 32,
    shard_rows: int = 256,
    feature_layers: tuple[int, ...] = (),
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    server: Server = Server(),  # noqa: B008, frozen
    rows: Iterable[Mapping[str, Any]] | None = None,
    finish: bool = False,
) -> TraceMeta:
    """Record a target's top-k logits along its own greedy continuations of a corpus.

    Killed at any moment, the same command goes on at the next unwritten shard; on a finished trace it records
    damaged shards again and keeps whole ones. Ctrl-C and SIGTERM end it within seconds.

    Args:
        out_dir: folder of the trace: new, empty, or an unfinished recording with the same settings.
        target: "embedded", a local folder, or a hub name such as "Qwen/Qwen3-8B".
        corpus: which rows to read.
        prompts: how rows become token ids.
        generation: how the target continues prompts, and which token positions are learned.
        tokenizer: where the tokenizer is, when not beside the target.
        revision: hub revision of the target.
        dtype: dtype of the target's weights, which a CPU holds twice (see `support.pack_linears`); logits are
            fp32 whatever it is.
        num_kept: K, top-k logits kept per token position.
        batch_size: prompts continued side by side.
        shard_rows: prompts per shard; a killed recording loses at most the shard in progress.
        feature_layers: 0-based target layers whose outputs are kept in bf16, for drafters that read them
            (`Drafter.taps`); each costs 2 H bytes a token, so lower `shard_rows`: a shard is held in memory.
        accelerator: Lightning accelerator.
        devices: processes per node; each writes its own shards.
        num_nodes: nodes; they must share `out_dir`.
        strategy: Lightning strategy.
        server: with a url, an inference server that runs the target in this command's place; `target` then
            names its tokenizer and config, and dtype, batch_size and devices mean nothing.
        rows: rows to record instead of a corpus, all of them: a list of `{"text": ...}`, `{"prompt": ...}` or
            `{"messages": [...]}`, or a `datasets.Dataset`. They are kept in `out_dir`.rows.jsonl.
        finish: record nothing more: close the unfinished recording in `out_dir`, so that what it holds can be
            used. trace.json counts the prompts that were not recorded. Needs no other argument, and the
            command that began the recording can still go on.

    Returns:
        The metadata of the finished trace.

    Raises:
        ValueError: bad rows, a target that cannot be recorded, a folder in use, a disk too small.
        FileNotFoundError: no such corpus, target or tokenizer.
    """
    folder = Path(out_dir).expanduser()
    if finish:
        return close_recording(folder)
    if rows is not None:
        if corpus != _DEFAULT.corpus:
            raise ValueError("give either corpus or rows; both were given")
        corpus = corpus_of_rows(rows, folder.with_name(f"{folder.name}.rows.jsonl"))
    recording = Recording(
        target, corpus, prompts, generation, tokenizer, revision, dtype, num_kept, batch_size, shard_rows,
        tuple(feature_layers),
    )  # fmt: skip
    check_settings(recording)
    refuse_foreign_content(folder)
    if server.url is not None:
        return record_from_server(folder, recording, server)
    if server.features_dir is not None and feature_layers:
        raise RecordingError(
            "server.features_dir is given without server.url. Start a server with\n"
            f"{serve_command(recording, server.features_dir)}\nand give its address as server.url"
        )
    trainer = _quiet_trainer(accelerator, devices, num_nodes, strategy)

    words = load_tokenizer(tokenizer or target, revision=revision)
    prompt_set, accounting = read_prompts(recording, words, trainer.is_global_zero)
    settings = recorded_settings(recording, prompt_set, words)
    ledger = open_ledger(folder, settings, lock=trainer.is_global_zero)
    try:
        meta = ledger.finished() if trainer.world_size == 1 else None
        if meta is not None:
            ledger.close()
            return meta
        if trainer.is_global_zero:
            print(accounting, file=sys.stderr)
            check_disk(folder, ledger, prompt_set, recording)
        model = load_target(target, revision=revision, dtype=getattr(torch, dtype))
        num_embeddings = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        check_fit(prompt_set, recording, num_embeddings, model.config)
        begun = meta_without_shards(
            recording, settings, accounting, vocab_size=model.get_output_embeddings().weight.shape[0],
            dtype=dtype, versions={"pytorch-lightning": version("pytorch-lightning")},
        )  # fmt: skip
        launcher = trainer.strategy.launcher
        signals = StopSignals(getattr(launcher, "kill", None))  # the processes that a launcher started
        recorder = _Recorder(model, words, prompt_set, ledger, recording, signals)
        trainer.callbacks.append(_ShardWriter(ledger, recorder, begun))  # type: ignore[attr-defined]
        with _expected_noise():
            trainer.predict(recorder, dataloaders=_Shards(ledger, trainer), return_predictions=False)
        return TraceMeta.read(folder / TRACE_FILE)
    except Stopped:
        raise signals.exit(folder) from None
    finally:
        ledger.release()


class _Shards:
    """The unwritten shards of this process.

    Without a length: a process whose shards are all done must still take part in the final barrier.
    """

    def __init__(self, ledger: Ledger, trainer: pl.Trainer) -> None:
        self.ledger, self.trainer = ledger, trainer

    def __iter__(self) -> Iterator[int]:
        own = range(self.trainer.global_rank, self.ledger.num_shards, self.trainer.world_size)
        return (shard for shard in own if not self.ledger.is_done(shard))


class _Recorder(pl.LightningModule):
    """Run the target on the prompts of one shard."""

    progress: Progress  # entered by `_ShardWriter`

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptSet,
        ledger: Ledger,
        recording: Recording,
        signals: StopSignals,
    ) -> None:
        super().__init__()
        self.target, self.prompts, self.ledger, self.recording = target, prompts, ledger, recording
        self.signals = signals
        self.eos_ids = eos_ids_of(target, tokenizer)
        self.logit_head: LogitHead | None = None

    def transfer_batch_to_device(self, batch: int, device: torch.device, dataloader_idx: int) -> int:
        return batch

    def prompts_of(self, shard: int) -> list[int]:
        """Numbers of the prompts of a shard."""
        return shard_prompts(shard, self.recording.shard_rows, len(self.prompts)).tolist()

    def predict_step(self, batch: int) -> dict[int, RecordedRow]:
        if self.logit_head is None:  # after Lightning has moved the target to its device
            self.logit_head = LogitHead(self.target)
        numbers, rows = self.prompts_of(batch), dict[int, RecordedRow]()
        recorded = record_prompts(
            self.target,
            self.logit_head,
            [self.prompts[number] for number in numbers],
            self.recording.generation,
            batch_size=self.recording.batch_size,
            num_kept=self.recording.num_kept,
            eos_ids=self.eos_ids,
            feature_layers=self.recording.feature_layers,
        )
        try:
            while True:
                with self.signals.interruptible():
                    if (found := next(recorded, None)) is None:
                        return rows
                index, row = found
                rows[numbers[index]] = row
                self.progress.advance(1, len(row.input_ids))
        except Stopped:
            if rows:
                self.ledger.keep(batch, self.ledger.kept(batch) | rows)
            raise


class _ShardWriter(BasePredictionWriter):
    """Commit every shard; at the end rank 0 turns the folder into a trace."""

    def __init__(self, ledger: Ledger, recorder: _Recorder, begun: TraceMeta) -> None:
        super().__init__(write_interval="batch")
        self.ledger, self.recorder, self.begun = ledger, recorder, begun

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.ledger.begin(self.begun)
        self.recorder.signals.__enter__()  # after the Trainer has set its own
        waiting = sum(len(self.recorder.prompts_of(shard)) for shard in _Shards(self.ledger, trainer))
        self.recorder.progress = Progress("recording", waiting, "prompts", enabled=trainer.is_global_zero)
        self.recorder.progress.__enter__()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: dict[int, RecordedRow],
        batch_indices: Any,
        batch: int,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        rows, accounting = account([row for _, row in sorted(prediction.items())])
        self.ledger.commit(batch, rows, accounting)
        if self.recorder.signals.number is not None:
            raise Stopped

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()
        trainer.strategy.barrier("all shards written")
        if trainer.is_global_zero:
            finish_trace(self.ledger, self.begun, self.ledger.shards())
        trainer.strategy.barrier("trace finished")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    def _end(self) -> None:
        self.recorder.signals.__exit__()
        if hasattr(self.recorder, "progress"):
            self.recorder.progress.__exit__(None, None, None)


def _quiet_trainer(accelerator: str, devices: int, num_nodes: int, strategy: str) -> pl.Trainer:
    with _expected_noise():
        return pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


@contextlib.contextmanager
def _expected_noise() -> Iterator[None]:
    """Silence Lightning's messages about devices, and its warning that it cannot see batch indices."""
    log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        log.setLevel(level)
