"""TraceDataModule: packed batches from traces, which are recorded first where they are missing."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Int64
from numpy import ndarray

from certdraft.data.batches.batch import Batch
from certdraft.data.batches.feature_stream import FeatureStream
from certdraft.data.batches.loader import ResumableLoader
from certdraft.data.batches.packing import Packing, assemble, pack
from certdraft.data.record.recording import Recording, with_defaults
from certdraft.data.record.server.http_server import Server
from certdraft.data.record.writer import record_trace
from certdraft.data.trace.arrow_trace import Trace, open_trace
from certdraft.data.trace.trace_metadata import TRACE_FILE, TraceError, TraceMeta


class TraceDataModule(pl.LightningDataModule):
    """Packed batches of a training trace and of a validation trace.

    Args:
        train: folder of the training trace.
        validation: folder of the validation trace; without it `validation_fraction` of the training
            documents, chosen by a hash of their tokens, are held out. Windows of one text may then lie on
            both sides, so two traces of two corpus splits are the cleaner choice.
        validation_fraction: share of the documents held out when `validation` is not given, in (0, 1).
        seq_len: tokens a row.
        batch_size: rows a batch, on each device.
        num_kept: top-k entries per token position to load; all that the trace keeps when not given.
        seed: of the order of rows.
        verify: "sizes" checks the traces' files at once, "full" hashes them (a second per GB).
        record: how to record traces that do not exist yet; the training trace from the corpus split that it
            names, the validation trace from split "validation".
        validation_rows: most corpus rows for a validation trace that `record` makes.
        feature_layers: target layers whose outputs to load; all that the trace holds when not given, none for
            an empty list.
        test: folder of the trace that `certdraft test` measures on; when not given, `test` beside the
            training trace, which `record` makes from the corpus split "test" if it does not exist.
        prefetch: batches made in threads while a step runs, in pinned memory for a CUDA device; the order of
            batches and resuming do not depend on it.
        server: with a url, vLLM servers that compute the features of `feature_layers` for every batch, at
            most `prefetch` + 1 batches ahead; they are not stored, and the trace need not hold any.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        validation_fraction: float = 0.05,
        seq_len: int = 512,
        batch_size: int = 8,
        num_kept: int | None = None,
        seed: int = 0,
        verify: Literal["sizes", "full"] = "sizes",
        record: Recording | None = None,
        validation_rows: int | None = 256,
        feature_layers: list[int] | None = None,
        test: str | None = None,
        prefetch: int = 2,
        server: Server = Server(),  # noqa: B008, frozen
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction is {validation_fraction}; give a number between 0 and 1")
        self.train_path, self.validation_path = train, validation
        self.validation_fraction, self.seq_len, self.batch_size = validation_fraction, seq_len, batch_size
        self.num_kept, self.seed, self.verify = num_kept, seed, verify
        self.feature_layers = feature_layers
        self.record, self.validation_rows, self.prefetch = record, validation_rows, prefetch
        self.test_path = test or str(Path(train).expanduser().parent / "test")
        if server.urls and not feature_layers:
            raise ValueError("data.server computes features: name the layers as data.feature_layers")
        self.server = server
        self._streams: list[FeatureStream] = []
        self._opened = False

    # ---- Lightning hooks

    def prepare_data(self) -> None:
        """Record what is missing; a trace that exists must have been recorded with the same settings."""
        if self.record is None:
            return
        _record_if_missing(self.train_path, self.record)
        if self.validation_path is not None:
            corpus = self.record.corpus.held_out("validation", self.validation_rows)
            _record_if_missing(self.validation_path, replace(self.record, corpus=corpus))
        testing = self.trainer is not None and self.trainer.state.fn == "test"
        if testing and not (Path(self.test_path).expanduser() / TRACE_FILE).exists():
            corpus = self.record.corpus.held_out("test", self.validation_rows)
            _record_if_missing(self.test_path, replace(self.record, corpus=corpus))

    def setup(self, stage: str | None = None) -> None:
        """Open and pack the traces, and print how many tokens there are."""
        if self._opened:
            return
        self.train_trace = open_trace(self.train_path, self.verify)
        documents = np.arange(len(self.train_trace))
        if self.validation_path is None:
            held_out = held_out_documents(self.train_trace, self.validation_fraction)
            self.validation_trace = self.train_trace
            validation_documents, documents = documents[held_out], documents[~held_out]
        else:
            self.validation_trace = open_trace(self.validation_path, self.verify)
            self.validation_trace.check_tokenizer(self.tokenizer_fingerprint, "the training trace's")
            validation_documents = np.arange(len(self.validation_trace))
        self.documents = {"train": documents, "validation": validation_documents}
        self.train_packing = self._pack(self.train_trace, documents, "train", in_order=False)
        self.validation_packing = self._pack(
            self.validation_trace, validation_documents, "validation", in_order=True
        )
        self._opened = True
        if self.trainer is None or self.trainer.is_global_zero:
            print(self.summary(), file=sys.stderr)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.train_trace, self.train_packing, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        """Validation rows, documents in their order, every one of them."""
        return self._loader(self.validation_trace, self.validation_packing, shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        """Test rows, documents in their order, every one of them."""
        if not (Path(self.test_path).expanduser() / TRACE_FILE).exists():
            raise TraceError(
                f"no test trace at {self.test_path}; name one with --data.test, recorded by `certdraft trace "
                "--corpus.split test`"
            )
        trace = open_trace(self.test_path, self.verify)
        trace.check_tokenizer(self.tokenizer_fingerprint, "the training trace's")
        packing = self._pack(trace, np.arange(len(trace)), "test", in_order=True)
        return self._loader(trace, packing, shuffle=False)

    def teardown(self, stage: str | None = None) -> None:
        """Let go of the servers."""
        while self._streams:
            self._streams.pop().close()

    @property
    def meta(self) -> TraceMeta:
        """Metadata of the training trace, with the features that servers add to it."""
        meta = self.train_trace.meta
        if not self.server.urls:
            return meta
        return replace(meta, feature_layers=tuple(self.feature_layers or ()))

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.train_trace.meta.tokenizer_fingerprint

    def summary(self) -> str:
        """Documents, tokens, learned positions and packing efficiency of both traces."""
        lines = []
        for name in ("train", "validation"):
            trace, packing = getattr(self, f"{name}_trace"), getattr(self, f"{name}_packing")
            documents = np.unique(packing.pieces[:, 0])
            left_out = f", {packing.left_out:,} pieces without any left out" if packing.left_out else ""
            lines.append(
                f"{name}: {len(documents):,} documents, {packing.num_tokens:,} tokens "
                f"({int(trace.counted[documents].sum()):,} learned{left_out}) "
                f"in {packing.num_rows:,} rows of {packing.seq_len}, {packing.efficiency:.1%} full"
            )
        return "\n".join(lines)

    def _pack(self, trace: Trace, documents: Int64[ndarray, " n"], name: str, *, in_order: bool) -> Packing:
        if not len(documents):
            raise TraceError(
                f"{trace.path}: no document is left for {name}; record more rows, change "
                "validation_fraction, or give a validation trace"
            )
        counted = trace.counted

        def is_learned(document: int, start: int, length: int) -> bool:
            index = int(documents[document])
            if length == trace.lengths[index] or not counted[index]:
                return bool(counted[index])
            return bool(trace.columns(index).loss_mask[start : start + length].any())

        packing = pack(trace.lengths[documents], self.seq_len, in_order=in_order, keep=is_learned)
        if not packing.num_rows:
            raise TraceError(f"{trace.path}: nothing in it is to be learned; record it again")
        packing.pieces[:, 0] = documents[packing.pieces[:, 0]]
        return packing

    def _stream(self, trace: Trace) -> FeatureStream | None:
        """Features of a trace's documents from the servers, which are checked here; None without servers."""
        if not self.server.urls:
            return None
        for stream in self._streams:
            if stream.trace is trace:
                return stream
        stream = FeatureStream(trace, tuple(self.feature_layers or ()), self.server)
        self._streams.append(stream)
        stream.check()
        return stream

    def _loader(self, trace: Trace, packing: Packing, *, shuffle: bool) -> ResumableLoader:
        to_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        stream = self._stream(trace)

        def fetch(rows: Int64[ndarray, " R"]) -> Batch:
            streamed = None
            if stream is not None:
                documents = np.concatenate([packing.row(row)[:, 0] for row in rows])
                streamed = stream.of_documents(np.unique(documents))
            batch = assemble(
                trace, packing, rows, self.num_kept, self.feature_layers, narrow=to_cuda, streamed=streamed
            )
            return batch.pin_memory() if to_cuda else batch

        return ResumableLoader(
            packing.num_rows,
            self.batch_size,
            fetch,
            seed=self.seed,
            shuffle=shuffle,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
            ahead=self.prefetch,
            uncounted=lambda batch: replace(batch, loss_mask=torch.zeros_like(batch.loss_mask)),
        )


def held_out_documents(trace: Trace, fraction: float) -> ndarray:
    """Boolean mask over documents: held out by a hash of their tokens, so the same on every machine."""
    parts = [
        int.from_bytes(hashlib.sha256(trace.columns(i).input_ids.tobytes()).digest()[:8], "big") / 2**64
        for i in range(len(trace))
    ]
    return np.asarray(parts) < fraction


def _record_if_missing(path: str, recording: Recording) -> None:
    file = Path(path).expanduser() / TRACE_FILE
    if not file.exists():
        record_trace(path, **{name: getattr(recording, name) for name in Recording.__dataclass_fields__})
        return
    check_recording(file, recording)


def recorded_sizes(
    train: str, recording: Recording | None, num_kept: int | None = None
) -> tuple[int | None, int | None]:
    """K and V of a training trace; of one that is yet to be recorded only K is known.

    Args:
        train: folder of the trace.
        recording: how it is recorded where it is missing.
        num_kept: top-k logits to read of it, all when not given.
    """
    file = Path(train).expanduser() / TRACE_FILE
    if not file.exists():
        return (None if recording is None else num_kept or recording.num_kept), None
    meta = TraceMeta.read(file)
    return num_kept or meta.num_kept, meta.vocab_size


def check_recording(file: Path, recording: Recording) -> None:
    """Raise TraceError if the trace of `file`, its trace.json, was recorded with other settings."""
    then, now = with_defaults(TraceMeta.read(file).settings), recording.settings()
    if differing := list(_differing(then, now)):
        raise TraceError(
            f"{file} was recorded with other settings ({'; '.join(differing)}). Delete the folder to record "
            "it again, name another folder, or leave `record` out to use the trace as it is."
        )


def _differing(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """Each setting that differs, under its dotted key."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name, value in now.items():
            yield from _differing(then.get(name), value, f"{key}.{name}" if key else name)
    elif then != now:
        yield f"{key}: {then} there, {now} now"
