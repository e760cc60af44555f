"""The ledger of a recording in progress.

While a trace is being recorded its folder holds `.recording/`: the settings, a lock, and one note per
finished shard, and rows of shards that are not whole yet. A shard counts as written when its note exists;
`trace.json` appears last. So a kill at any moment costs at most the shards in progress, and the same command
goes on with the next one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.trace.arrow_trace import shard_problem, trace_schema
from certdraft.data.trace.recorded_row import RecordedRow, read_part, write_part, write_shard
from certdraft.data.trace.trace_metadata import TRACE_FILE, ShardInfo, TraceMeta
from certdraft.support import write_json

_FOLDER, _BEGUN = ".recording", "begun.json"
NOT_RECORDED = "not recorded, because the recording was closed before its end"


class RecordingError(ValueError):
    """Raised when a recording cannot start, go on or finish; the message says what to do."""


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Turn a full disk into a RecordingError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RecordingError(
            f"{file}: the disk is full ({error.strerror}); what was written before is intact. Free some "
            "space and run the same command again: it goes on with this file."
        ) from error


def _write_json(file: Path, content: Any) -> None:
    with _writing(file):
        write_json(file, content)


class Ledger:
    """The recording in one folder: what must be recorded, what is done, and who is writing.

    Args:
        folder: output folder; created, empty, an unfinished recording of the same settings, or a finished
            one.
        settings: everything that decides the trace's content. Compared when a recording goes on.
        num_shards: number of shards.
        lock: false for ranks that write on behalf of a process holding the lock.
        with_features: rows carry features of the target.
        complete: fills in settings that were not known when an older recording was begun.
        closing: keep the shards that lack prompts because the recording was closed before its end.

    Raises:
        RecordingError: the folder holds something else, or a recording with other settings, or is being
            written.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        num_shards: int,
        lock: bool = True,
        with_features: bool = False,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        closing: bool = False,
    ) -> None:
        self._complete, self._closing = complete, closing
        self.folder, self.notes, self.settings = folder, folder / _FOLDER, settings
        self.num_shards, self.schema = num_shards, trace_schema(with_features)
        self._lock = FileLock(self.notes / "lock") if lock else None
        if self._lock is not None:
            self._claim()

    def is_done(self, shard: int) -> bool:
        return self._note(shard).exists()

    def commit(self, shard: int, rows: Sequence[RecordedRow], accounting: Accounting) -> None:
        """Write a shard, then the note that marks it as written."""
        file = self.folder / shard_name(shard)
        with _writing(file):
            info = write_shard(file, rows, self.schema)
        _write_json(self._note(shard), asdict(info) | {"accounting": accounting.to_dict()})
        for part in self._parts(shard):
            part.unlink()

    def keep(self, shard: int, rows: Mapping[int, RecordedRow]) -> None:
        """Write some rows, at least one, by number of their prompt, of a shard that is not whole yet."""
        file = self.notes / f"{shard_name(shard)}.part-{min(rows)}"
        with _writing(file):
            write_part(file, rows, self.schema)

    def kept(self, shard: int) -> dict[int, RecordedRow]:
        """Read what `keep` wrote of a shard."""
        rows: dict[int, RecordedRow] = {}
        for part in self._parts(shard):
            rows |= read_part(part)
        return rows

    def shards(self, wanted: Iterable[int] | None = None) -> tuple[ShardInfo, ...]:
        """Finished shards in order; all of them must be there when it is not said which."""
        notes = [self._note(shard) for shard in (range(self.num_shards) if wanted is None else wanted)]
        missing = [note.name for note in notes if not note.exists()]
        if missing:
            raise RecordingError(
                f"{self.notes} lacks {missing[0]}: not every process writes to this folder; nodes must share "
                "it"
            )
        return tuple(ShardInfo(**json.loads(note.read_text(encoding="utf-8"))) for note in notes)

    def begin(self, meta: TraceMeta) -> None:
        """Note what the trace is known to be before its shards are, for `begun_meta`."""
        _write_json(self.notes / _BEGUN, asdict(meta))

    def finish(self, meta: TraceMeta) -> None:
        """Make the folder a trace: files for `datasets`, then `trace.json`, then the notes go."""
        write_datasets_files(self.folder, meta, self.schema)
        _write_json(self.folder / TRACE_FILE, meta.to_dict())
        self.close()

    def finished(self) -> TraceMeta | None:
        """The metadata, when the folder is a whole trace already."""
        file = self.folder / TRACE_FILE
        if not file.exists() or not all(self.is_done(shard) for shard in range(self.num_shards)):
            return None
        return TraceMeta.read(file)

    def close(self) -> None:
        """Remove the notes and the lock; only for a whole trace."""
        shutil.rmtree(self.notes, ignore_errors=True)
        self.release()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _parts(self, shard: int) -> list[Path]:
        return sorted(self.notes.glob(f"{shard_name(shard)}.part-*"))

    def _note(self, shard: int) -> Path:
        return self.notes / f"{shard_name(shard)}.json"

    def _claim(self) -> None:
        assert self._lock is not None
        refuse_foreign_content(self.folder)
        self.notes.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RecordingError(
                f"{self.folder} is being written by another process (it holds {self._lock.lock_file}); "
                "wait for it, or choose another folder"
            ) from error
        try:
            self._resume()
        except BaseException:
            self.close() if (self.folder / TRACE_FILE).exists() else self.release()
            raise

    def _resume(self) -> None:
        file = self.notes / "settings.json"
        if (self.folder / TRACE_FILE).exists():
            self._reopen()
        elif any(self.is_done(shard) or self._parts(shard) for shard in range(self.num_shards)):
            self._refuse_difference(json.loads(file.read_text(encoding="utf-8")), "an unfinished recording")
        _write_json(file, self.settings)
        for shard in range(self.num_shards):  # a note vouches for its file only while the file is as it was
            note = self._note(shard)
            if note.exists():
                info = ShardInfo(**json.loads(note.read_text(encoding="utf-8")))
                lacking = NOT_RECORDED in info.accounting.get("skipped", {}) and not self._closing
                if lacking or shard_problem(self.folder / info.file, info, "full") is not None:
                    note.unlink()
        for leftover in (*self.folder.glob(".*.tmp"), *self.notes.glob(".*.tmp")):
            leftover.unlink()
        for shard_file in self.folder.glob("shard-*.arrow"):
            if not (self.notes / f"{shard_file.name}.json").exists():
                shard_file.unlink()

    def _reopen(self) -> None:
        """Make a finished trace a recording again: its damaged and lacking shards are recorded again."""
        file = self.folder / TRACE_FILE
        meta = TraceMeta.read(file)
        self._refuse_difference(meta.settings, "a trace")
        for info in meta.shards:
            _write_json(self.notes / f"{info.file}.json", asdict(info))

    def _refuse_difference(self, recorded: dict[str, Any], what: str) -> None:
        now, then = _flat(self.settings), _flat(self._complete(recorded))
        keys = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
        if keys:
            shown = "; ".join(f"{k}: {then.get(k)} there, {now.get(k)} now" for k in keys[:4])
            raise RecordingError(
                f"{self.folder} holds {what} with other settings ({shown}{'; …' if len(keys) > 4 else ''}). "
                "Use the same settings to go on, or give another folder."
            )


