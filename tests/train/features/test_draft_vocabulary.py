"""Training with a draft vocabulary: the restricted target, and rounds that end where it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.runs.feature_training import data_of, loss_of, make

from certdraft.certificates import Head
from certdraft.losses import Chunked, ForwardKL, HardCE, TargetBatch
from certdraft.train import DrafterModule
from certdraft.train.drafter_setup import fit_to_target
from certdraft.train.restricted_target import DraftVocabulary
from certdraft.train.target_outputs import TargetSettings


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


def test_mass_chooses_the_draft_vocabulary_and_validation_text_judges_it(
    tiny: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of(tiny)
    drafter = make("eagle", draft_vocab_size=60, max_lost_coverage=1.0)
    fit_to_target(drafter, None, data)
    mass, greedy, judged = torch.zeros(304), torch.zeros(304), torch.zeros(304)
    for document in data.documents["train"].tolist():
        columns = data.train_trace.columns(document)
        for place in np.flatnonzero(columns.loss_mask):
            p = np.exp(-columns.top_gap[place].astype(float) - columns.lse_gap[place])
            mass[columns.top_ids[place].astype(int)] += torch.from_numpy(p).float()
            greedy[int(columns.top_ids[place, 0])] += 1
    for document in data.documents["validation"].tolist():
        columns = data.validation_trace.columns(document)
        for place in np.flatnonzero(columns.loss_mask):
            judged[int(columns.top_ids[place, 0])] += 1
    chosen = set(mass.topk(60).indices.tolist())
    assert chosen != set(greedy.topk(60).indices.tolist())
    assert chosen == set(drafter.draft_ids.tolist())
    outside = torch.ones(304, dtype=torch.bool)
    outside[drafter.draft_ids] = False
    assert drafter.lost.lost == pytest.approx(float(greedy[outside].sum() / greedy.sum()))
    share = float(judged[outside].sum() / judged.sum())
    assert (
        f"on validation text {share:.2%} of {int(judged.sum()):,} greedy tokens lost"
        in capsys.readouterr().err
    )
