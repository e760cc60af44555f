"""From a corpus to batches: rows, prompts, the target's trace, packing and loading; and the embedded target.

Names that need Lightning or transformers are imported when first used, so that opening a trace stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from certdraft.data.batch import Batch
from certdraft.data.packing import Packing, assemble, pack
from certdraft.data.trace import Trace, TraceError, TraceMeta, TraceRow, open_trace

if TYPE_CHECKING:
    from certdraft.data.accounting import Accounting
    from certdraft.data.chat import Prompt, Prompts, PromptSet, build_prompts
    from certdraft.data.corpora import Corpus, CorpusError, Row, read_records, read_rows
    from certdraft.data.generate import (
        Generation,
        LogitHead,
        TargetError,
        eos_ids_of,
        record_batch,
    )
    from certdraft.data.loader import ResumableLoader
    from certdraft.data.loops import loop_onset
    from certdraft.data.module import TraceDataModule
    from certdraft.data.recording import Recording
    from certdraft.data.rows import RecordedRow
    from certdraft.data.sandbox import Outcome, run_python
    from certdraft.data.server import Server, ServerError
    from certdraft.data.shards import RecordingError, bytes_per_token
    from certdraft.data.stdlib import Document, standard_library
    from certdraft.data.targets import (
        embedded_target_path,
        load_target,
        load_tokenizer,
        target_config,
        tokenizer_fingerprint,
    )
    from certdraft.data.tasks import Problem, load_problems, split_problems
    from certdraft.data.tasks_arithmetic import arithmetic
    from certdraft.data.tasks_module import ArithmeticDataModule, ProblemBatch, ProblemDataModule
    from certdraft.data.verifiers import Sandbox, last_number, verify, verify_all
    from certdraft.data.writer import record_trace

_LATE = {
    "accounting": ("Accounting",),
    "chat": ("Prompt", "Prompts", "PromptSet", "build_prompts"),
    "corpora": ("Corpus", "CorpusError", "Row", "read_records", "read_rows"),
    "generate": ("Generation", "LogitHead", "TargetError", "eos_ids_of", "record_batch"),
    "loader": ("ResumableLoader",),
    "loops": ("loop_onset",),
    "module": ("TraceDataModule",),
    "recording": ("Recording",),
    "rows": ("RecordedRow",),
    "sandbox": ("Outcome", "run_python"),
    "server": ("Server", "ServerError"),
    "shards": ("RecordingError", "bytes_per_token"),
    "stdlib": ("Document", "standard_library"),
    "targets": (
        "embedded_target_path",
        "load_target",
        "load_tokenizer",
        "target_config",
        "tokenizer_fingerprint",
    ),
    "tasks": ("Problem", "load_problems", "split_problems"),
    "tasks_arithmetic": ("arithmetic",),
    "tasks_module": ("ArithmeticDataModule", "ProblemBatch", "ProblemDataModule"),
    "verifiers": ("Sandbox", "last_number", "verify", "verify_all"),
    "writer": ("record_trace",),
}
_HOME = {name: module for module, names in _LATE.items() for name in names}

__all__ = [
    "Accounting",
    "ArithmeticDataModule",
    "Batch",
    "Corpus",
    "CorpusError",
    "Document",
    "Generation",
    "LogitHead",
    "Outcome",
    "Packing",
    "Problem",
    "ProblemBatch",
    "ProblemDataModule",
    "Prompt",
    "PromptSet",
    "Prompts",
    "RecordedRow",
    "Recording",
    "RecordingError",
    "ResumableLoader",
    "Row",
    "Sandbox",
    "Server",
    "ServerError",
    "TargetError",
    "Trace",
    "TraceDataModule",
    "TraceError",
    "TraceMeta",
    "TraceRow",
    "arithmetic",
    "assemble",
    "build_prompts",
    "bytes_per_token",
    "embedded_target_path",
    "eos_ids_of",
    "last_number",
    "load_problems",
    "load_target",
    "load_tokenizer",
    "loop_onset",
    "open_trace",
    "pack",
    "read_records",
    "read_rows",
    "record_batch",
    "record_trace",
    "run_python",
    "split_problems",
    "standard_library",
    "target_config",
    "tokenizer_fingerprint",
    "verify",
    "verify_all",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"certdraft.data.{_HOME[name]}"), name)
