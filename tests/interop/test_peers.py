"""Drafters with random weights, made and saved by other trainers' own modules, compute the same here.

Every variant goes both ways: their folder is read and gives their logits, and what we export of it is read by
them and gives these logits again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft.data import load_tokenizer
from certdraft.drafters import BlockDrafter, CardFacts, DSparkDrafter, EagleDrafter, export

V, H, TAPS, NUM, STEPS, MASK = 2048, 32, (1, 2, 4), 24, 4, 2047
SIZES: dict[str, Any] = {
    "hidden_size": H, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": V, "max_position_embeddings": 160,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}
EAGLE = {"draft_vocab_size": V, "eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS]}
BLOCK = {"draft_vocab_size": V, "block_size": 4, "mask_token_id": MASK,
         "aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS]}  # fmt: skip
REFERENCE = {"block_size": 4, "num_target_layers": 7,
             "dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(TAPS)}}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


def eagle(own: dict[str, Any], model_type: str = "llama", **network: Any) -> dict[str, Any]:
    network = SIZES | {"model_type": model_type, "num_hidden_layers": 1} | network
    return {"library": "speculators", "kind": "eagle3", "network": network, "own": EAGLE | own}


def block(own: dict[str, Any], **network: Any) -> dict[str, Any]:
    network = SIZES | {"model_type": "qwen3", "num_hidden_layers": 2} | network
    return {"library": "speculators", "kind": "dflash", "network": network, "own": BLOCK | own}


def reference(own: dict[str, Any], **network: Any) -> dict[str, Any]:
    network = SIZES | {"num_hidden_layers": 2} | network
    return {"library": "dflash", "kind": "dflash", "network": network, "own": REFERENCE | own}


def dspark(own: dict[str, Any], **network: Any) -> dict[str, Any]:
    return block({"markov_rank": 6} | own, **network) | {"kind": "dspark"}


def windows(size: int, kinds: list[str]) -> dict[str, Any]:
    return {"layer_types": kinds, "sliding_window": size, "use_sliding_window": True}


FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
PEERS: dict[str, dict[str, Any]] = {
    "eagle3, plain": eagle({}),
    **{f"eagle3, {flag}": eagle({flag: True}) for flag in FLAGS},
    "eagle3, all of 3.1": eagle(dict.fromkeys(FLAGS[:2] + FLAGS[3:], True), rope_parameters=LLAMA3),
    "eagle3, qwen3 layers": eagle({"fc_norm": True, "norm_output": True}, "qwen3", rope_parameters=YARN),
    "eagle3, linear": eagle({}, rope_parameters=LINEAR),
    "eagle3, 1500 tokens": eagle({"draft_vocab_size": 1500, "norm_before_residual": True}),
    "dflash, plain": block({}),
    "dflash, yarn": block({}, rope_parameters=YARN),
    # Windows that reach the start of the text: speculators trains with windows that end elsewhere.
    "dflash, windows": block({}, **windows(NUM + 4, MIXED)),
    "dflash, windows everywhere": block({}, **windows(NUM + 4, MIXED[:1] * 2)),
    "dflash, windows, both directions": block({"sliding_window_non_causal": True}, **windows(NUM + 4, MIXED)),
    "dspark, plain": dspark({}),
    "dspark, from masks": dspark({"sample_from_anchor": False}, rope_parameters=YARN),
    "dspark, confidence alone": dspark({"confidence_head_with_markov": False}),
    "dspark, no confidence": dspark({"enable_confidence_head": False, "markov_rank": 1}),
    "z-lab, plain": reference({}),
    "z-lab, windows": reference({}, **windows(6, MIXED)),
    "z-lab, short windows": reference({}, **windows(2, MIXED[:1] * 2)),
    "z-lab, both directions": reference({"is_causal": False}, **windows(3, MIXED), rope_parameters=YARN),
    "z-lab, in order": reference({"is_causal": True}, rope_parameters=LLAMA3),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3ForCausalLM, Path]:
    """A random target of seven layers, and its folder."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=7)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return model.requires_grad_(False), folder


