"""Features of the target: what is stored is what its layers said, and a trace without them is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import Qwen3ForCausalLM

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    RecordedRow,
    Recording,
    Trace,
    TraceDataModule,
    TraceError,
    TraceMeta,
    assemble,
    open_trace,
    pack,
    record_trace,
)
from certdraft.data.record.recording import with_defaults
from certdraft.data.trace import recorded_row
from certdraft.data.trace.arrow_trace import trace_schema

LAYERS = (1, 0)  # the last one too, which transformers gives after the final norm only


def record(folder: Path, target_dir: str, chats: str, **changes: object) -> TraceMeta:
    settings = {
        "corpus": Corpus(chats, split="all"), "prompts": Prompts(max_prompt_tokens=100),
        "generation": Generation(max_new_tokens=6, max_length=200), "num_kept": 8, "batch_size": 5,
        "shard_rows": 7, "feature_layers": LAYERS,
    }  # fmt: skip
    return record_trace(str(folder), target_dir, accelerator="cpu", **settings | changes)


@pytest.fixture
def trace(tmp_path: Path, target_dir: str, chats: str) -> Trace:
    record(tmp_path / "t", target_dir, chats)
    return open_trace(tmp_path / "t", verify="full")


def layer_outputs(target: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """[T, L, H] of one document alone, layer by layer, without hooks."""
    body = target.model
    hidden = body.embed_tokens(ids[None])
    positions = torch.arange(len(ids))[None]
    rotary = body.rotary_emb(hidden, positions)
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)[None, None]
    outputs = []
    with torch.no_grad():
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            outputs.append(hidden[0])
    return torch.stack([outputs[layer] for layer in LAYERS], dim=1)


def test_they_are_what_the_layers_said(trace: Trace, target: Qwen3ForCausalLM) -> None:
    assert (trace.meta.feature_layers, trace.meta.feature_size) == (LAYERS, 32)
    for index in range(len(trace)):
        row = trace.row(index)
        assert row.features.dtype == torch.bfloat16
        expected = layer_outputs(target, row.input_ids)
        assert row.features.shape == expected.shape == (len(row.input_ids), 2, 32)
        torch.testing.assert_close(row.features[:-1].float(), expected[:-1], rtol=2**-7, atol=1e-3)
        assert not row.features[-1].any()  # the last token is never read


def test_nothing_else_changes(trace: Trace, tmp_path: Path, target_dir: str, chats: str) -> None:
    meta = record(tmp_path / "plain", target_dir, chats, feature_layers=())
    plain = open_trace(tmp_path / "plain")
    for name in ("input_ids", "loss_mask", "top_ids", "top_gap", "lse_gap", "entropy"):
        for index in range(len(plain)):
            assert np.array_equal(getattr(plain.columns(index), name), getattr(trace.columns(index), name))
    assert plain.columns(0).hidden is plain.row(0).features is None
    bytes_more = sum(s.bytes for s in trace.meta.shards) - sum(s.bytes for s in meta.shards)
    expected = 2 * 2 * 32 * meta.num_tokens
    assert expected <= bytes_more < expected + 2000


def test_batches_carry_them_with_zero_padding(trace: Trace) -> None:
    packing = pack(trace.lengths, seq_len=24)
    batch = assemble(trace, packing, range(packing.num_rows))
    assert batch.features.shape == (packing.num_rows, 24, 2, 32)
    assert batch.features.dtype == torch.bfloat16
    assert not batch.features[batch.document_ids < 0].any()
    for row in range(packing.num_rows):
        end = 0
        for document, start, length in packing.row(row).tolist():
            part = trace.row(document).features[start : start + length]
            assert torch.equal(batch.features[row, end : end + length], part)
            end += length
    one = assemble(trace, packing, [0], feature_layers=[0])
    assert torch.equal(one.features, batch.features[:1, :, 1:])
    assert assemble(trace, packing, [0], feature_layers=[]).features is None
    assert batch.to("cpu").features.shape == batch.features.shape


def test_the_data_module_hands_them_out(trace: Trace) -> None:
    module = TraceDataModule(str(trace.path), str(trace.path), seq_len=32, batch_size=2)
    module.setup()
    assert all(batch.features.shape[2:] == (2, 32) for batch in module.train_dataloader())
    module = TraceDataModule(str(trace.path), str(trace.path), seq_len=32, feature_layers=[])
    module.setup()
    assert next(iter(module.train_dataloader())).features is None


def test_a_trace_without_them_is_refused_with_the_remedy(
    fake_trace: tuple[Trace, list[RecordedRow]], trace: Trace
) -> None:
    plain = fake_trace[0]
    said = r"trace\.json: a trace with no features, the drafter needs those of layers \[1, 5\]; record again "
    with pytest.raises(TraceError, match=said + r"with feature_layers=\[1, 5\], or run the target"):
        plain.check_features((1, 5), "the drafter")
    plain.check_features((), "a drafter that reads tokens only")
    trace.check_features((0,), "the drafter")
    with pytest.raises(TraceError, match=r"features of layers \[1, 0\] only, .* needs those of layers \[2\]"):
        trace.check_features((2,), "the drafter")
    with pytest.raises(TraceError, match=r"feature_layers=\[7\] needs"):
        assemble(plain, pack(plain.lengths, 8), [0], feature_layers=[7])


def test_datasets_reads_the_bits(trace: Trace) -> None:
    dataset = datasets.load_from_disk(str(trace.path)).with_format("numpy")
    for index, row in enumerate(dataset):
        assert np.array_equal(row["hidden"], trace.columns(index).hidden.reshape(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_layers": (2,)}, r"feature_layers=\[2\]: .* has layers 0 to 1"),
        ({"feature_layers": (1, 1)}, "name each at most once"),
        ({"feature_layers": (-1,)}, "has layers 0 to 1"),
        (
            {"feature_layers": (1,), "generation": Generation(max_length=1 << 26)},
            "67108864 tokens of 1 × 32 features do not fit",
        ),
    ],
)
def test_layers_that_cannot_be_kept(
    tmp_path: Path, target_dir: str, chats: str, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        record(tmp_path / "t", target_dir, chats, **changes)
    assert not (tmp_path / "t").exists()


def test_the_estimate_counts_them(
    tmp_path: Path, target_dir: str, chats: str, capsys: pytest.CaptureFixture
) -> None:
    record(tmp_path / "t", target_dir, chats)
    assert "tokens of 188 bytes" in capsys.readouterr().err  # 60 without them, and 2 layers of 32 in bf16


def test_a_trace_from_before_features_is_still_the_same_recording(
    tmp_path: Path, target_dir: str, chats: str, write_fake_trace: Callable[..., list[RecordedRow]]
) -> None:
    record(tmp_path / "t", target_dir, chats, feature_layers=())
    file = tmp_path / "t" / "trace.json"
    content = json.loads(file.read_text())
    del content["feature_layers"], content["feature_size"], content["settings"]["feature_layers"]
    file.write_text(json.dumps(content))
    assert open_trace(tmp_path / "t").meta.feature_layers == ()
    record(tmp_path / "t", target_dir, chats, feature_layers=())  # and not "feature_layers: None there"
    assert with_defaults({"num_kept": 8})["prompts"] == Recording().settings()["prompts"]


def test_rows_with_more_values_than_an_arrow_offset_counts_are_written_in_several_batches(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an unfinished shard: offsets are int32, and features of a large target pass 2^31 values."""
    names = ("input_ids", "loss_mask", "top_ids", "top_gap", "lse_gap", "entropy", "hidden")
    rows = {}
    for number in (3, 0, 5):
        values = {name: getattr(trace.columns(number), name) for name in names}
        rows[number] = RecordedRow(**values, finish="length", where=f"row {number}")
    monkeypatch.setattr(recorded_row, "_BATCH_VALUES", rows[3].hidden.size + 1)
    recorded_row.write_part(tmp_path / "part", rows, trace_schema(with_features=True))
    with pa.ipc.open_stream(pa.memory_map(str(tmp_path / "part"))) as stream:
        assert sum(1 for _ in stream) == len(rows)
    found = recorded_row.read_part(tmp_path / "part")
    assert list(found) == list(rows)
    for number, row in rows.items():
        for name in names:
            assert np.array_equal(getattr(found[number], name), getattr(row, name)), name
        assert (found[number].finish, found[number].where) == ("length", f"row {number}")
