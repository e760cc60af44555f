"""Training of drafters that read the target: loss by definition, draft vocabularies, exact resuming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from certdraft.certificates import Head
from certdraft.data import Corpus, Generation, TraceDataModule, record_trace
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CausalDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)
from certdraft.losses import (
    Chunked,
    DepthWeights,
    ForwardKL,
    HardCE,
    PrefixWeights,
    RunnerUpForgivingCE,
    StepWeights,
    TargetBatch,
    prefix_weights,
)
from certdraft.train import DrafterModule, ValidationSettings
from certdraft.train.accumulation import Accumulation
from certdraft.train.commands.cli import main
from certdraft.train.drafter_setup import fit_to_target
from certdraft.train.restricted_target import DraftVocabulary
from certdraft.train.target_outputs import TargetSettings, recorded

Write = Callable[..., str]


@pytest.fixture(scope="module")
def trace(tiny: Path) -> Path:
    """The tiny target's trace with the features of its first layer."""
    for split in ("train", "validation"):
        corpus = Corpus(source=str(tiny / "corpus.jsonl"), split=split, validation_fraction=0.2)
        if not (tiny / f"{split}-features").exists():
            record_trace(
                str(tiny / f"{split}-features"), str(tiny / "target"), corpus,
                generation=Generation(max_new_tokens=24, loops="keep"), accelerator="cpu",
                feature_layers=(0,),
            )  # fmt: skip
    return tiny / "train-features"


def data_of(tiny: Path, suffix: str = "-features", **more: Any) -> TraceDataModule:
    more = {"seq_len": 256, "batch_size": 4} | more
    data = TraceDataModule(str(tiny / f"train{suffix}"), str(tiny / f"validation{suffix}"), **more)
    data.setup()
    return data


def make(family: str, **changes: Any) -> Drafter:
    if family == "eagle":
        head = EagleConfig(target_layer_ids=(0,), draft_vocab_size=changes.pop("draft_vocab_size", None))
        return EagleDrafter(head, unroll=3, **changes)
    sizes = {"num_hidden_layers": 1, "target_layer_ids": (0,)}
    changes = {"num_anchors": 5} | changes
    if family == "dspark":
        return DSparkDrafter(DSparkConfig(**sizes, block_size=3, markov_rank=4), **changes)
    return BlockDrafter(BlockConfig(**sizes, block_size=4), **changes)