@pytest.fixture(scope="module")
def made(
    target: tuple[Qwen3ForCausalLM, Path], engine: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Where everything lies, and what their modules said, in one go: folders, inputs, logits."""
    work = tmp_path_factory.mktemp("peers")
    jobs = []
    for seed, (name, peer) in enumerate(PEERS.items()):
        draw = torch.Generator().manual_seed(seed)
        inputs = {
            "ids": torch.randint(V - 1, (NUM,), generator=draw),
            "features": torch.randn(NUM, len(TAPS), H, generator=draw),
            "anchors": torch.tensor([1, 2, 5, 9, 14, 19]),
        }
        if (size := peer["own"].get("draft_vocab_size", V)) != V:
            ids = torch.randperm(V, generator=draw)[:size].sort().values
            member = torch.zeros(V, dtype=torch.bool)
            member[ids] = True
            inputs |= {"t2d": member, "d2t": ids - torch.arange(size)}
        save_file(inputs, work / f"{seed}.inputs")
        jobs.append(job(work, name, seed) | {key: peer[key] for key in ("network", "own")} | {"seed": seed})
        jobs[-1]["target"] = str(target[1])
    return work, engine("speculators", jobs, script="peers_speculators.py")["runs"]


def job(work: Path, name: str, seed: int, suffix: str = "") -> dict[str, Any]:
    peer = PEERS[name]
    return {
        "name": name, "library": peer["library"], "kind": peer["kind"], "steps": STEPS,
        "folder": str(work / f"{seed}{suffix}"), "inputs": str(work / f"{seed}.inputs"),
        "outputs": str(work / f"{seed}{suffix}.outputs"),
    }  # fmt: skip


def logits_of(drafter: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ours, in their layout; EAGLE-3's over its draft vocabulary, of rows whose tokens are all known;
    DSpark's with the logit of the confidence at the end."""
    ids, features = inputs["ids"], inputs["features"]
    if isinstance(drafter, DSparkDrafter):
        return torch.stack([corrected(drafter, ids, features, a) for a in inputs["anchors"].tolist()])
    if isinstance(drafter, BlockDrafter):
        found = []
        for anchor in inputs["anchors"].tolist():
            state = drafter.start(ids[:anchor].tolist(), features[:anchor])
            found.append(drafter.draft(state, [int(ids[anchor])], [-1]))
        return torch.stack(found)
    counted = torch.ones(1, NUM, dtype=torch.bool)
    documents = torch.zeros(1, NUM, dtype=torch.long)
    paths = drafter.paths(ids[None], torch.arange(NUM)[None], documents, counted, features[None], STEPS, True)
    whole = paths.hidden[: NUM - STEPS]  # paths from the second token on
    return (whole @ drafter.head_weight.T).transpose(0, 1)


def corrected(drafter: DSparkDrafter, ids: torch.Tensor, features: torch.Tensor, anchor: int) -> torch.Tensor:
    """A block, drafted node by node after the true tokens, [D, V] or [D, V + 1]."""
    state, rows = drafter.start(ids[:anchor].tolist(), features[:anchor]), []
    for depth in range(drafter.max_draft_length):
        row = drafter.draft(state, [int(ids[anchor + depth])], [depth - 1])
        sure = state.confidence
        rows.append(row if sure is None else torch.cat([row, sure.logit()[:, None]], -1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", PEERS)
def test_their_folder_gives_their_logits(
    name: str, made: tuple[Path, dict[str, Any]], target: tuple[Qwen3ForCausalLM, Path]
) -> None:
    work, runs = made
    assert "error" not in runs[name], runs[name]["error"]
    drafter, inputs, theirs = read(work, name, target[0])
    with torch.no_grad():
        mine = logits_of(drafter, inputs)
    if isinstance(drafter, EagleDrafter):
        theirs = theirs[:, : NUM - STEPS]
    else:
        theirs = theirs[:, drafter.lead :]
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5)
    assert theirs.std() > 0.1


def read(work: Path, name: str, model: Qwen3ForCausalLM) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """Our drafter from their folder, the inputs, and their logits."""
    seed = list(PEERS).index(name)
    inputs = load_file(work / f"{seed}.inputs")
    kinds: dict[str, Any] = {"eagle3": EagleDrafter, "dspark": DSparkDrafter}
    kind: Any = kinds.get(PEERS[name]["kind"], BlockDrafter)
    more = {"unroll": STEPS} if kind is EagleDrafter else {}
    drafter = kind(pretrained=str(work / str(seed)), **more).build(V, model).eval()
    return drafter, inputs, load_file(work / f"{seed}.outputs")["logits"]


def test_our_exports_give_their_modules_the_same_logits(
    made: tuple[Path, dict[str, Any]], target: tuple[Qwen3ForCausalLM, Path], engine: Any
) -> None:
    """Through our reader, network and writer, to the last bit of every weight."""
    work, runs = made
    jobs, card = [], CardFacts(str(target[1]), V, "ab" * 32, target_architecture="Qwen3ForCausalLM")
    for seed, name in enumerate(PEERS):
        if "error" in runs[name]:
            continue
        drafter, _, _ = read(work, name, target[0])
        format = "dflash" if PEERS[name]["library"] == "dflash" else "speculators"
        if name == "dflash, windows":  # one flag of speculators cannot say this to vLLM
            with pytest.raises(ValueError, match="Export it as dflash"):
                export(drafter, work / "no", format, tokenizer=load_tokenizer(), draft_length=3, card=card)
            continue
        jobs.append(job(work, name, seed, "-ours") | {"target": str(target[1])})
        export(drafter, jobs[-1]["folder"], format, tokenizer=load_tokenizer(), draft_length=3, card=card)
    again = engine("speculators", jobs, script="peers_speculators.py")["runs"]
    for entry in jobs:
        name = entry["name"]
        assert "error" not in again[name], (name, again[name]["error"])
        theirs, ours = (load_file(Path(folder) / "model.safetensors") for folder in folders_of(entry))
        theirs.pop("embed_tokens.weight", None)  # the target's
        assert theirs.keys() == ours.keys(), name
        assert all(torch.equal(theirs[key].to(ours[key].dtype), ours[key]) for key in ours), name
        first = load_file(entry["outputs"].replace("-ours", ""))["logits"]
        found = load_file(entry["outputs"])["logits"]
        assert torch.allclose(found, first, rtol=1e-5, atol=1e-5), name


def folders_of(entry: dict[str, Any]) -> tuple[str, str]:
    """Theirs, and ours of the same drafter."""
    return entry["folder"].removesuffix("-ours"), entry["folder"]