def refuse_foreign_content(folder: Path) -> None:
    """Raise a RecordingError for a folder that holds anything but a recording or a trace."""
    if folder.exists() and not folder.is_dir():
        raise RecordingError(f"{folder} is a file; give a folder that is empty or does not exist yet")
    if not folder.is_dir() or (folder / _FOLDER).is_dir() or (folder / TRACE_FILE).exists():
        return
    other = sorted(path.name for path in folder.iterdir())
    if other:
        raise RecordingError(
            f"{folder} already holds {', '.join(other[:3])}{' …' if len(other) > 3 else ''}; "
            "give a folder that is empty or does not exist yet"
        )


def begun_meta(folder: Path) -> TraceMeta:
    """What `Ledger.begin` noted in the folder of an unfinished recording.

    Raises:
        RecordingError: there is no such recording, or it recorded nothing yet.
    """
    file = folder / _FOLDER / _BEGUN
    if not file.is_file():
        raise RecordingError(
            f"{folder} holds no unfinished recording that could be closed; record one first, with "
            "`certdraft trace --out_dir` and this folder"
        )
    noted = json.loads(file.read_text(encoding="utf-8"))
    layers = tuple(noted.pop("feature_layers"))
    return TraceMeta(**noted | {"shards": (), "feature_layers": layers})


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.arrow"


def write_datasets_files(folder: Path, meta: TraceMeta, schema: pa.Schema) -> None:
    """Write `state.json` and `dataset_info.json`, so that `datasets.load_from_disk` reads the folder."""
    from datasets import DatasetInfo, Features

    info = DatasetInfo(
        description=f"certdraft trace of {meta.target}", features=Features.from_arrow_schema(schema)
    )
    _write_json(folder / "dataset_info.json", {k: v for k, v in asdict(info).items() if v is not None})
    files = [{"filename": shard.file} for shard in meta.shards]
    fingerprint = meta.shards[0].sha256[:16] if meta.shards else "0" * 16
    state: dict[str, Any] = {
        "_data_files": files,
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
    }
    _write_json(
        folder / "state.json", state | {"_format_type": None, "_output_all_columns": False, "_split": None}
    )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