def loss_of(module: DrafterModule, batch: Any) -> float:
    """What a training step minimises, without a Trainer."""
    found: list[float] = []
    module.log_dict = lambda values, **_: found.append(values["train/loss_nats"].item())  # type: ignore[method-assign]
    optimizer = type("O", (), {"param_groups": [{"lr": 1.0}]})()
    trainer = {
        "world_size": 1, "accumulate_grad_batches": 1, "optimizers": [optimizer],
        "global_step": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    module._trainer = type("T", (), trainer)()  # type: ignore[assignment]
    torch.manual_seed(11)  # of the anchors
    module.training_step(batch, 0)
    return found[0]


@pytest.mark.parametrize("weights", [None, DepthWeights(2.0), PrefixWeights(3, 0.5)], ids=str)
@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_loss_is_the_weighted_mean_over_paths(
    family: str, progress: float, weights: StepWeights | None, tiny: Path, trace: Path
) -> None:
    """From the trace and online, chunked and not: one number, written out path by path."""
    data = data_of(tiny)
    drafter = make(family)
    drafter.at(progress)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    torch.manual_seed(11)
    paths = drafter.paths(
        batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
    )
    assert paths.mask.shape[1] == (1 if progress < 0.5 else 3)
    total = weight = 0.0
    greedy = batch.head.greedy.flatten()
    for hidden, steps, mask in zip(paths.hidden, paths.steps, paths.mask, strict=True):
        num = int(mask.sum())
        nll = [-drafter.head(hidden[d]).double().log_softmax(-1)[greedy[steps[d]]].item() for d in range(num)]
        each = {"None": [1.0] * num}.get(str(weights))
        if isinstance(weights, DepthWeights):
            each = [2.718281828459045 ** (-d / 2) for d in range(num)]
        elif isinstance(weights, PrefixWeights):
            each = prefix_weights(torch.tensor(nll).neg().exp(), smoothing=0.5).tolist()
        total += sum(w * loss for w, loss in zip(each, nll, strict=True))
        weight += sum(each)
    online = TargetSettings(str(tiny / "target"))
    for settings in ({}, {"chunk_tokens": 0}, {"chunk_tokens": 5}, {"target": online}):
        module = DrafterModule(drafter, HardCE(), step_weights=weights, **settings)
        module._layers = data.meta.feature_layers
        assert loss_of(module, batch) == pytest.approx(
            total / weight, rel=2e-3 if "target" in settings else 1e-5
        )


@pytest.mark.parametrize("chunk_tokens", [0, 5])
@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_losses_get_the_depth_of_every_draft_token(
    family: str, chunk_tokens: int, tiny: Path, trace: Path
) -> None:
    """A list of candidates by depth trains each depth with its own loss; a causal drafter refuses it."""
    data = data_of(tiny)
    drafter = make(family)
    drafter.at(1.0)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    torch.manual_seed(11)
    paths = drafter.paths(
        batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
    )
    total = 0.0
    for depth, m in enumerate((8, 2, 1)):
        inside = paths.mask[:, depth]
        target = recorded(batch, (), ()).at(paths.steps[inside, depth])
        total += RunnerUpForgivingCE(m)(drafter.head(paths.hidden[inside, depth]), target).sum().item()
    module = DrafterModule(drafter, RunnerUpForgivingCE([8, 2, 1]), chunk_tokens=chunk_tokens)
    module._layers = data.meta.feature_layers
    assert loss_of(module, batch) == pytest.approx(total / int(paths.mask.sum()), rel=1e-4)
    causal = DrafterModule(CausalDrafter(pretrained=str(tiny / "target")), RunnerUpForgivingCE([8, 2, 1]))
    with pytest.raises(ValueError, match="list by draft depth"):
        loss_of(causal, batch)


@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_training_begins_with_short_rounds(family: str, tiny: Path, trace: Path) -> None:
    """Half of it by default, as many tokens a step as ever; validation always sees full rounds; a published
    drafter is past that."""
    drafter = make(family)
    fit_to_target(drafter, None, data_of(tiny))
    batch = next(iter(data_of(tiny).val_dataloader()))
    run = (batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features)
    long = drafter.paths(*run)
    drafter.at(0.49)
    short = drafter.paths(*run)
    assert (short.mask.shape[1], long.mask.shape[1]) == (1, 3)
    assert torch.equal(short.hidden[:, 0], long.hidden[:, 0]) == (family == "eagle")  # blocks: fewer masks
    if family != "eagle":
        assert len(short.mask) == (2 if family == "block" else 3) * len(long.mask)
    assert drafter.paths(*run, every=True).mask.shape[1] == 3
    drafter.at(0.5)
    assert drafter.paths(*run).mask.shape[1] == 3
    assert make(family, short_until=0.0).short_until == 0.0
    with pytest.raises(ValueError, match=r"short_until is 1.0.*\[0, 1\)"):
        make(family, short_until=1.0)


def test_a_draft_vocabulary_sees_the_renormalised_target() -> None:
    """C2: a loss on D + K classes is the one on the draft tokens against the target restricted to them."""
    torch.manual_seed(0)
    vocab, ids = 30, torch.tensor([0, 3, 4, 7, 8, 11, 12, 15, 19, 22, 29])
    draft = DraftVocabulary(ids, vocab)
    p = (2 * torch.randn(50, vocab)).softmax(-1)
    hidden, weight = torch.randn(50, 6), torch.randn(len(ids), 6)
    restricted = p[:, ids] / p[:, ids].sum(-1, keepdim=True)
    logq = (hidden @ weight.T).double().log_softmax(-1)
    best = restricted.argmax(-1)
    for num in (vocab, 12):
        target = draft.target(TargetBatch(Head.from_probs(p, num)))
        ce = Chunked(HardCE(), "none", 7)(hidden, weight, target)
        held = draft.holds(Head.from_probs(p, num).ids).any(-1)
        torch.testing.assert_close(
            ce.double()[held], -logq.gather(-1, best[:, None])[held, 0], rtol=1e-4, atol=1e-4
        )
    head = Head.from_probs(p, 12)
    target = draft.target(TargetBatch(head))
    kl = Chunked(ForwardKL(), "none", 7)(hidden, weight, target)
    for row in range(50):
        kept = [token for token in head.ids[row].tolist() if token in ids.tolist()]
        lost = sum(p[row, token].item() for token in head.ids[row].tolist() if token not in kept)
        mine = torch.tensor([p[row, token].item() / (1 - lost) for token in kept], dtype=torch.float64)
        own = logq[row, [ids.tolist().index(token) for token in kept]].exp()
        pairs = [*zip(mine, own, strict=True), (1 - mine.sum(), 1 - own.sum())]
        assert kl[row].item() == pytest.approx(sum(float(a * (a / b).log()) for a, b in pairs), abs=1e-3)
    wanted = (restricted.double() * (restricted.double().log() - logq)).sum(-1)
    full = draft.target(TargetBatch.from_logits(p.log(), 5))
    kl = ForwardKL()(torch.cat([logq.float(), torch.full((50, 5), -1e4)], 1), full)
    torch.testing.assert_close(kl.double(), wanted, rtol=1e-3, atol=1e-3)


def test_rounds_end_at_tokens_that_cannot_be_drafted(tiny: Path, trace: Path) -> None:
    data = data_of(tiny)
    drafter = make("eagle", draft_vocab_size=60, max_lost_coverage=1.0)
    fit_to_target(drafter, None, data)
    module = DrafterModule(drafter)
    module._layers = data.meta.feature_layers
    module.vocabulary = DraftVocabulary(drafter.draft_ids, 304)
    batch = next(iter(data.val_dataloader()))
    paths, _ = module._paths(batch)
    whole, _ = module._paths(batch, every=True, depth=3)
    held = module.vocabulary.holds(batch.head.greedy.flatten())
    assert 0 < drafter.lost.lost < 1
    ended = 0
    for steps, mask, before in zip(whole.steps, paths.mask, whole.mask, strict=True):
        for d in range(3):
            alive = bool(before[d]) and all(bool(held[step]) for step in steps[: d + 1])
            assert bool(mask[d]) == alive
            ended += bool(before[d]) and not alive
    assert ended > 10
    assert loss_of(module, batch) < 20, "a token that cannot be drafted would cost 1e4 nats"


def test_an_online_target_ends_rounds_where_a_trace_does(tiny: Path, trace: Path) -> None:
    data = data_of(tiny)
    drafter = make("eagle", draft_vocab_size=60, max_lost_coverage=1.0)
    fit_to_target(drafter, None, data)
    batch = next(iter(data.val_dataloader()))
    masks, losses = [], []
    for settings in (None, TargetSettings(str(tiny / "target"))):
        for chunk_tokens in (None, 0):
            module = DrafterModule(drafter, HardCE(), target=settings, chunk_tokens=chunk_tokens)
            module._layers = data.meta.feature_layers
            module.vocabulary = DraftVocabulary(drafter.draft_ids, 304)
            given = batch if settings is None else replace(batch, head=None)  # as packed from plain text
            masks.append(module._paths(given)[0].mask)
            losses.append(loss_of(module, given))
    whole = module._paths(batch, every=True, depth=3)[0].mask
    assert 0 < masks[0].sum() < whole.sum()
    for mask, loss in zip(masks, losses, strict=True):
        assert torch.equal(mask, masks[0])
        assert loss == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("num_anchors", [5, 1000])
@pytest.mark.parametrize("family", ["block", "dspark"])
def test_validation_drafts_no_more_blocks_than_training(
    family: str, num_anchors: int, tiny: Path, trace: Path
) -> None:
    data = data_of(tiny)
    drafter = make(family, num_anchors=num_anchors, short_until=0.0)
    fit_to_target(drafter, None, data)
    module = DrafterModule(drafter)
    module._layers = data.meta.feature_layers
    tokens: list[int] = []
    drafter.layers[0].mlp.register_forward_hook(lambda _, given, __: tokens.append(given[0][..., 0].numel()))
    module.on_validation_epoch_start()
    for index, batch in enumerate(data.val_dataloader()):
        with torch.no_grad():
            module.validation_step(batch, index)
            validating, _ = sum(tokens), tokens.clear()
            module._paths(batch)
            training, _ = sum(tokens), tokens.clear()
        assert 0 < validating <= training
    assert module._sums is not None
    steps = dict(zip(module._sums.names, module._sums.sums.tolist(), strict=True))["steps"]
    counts = torch.cat([batch.loss_mask.sum(-1) for batch in data.val_dataloader()])
    assert steps == counts.clamp(max=num_anchors).sum()


def test_validation_is_of_the_rounds(tiny: Path, trace: Path) -> None:
    data = data_of(tiny)
    for family in ("eagle", "block", "dspark", "few"):
        drafter = make("block") if family == "few" else make(family, **wide(family))
        fit_to_target(drafter, None, data)
        module = DrafterModule(drafter, validation=ValidationSettings(depth=3))
        learn(drafter, next(iter(data.val_dataloader())))
        module._layers = data.meta.feature_layers
        module.on_validation_epoch_start()
        tokens = rounds = steps = hits = 0
        for index, batch in enumerate(data.val_dataloader()):
            with torch.no_grad():
                module.validation_step(batch, index)
                mask = drafter.validation_mask(batch.input_ids, batch.loss_mask)
                assert torch.equal(mask, batch.loss_mask) == (family != "few")
                paths = drafter.paths(
                    batch.input_ids, batch.position_ids, batch.document_ids, mask, batch.features, every=True
                )
                right = drafter.head(paths.hidden).argmax(-1) == batch.head.greedy.flatten()[paths.steps]
            steps, hits = steps + len(right), hits + int(right[:, 0].sum())
            runs = {
                int(path[0]): int((right[i] & paths.mask[i]).cumprod(0).sum())
                for i, path in enumerate(paths.steps)
            }
            counted = mask.flatten().nonzero().flatten().tolist()
            documents, num = batch.document_ids.flatten(), batch.input_ids.shape[1]
            end, place = 0, (-1, -1)  # of the round under way
            for step in counted:
                tokens += 1
                here = (step // num, int(documents[step]))
                if here != place or step >= end:
                    rounds, end, place = rounds + 1, step + runs.get(step, 0) + 1, here
        found = module._sums.metrics()
        assert found["coverage@1"] == pytest.approx(hits / steps)
        assert found["tau_expected"] == pytest.approx(tokens / rounds)
        assert hits > 0


def wide(family: str) -> dict[str, int]:
    """Arguments with which validation drafts from every position."""
    return {} if family == "eagle" else {"num_anchors": 1000}


def learn(drafter: Drafter, batch: Any, steps: int = 25) -> list[float]:
    """A few steps on one batch: right now and then."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        paths = drafter.paths(
            batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
        )
        logits = drafter.head(paths.hidden[paths.mask])
        labels = batch.head.greedy.flatten()[paths.steps[paths.mask]]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    drafter.eval()
    return losses


@pytest.mark.parametrize("family", ["eagle", "block", "dspark"])
def test_killed_and_resumed_runs_end_alike(
    family: str, settings: dict[str, Any], write: Write, tiny: Path, trace: Path, tmp_path: Path
) -> None:
    """Anchors are drawn from the step's seed, the draft vocabulary from the trace."""
    config = {"target_layer_ids": [0]}
    if family == "eagle":
        init = {"config": config | {"draft_vocab_size": 200}, "unroll": 2, "max_lost_coverage": 0.5}
        settings["model"]["drafter"] = {"class_path": "EagleDrafter", "init_args": init}
    else:
        init = {"config": config | {"num_hidden_layers": 1, "block_size": 4}, "num_anchors": 3}
        kind = {"block": "BlockDrafter", "dspark": "DSparkDrafter"}[family]
        settings["model"]["drafter"] = {"class_path": kind, "init_args": init}
    init["short_until"] = 0.1  # the first step, of five as of eight
    factors = [
        {"class_path": "DepthWeights", "init_args": {"gamma": 4.0}},
        {"class_path": "LowMarginWeights", "init_args": {"threshold": 0.2}},
    ]
    settings["model"]["step_weights"] = {"class_path": "ProductWeights", "init_args": {"factors": factors}}
    for split in ("train", "validation"):
        settings["data"][split] = str(tiny / f"{split}-features")
    ends = []
    for name, stops in (("straight", [8]), ("stopped", [5, 8])):
        for stop in stops:
            run = settings | {
                "runs_dir": str(tmp_path / name),
                "trainer": settings["trainer"] | {"max_steps": 8},
            }
            arguments = ["fit", "--config", write(run)]
            if stop != 8:
                arguments += ["--trainer.max_steps", str(stop)]
            elif len(stops) > 1:
                arguments += ["--ckpt_path", "last", "--allow_change", '["trainer.max_steps"]']
            main([*arguments, "--model.optimizer.schedule", "constant"])
        (file,) = (tmp_path / name).glob("tiny/*/checkpoints/last.ckpt")
        ends.append(torch.load(file, weights_only=True))
    one, two = ends
    assert one["global_step"] == two["global_step"] == 8
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert not any("embed" in name for name in one["state_dict"]), "the target stays out of the checkpoint"
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name


def test_what_does_not_fit_is_refused(tiny: Path, trace: Path) -> None:
    plain = data_of(tiny, suffix="")
    with pytest.raises(ValueError, match=r"holds no features and lacks \[0\].*--model.target.name"):
        fit_to_target(make("eagle"), None, plain)
    other = EagleDrafter(EagleConfig(target_layer_ids=(1,)))
    with pytest.raises(ValueError, match="layers 0 to 1, of which 0 to 0"):
        fit_to_target(other, None, plain)
    with pytest.raises(ValueError, match="misses too many.*missed: "):
        fit_to_target(make("eagle", draft_vocab_size=3), None, data_of(tiny))
    with pytest.raises(ValueError, match="give a trace to count in"):
        make("eagle", draft_vocab_size=30).build(304, load(tiny))


def load(tiny: Path) -> Any:
    from certdraft.data import load_target

    return load_target(str(tiny / "target"))


def test_gradients_reach_every_trained_weight(
    tiny: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(tiny)
    batch = next(iter(data.val_dataloader()))
    for family in ("eagle", "block", "dspark"):
        drafter = make(family)
        fit_to_target(drafter, None, data)
        module = DrafterModule(drafter.train())
        module._layers = data.meta.feature_layers
        total: list[Tensor] = []
        monkeypatch.setattr(Accumulation, "scaled", lambda self, loss, *_, total=total: total.append(loss))
        loss_of(module, batch)
        total[0].backward()
        for name, parameter in drafter.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
