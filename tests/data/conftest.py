"""A random Qwen3 of 40 k weights with a byte-level tokenizer, and traces made without any target."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.runs.recordings import record
from oracles.servers.server_process import ServerProcess
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from certdraft.data import RecordedRow, Trace, TraceMeta, load_target, load_tokenizer, open_trace
from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.bpe_tokenizer import train_tokenizer
from certdraft.data.trace.shards import Ledger

_TEXT = ["def add(a, b):\n    return a + b\n", "the quick brown fox jumps over the lazy dog. ", "0123456789 "]
VOCAB_SIZE = 304  # three rows more than the tokenizer has ids


@pytest.fixture(scope="session")
def make_target() -> Callable[..., Qwen3ForCausalLM]:
    def make(seed: int = 7, **changes: object) -> Qwen3ForCausalLM:
        settings = dict(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            initializer_range=0.6,  # wide enough that greedy text wanders
            eos_token_id=0,
            tie_word_embeddings=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Qwen3ForCausalLM(Qwen3Config(**(settings | changes))).eval()

    return make


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory, make_target: Callable[..., Qwen3ForCausalLM]) -> str:
    folder = tmp_path_factory.mktemp("tiny-target")
    make_target().save_pretrained(folder)
    train_tokenizer(_TEXT, VOCAB_SIZE - 3).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(target_dir: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(target_dir)


@pytest.fixture(scope="session")
def target(target_dir: str) -> Qwen3ForCausalLM:
    return load_target(target_dir)


@pytest.fixture
def server(process: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> ServerProcess:
    """The test module's server process, as it was when it started."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    process.reset()
    return process


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """Twelve short prompts of different lengths, as jsonl."""
    file = tmp_path / "chats.jsonl"
    words = ["fox", "dog", "add", "lazy", "brown", "quick"]
    file.write_text("".join(f'{{"prompt": "{words[i % 6]} {"the " * (i % 5)}{i}"}}\n' for i in range(12)))
    return str(file)


def make_row(length: int, num_kept: int, seed: int) -> RecordedRow:
    """A document whose every value is random: what is read must be what was written."""
    rng = np.random.default_rng(seed)
    gap = np.sort(rng.exponential(2.0, (length, num_kept)).astype(np.float16), axis=1)
    gap[:, 0] = 0
    lse_gap = np.log(np.exp(-gap.astype(np.float64)).sum(1)) + 0.1
    return RecordedRow(
        input_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
        loss_mask=rng.random(length) < 0.6,
        top_ids=np.stack([rng.permutation(VOCAB_SIZE)[:num_kept] for _ in range(length)]).astype(np.int32),
        top_gap=gap,
        lse_gap=lse_gap.astype(np.float32),
        entropy=rng.random(length).astype(np.float32),
        finish="eos",
        where=f"row {seed}",
    )


def fake_meta(shards: tuple, num_kept: int, settings: dict) -> TraceMeta:
    return TraceMeta(
        schema=1,
        target="tiny",
        target_revision="1",
        tokenizer_fingerprint="9f3c" * 16,
        vocab_size=VOCAB_SIZE,
        num_kept=num_kept,
        dtype="float32",
        settings=settings,
        shards=shards,
        accounting={},
        versions={},
    )


@pytest.fixture(scope="session")
def fake_row() -> Callable[..., RecordedRow]:
    return make_row


@pytest.fixture(scope="session")
def write_rows() -> Callable[..., None]:
    """Writes documents, `shard_rows` a shard, through the real ledger."""

    def write(
        folder: Path, rows: Sequence[RecordedRow], shard_rows: int = 3, settings: dict | None = None
    ) -> None:
        num_kept, settings = rows[0].top_ids.shape[1], settings or {}
        num_shards = -(-len(rows) // shard_rows)
        ledger = Ledger(folder, settings, num_shards)
        try:
            for shard in range(num_shards):
                if not ledger.is_done(shard):
                    part = rows[shard * shard_rows : (shard + 1) * shard_rows]
                    ledger.commit(shard, part, Accounting("prompts", read=len(part), used=len(part)))
            ledger.finish(fake_meta(ledger.shards(), num_kept, settings))
        finally:
            ledger.release()

    return write


@pytest.fixture(scope="session")
def write_fake_trace(write_rows: Callable[..., None]) -> Callable[..., list[RecordedRow]]:
    """Writes random documents of the given lengths."""

    def write(
        folder: Path, lengths: Sequence[int], num_kept: int = 4, shard_rows: int = 3, seed: int = 0
    ) -> list[RecordedRow]:
        rows = [make_row(length, num_kept, 1000 * seed + i) for i, length in enumerate(lengths)]
        write_rows(folder, rows, shard_rows, {"lengths": list(lengths), "seed": seed})
        return rows

    return write


@pytest.fixture
def fake_trace(
    tmp_path: Path, write_fake_trace: Callable[..., list[RecordedRow]]
) -> tuple[Trace, list[RecordedRow]]:
    rows = write_fake_trace(tmp_path / "trace", [5, 1, 17, 8, 30, 2, 9, 64])
    return open_trace(tmp_path / "trace"), rows


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, target_dir: str) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    file = folder / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "fox {"the " * (i % 5)}{i}"}}\n' for i in range(10)))
    record(folder / "trace", target_dir, str(file))
    return folder / "trace", str(file)
