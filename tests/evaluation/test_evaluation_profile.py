"""`certdraft profile`: a cost model of an exported drafter, read back by `certdraft evaluate`."""

import json
from pathlib import Path

import pytest
import torch
from oracles.runs.outcomes import fails, with_other_tokenizer

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    load_target,
    load_tokenizer,
    record_trace,
    tokenizer_fingerprint,
)
from certdraft.decoding import CostAware, CostModel, decode, device_name, greedy, profile
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CardFacts,
    CausalDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
    export,
)
from certdraft.train.commands.cli import main

V = 2048


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    made = CausalDrafter(
        config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
        },
        vocab_size=V,
    )  # fmt: skip
    words = load_tokenizer()
    facts = CardFacts("embedded", V, tokenizer_fingerprint(words))
    where = tmp_path_factory.mktemp("drafter") / "export"
    return export(made, where, tokenizer=words, draft_length=4, card=facts)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace") / "test"
    generation = Generation(max_new_tokens=8, loops="keep")
    corpus, prompts = Corpus(split="test", max_rows=2), Prompts(prompt_tokens=12)
    record_trace(str(folder), "embedded", corpus, prompts, generation, num_kept=16, accelerator="cpu")
    return folder


SMALL = ["--contexts", "[8, 24]", "--nodes", "[0, 1, 4, 8]", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def cost(drafter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cost") / "cost.json"
    main(["profile", "--drafter", str(drafter), "--out", str(path), *SMALL])
    return path


def test_profile_measures_this_machine_and_prints_a_table(
    drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    main(["profile", "--drafter", str(drafter), "--out", str(path), *SMALL])
    model = CostModel.load(path)
    assert (model.contexts, model.nodes) == ((8, 24), (0, 1, 4, 8))
    assert model.device == device_name("cpu")
    assert "Qwen3ForCausalLM" in model.target
    assert "CausalDrafter" in model.drafter
    assert all(second > 0 for row in model.verify for second in row)
    assert model.measured["repeats"] == 2
    said = capsys.readouterr()
    assert f"Milliseconds on {model.device}" in said.out
    assert "| context | drafter pass | each further node | n = 0 | n = 1 | n = 4 | n = 8 |" in said.out
    rows = [line for line in said.out.splitlines() if line.startswith(("| 8 |", "| 24 |"))]
    assert [row.split("|")[4].strip() for row in rows] == [f"{1000 * v[0]:.2f}" for v in model.verify]
    again = fails(capsys, "profile", "--drafter", str(drafter), "--out", str(path), *SMALL)
    assert "exists already" in again


def test_evaluate_takes_the_cost_model_by_its_path(
    drafter: Path, cost: Path, trace: Path, tmp_path: Path
) -> None:
    tree = f"[{{class_path: certdraft.decoding.CostAware, init_args: {{cost_model: {cost}, budget: 8}}}}]"
    out = tmp_path / "out"
    main(
        ["evaluate", "--out", str(out), "--trace", str(trace), "--target", "embedded", "--builders", tree]
        + ["--drafters", f"{{fresh: {drafter}}}", "--prompts", "1", "--device", "cpu"]
    )
    bench = json.loads((out / "report.json").read_text())["bench"]
    assert bench["lossless"]
    assert bench["methods"][0]["builder"] == "cost_aware(stop=lambda, budget=8)"


def test_a_cost_model_of_another_device_is_refused(
    drafter: Path, cost: Path, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = json.loads(cost.read_text()) | {"device": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "h100.json").write_text(json.dumps(elsewhere))
    tree = f"[{{class_path: CostAware, init_args: {{cost_model: {tmp_path / 'h100.json'}}}}}]"
    said = fails(
        capsys, "evaluate", "--out", str(tmp_path / "out"), "--trace", str(trace), "--target", "embedded",
        "--builders", tree, "--drafters", f"{{fresh: {drafter}}}", "--device", "cpu",
    )  # fmt: skip
    assert "measured with device 'NVIDIA H100 80GB HBM3', not" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "[8, 512]"], "context 512 needs 584 positions, the drafter reads 256"),
        (["--contexts", "[24, 8]"], "contexts must ascend"),
        (["--nodes", "[1, 2]"], "nodes must start at 0"),
        (["--repeats", "0"], "repeats is 0"),
        (["--device", "cuda:99"], "no CUDA device"),
        (["--device", "quantum"], "give auto, cpu"),
        (["--drafter", "./nowhere"], "nowhere"),
    ],
)
def test_impossible_profiles_are_refused(
    options: list[str], message: str, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["profile", "--drafter", str(drafter), "--out", str(tmp_path / "cost.json"), *SMALL, *options]
    assert message in fails(capsys, *typed)
    assert not (tmp_path / "cost.json").exists()


def test_a_drafter_of_another_tokenizer_is_refused(
    drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = with_other_tokenizer(drafter, tmp_path / "other")
    said = fails(capsys, "profile", "--drafter", str(other), "--out", str(tmp_path / "cost.json"))
    assert "tokenizer of the target embedded" in said
    assert "ffffffffffff" in said


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
def test_drafters_that_read_hidden_states_are_profiled(kind: str) -> None:
    """An EAGLE head reads one root a round, its tree is below it; a block drafter reads the root alone; a
    DSpark drafter runs its layers for the root and no other node."""
    target = load_target("embedded")
    drafter: Drafter = EagleDrafter(EagleConfig(target_layer_ids=(1, 3, 5)))
    if kind == "dflash":
        config = BlockConfig(num_hidden_layers=1, block_size=4, target_layer_ids=(1, 5), mask_token_id=2047)
        drafter = BlockDrafter(config)
    if kind == "dspark":
        sizes = DSparkConfig(num_hidden_layers=4, block_size=4, target_layer_ids=(1, 5), mask_token_id=2047)
        drafter = DSparkDrafter(sizes)
    drafter.build(V, target).eval()
    cost = profile(target, drafter, [8], [0, 2], draft_nodes=[1, 3], repeats=1)
    first, each = cost.draft[0]
    assert first > 0
    assert each >= 0
    # four layers against none; which of two kinds is dearer is a matter of the machine's other work
    assert cost.opening_s(8) > 0 or kind != "dspark"
    round_ = decode(target, drafter, [5, 9, 7], max_new_tokens=6, builder=CostAware(cost, budget=4))
    assert round_.tokens == greedy(target, [5, 9, 7], 6)
