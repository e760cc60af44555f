"""Trace reading and writing: tokens per CPU-second against `datasets`, and bytes per token by codec.

    python benchmarks/trace_io.py            # 2 minutes, 250 MB in a temporary folder

Reading means tensors ready for a training step: packed rows of 4096 tokens with K = 32 head entries a step.
`datasets` is measured twice: as its torch format hands out documents, and with the packing that a training
step needs. The trace has random heads over a vocabulary of 151,936; the codecs are tried on a real trace of
the embedded target.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch

from certdraft.data import (
    Corpus,
    Generation,
    RecordedRow,
    TraceMeta,
    assemble,
    open_trace,
    pack,
    record_trace,
)
from certdraft.data.corpus.accounting import Accounting
from certdraft.data.trace.recorded_row import bytes_per_token
from certdraft.data.trace.shards import Ledger

VOCAB_SIZE, K, SEED = 151_936, 32, 0
COLUMNS = ("input_ids", "loss_mask", "top_ids", "top_gap", "lse_gap", "entropy")


def documents(num_tokens: int) -> Iterator[RecordedRow]:
    rng = np.random.default_rng(SEED)
    while num_tokens > 0:
        length = min(num_tokens, int(rng.lognormal(6.0, 0.9)) + 2)
        num_tokens -= length
        gap = np.sort(rng.exponential(3.0, (length, K)).astype(np.float16), axis=1)
        yield RecordedRow(
            input_ids=rng.integers(0, VOCAB_SIZE, length, np.int32),
            loss_mask=np.arange(length) >= length // 3,
            top_ids=rng.integers(0, VOCAB_SIZE, (length, K), np.int32),
            top_gap=gap - gap[:, :1],
            lse_gap=rng.exponential(1.0, length).astype(np.float32),
            entropy=rng.exponential(1.0, length).astype(np.float32),
            finish="eos",
            where="random",
        )


def write(folder: Path, rows: list[RecordedRow]) -> None:
    shards = [rows[i : i + 256] for i in range(0, len(rows), 256)]
    ledger = Ledger(folder, {}, len(shards))
    for index, shard in enumerate(shards):
        ledger.commit(index, shard, Accounting("prompts"))
    facts = {"schema": 1, "target": "random", "target_revision": "", "tokenizer_fingerprint": ""}
    meta = TraceMeta(**facts, vocab_size=VOCAB_SIZE, num_kept=K, dtype="float32", settings={},
                     shards=ledger.shards(), accounting={}, versions={})  # fmt: skip
    ledger.finish(meta)


def rate(read: Callable[[], int], repeats: int = 3) -> dict[str, float]:
    """Tokens per CPU-second and per second, best of `repeats`; the first run also warms the page cache."""
    cpu, wall, tokens = [], [], 0
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        tokens = read()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return {
        "tokens": tokens,
        "per_cpu_second": round(tokens / min(cpu)),
        "per_second": round(tokens / min(wall)),
    }


def read_packed(folder: Path, seq_len: int = 4096, batch_size: int = 8) -> int:
    trace = open_trace(folder)
    packing = pack(trace.lengths, seq_len)
    order = np.random.default_rng(SEED).permutation(packing.num_rows)
    return sum(
        assemble(trace, packing, order[start : start + batch_size]).num_tokens
        for start in range(0, len(order), batch_size)
    )


def read_views(folder: Path) -> int:
    trace = open_trace(folder)
    return sum(len(trace.columns(index).top_ids) for index in range(len(trace)))


def read_datasets(folder: Path, kind: str, num_rows: int) -> int:
    dataset = datasets.load_from_disk(str(folder)).select(range(num_rows)).with_format(kind)
    return sum(len(row["input_ids"]) for row in dataset)


def read_datasets_packed(folder: Path, num_rows: int, seq_len: int = 4096, batch_size: int = 8) -> int:
    """The batches of `read_packed`, filled from the torch format of `datasets`."""
    dataset = datasets.load_from_disk(str(folder)).select(range(num_rows)).with_format("torch")
    packing = pack(open_trace(folder).lengths[:num_rows], seq_len)
    tokens = 0
    for first in range(0, packing.num_rows, batch_size):
        shape = (min(batch_size, packing.num_rows - first), seq_len)
        ids, gap = torch.zeros(*shape, K, dtype=torch.long), torch.zeros(*shape, K)
        flat = {name: torch.zeros(shape) for name in COLUMNS if not name.startswith("top_")}
        for row in range(shape[0]):
            end = 0
            for document, start, length in packing.row(first + row).tolist():
                values, here = dataset[document], slice(end, end + length)
                ids[row, here] = values["top_ids"].view(-1, K)[start : start + length]
                gap[row, here] = values["top_gap"].view(-1, K)[start : start + length]
                for name, target in flat.items():
                    target[row, here] = values[name][start : start + length].to(target.dtype)
                end += length
            tokens += end
    return tokens


def bytes_by_codec(folder: Path) -> dict[str, float]:
    table = pa.concat_tables(
        pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in folder.glob("*.arrow")
    )
    tokens = len(pa.compute.list_flatten(table["input_ids"]))
    sizes = {}
    for codec in (None, "lz4", "zstd"):
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
            stream.write_table(table)
        sizes[codec or "none (what is stored)"] = round(sink.getvalue().size / tokens, 1)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trace_io.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict = {"command": f"python benchmarks/trace_io.py --tokens {arguments.tokens}"}
    with tempfile.TemporaryDirectory() as temporary:
        folder, real = Path(temporary, "random"), Path(temporary, "embedded")
        rows = list(documents(arguments.tokens))
        start = time.process_time()
        write(folder, rows)
        written = arguments.tokens / (time.process_time() - start)
        few = min(200, len(rows))  # the slow ones are measured on fewer rows
        result |= {
            "write_tokens_per_cpu_second": round(written),
            "bytes_per_token": bytes_per_token(K),
            "read": {
                "packed batches (assemble)": rate(lambda: read_packed(folder)),
                "views (no copy)": rate(lambda: read_views(folder)),
                "datasets, torch format": rate(lambda: read_datasets(folder, "torch", few)),
                "datasets, torch format, packed": rate(lambda: read_datasets_packed(folder, few)),
                "datasets, numpy format": rate(lambda: read_datasets(folder, "numpy", few)),
            },
            "packing": {
                str(length): round(pack([len(row.input_ids) for row in rows], length).efficiency, 5)
                for length in (1024, 4096)
            },
        }
        record_trace(str(real), corpus=Corpus(max_rows=96), generation=Generation(max_new_tokens=64))
        result["bytes_per_token_by_codec, embedded target"] = bytes_by_codec(real)
    speeds = {name: entry["per_cpu_second"] for name, entry in result["read"].items()}
    result["packed batches are faster, times"] = {
        name: round(speeds["packed batches (assemble)"] / speed, 1)
        for name, speed in speeds.items()
        if name.startswith("datasets")
    }
    result |= {
        "seed": SEED,
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, one thread, other work running beside it",
        "versions": {name: version(name) for name in ("torch", "pyarrow", "datasets", "numpy")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
