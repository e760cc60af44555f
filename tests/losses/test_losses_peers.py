"""Our baselines against the packages whose losses they are: values and gradients.

Skipped where a package is not installed. They want one another's old versions, so install them bare, in an
environment of their own beside this package:

    pip install --no-deps speculators==0.9.0 trl==1.16.0 specforge==0.2.0 liger-kernel==0.8.5 hs-connectors
    pip install openai aiohttp loguru pydantic-settings triton
    TORCH_COMPILE_DISABLE=1 TRL_EXPERIMENTAL_SILENCE=1 pytest tests/losses/test_losses_peers.py
"""

import importlib

import pytest
import torch
from oracles.mathematics.loss_cases import K

from certdraft import losses as L

pytestmark = [pytest.mark.filterwarnings("ignore")]
T, V = 24, 97


def peer(name):
    """The module, or a skip: a peer that is there but does not import is as good as absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture(scope="module")
def logits():
    generator = torch.Generator().manual_seed(0)
    theirs = 3 * torch.randn(T, V, generator=generator)
    return (0.5 * theirs + 2 * torch.randn(T, V, generator=generator)).requires_grad_(), theirs


def same(ours, theirs, z, rtol=1e-4, atol=2e-6):
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)
    (got,) = torch.autograd.grad(ours.sum(), z, retain_graph=True)
    (want,) = torch.autograd.grad(theirs.sum(), z, retain_graph=True)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("ce_loss", L.HardCE()),
        ("kl_div_loss", L.ForwardKL("full")),
        ("reverse_kl_div_loss", L.ReverseKL("full")),
        ("js_div_loss", L.JensenShannon(0.5, "full")),
        ("tv_loss", L.TotalVariation("full")),
        ("neg_log_acceptance_loss", L.LK("alpha", vocabulary="full")),
        ("lk_hybrid_loss", L.LK("hybrid", 3.0, "full")),
    ],
)
def test_speculators(name, loss, logits):
    z, theirs = logits
    target = L.TargetBatch.from_logits(theirs, K)
    same(loss(z, target), getattr(peer("speculators.losses.eager"), name)(z[None], theirs[None])[0], z)


@pytest.mark.parametrize(("ce", "tv"), [(0.1, 0.9), (0.5, 0.5)])
def test_speculators_sums(ce, tv, logits):
    """The recommended mix of DSpark and xPress, as one of their compound losses."""
    z, theirs = logits
    module = peer("speculators.losses")
    config = module.resolve_loss_config(f'{{"ce": {ce}, "tv": {tv}}}', "eager")
    whole = torch.ones(1, T)
    total, _ = module.compound_loss(z[None], theirs[None], whole, torch.arange(T)[None], config)
    ours = L.Mixture([L.HardCE(), L.TotalVariation()], [ce, tv])(z, L.TargetBatch.from_logits(theirs, K))
    same(ours.mean(), total, z)


def test_speculators_weights():
    module = peer("speculators.losses")
    places = torch.arange(8)[None]
    expected = module.dflash_loss_decay(places, 7.0)[0, 1:]
    torch.testing.assert_close(L.depth_decay(7, 7.0), expected)
    gamma = -1 / torch.tensor(0.8).log()  # their 0.8^d is our e^(−d/γ)
    torch.testing.assert_close(L.depth_decay(8, float(gamma)), module.exp_loss_decay(places, 0.8)[0])
    nll = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) * 3
    mask = torch.arange(8).expand(3, 8) < torch.tensor([[8], [5], [1]])
    theirs = module.dpace_loss_decay(places, mask.reshape(1, -1), 8, 0.5, nll.reshape(1, -1))
    torch.testing.assert_close(L.prefix_weights((-nll).exp(), mask, 0.5), theirs.view(3, 8))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl(beta, logits):
    z, theirs = logits
    trainer = peer("trl.experimental.gkd").GKDTrainer
    expected = trainer.generalized_jsd_loss(z[None], theirs[None], beta=beta, reduction="none")[0].sum(-1)
    loss = {0.0: L.ForwardKL(), 1.0: L.ReverseKL()}.get(beta) or L.JensenShannon(beta)
    same(loss(z, L.TargetBatch.from_logits(theirs, K)), expected, z)


def test_specforge(logits):
    z, theirs = logits
    module = peer("specforge.core.lk_loss")
    target = L.TargetBatch.from_logits(theirs, K)
    chance, log_chance = module.compute_acceptance_rate(
        logits=z[None], target_probs=theirs.softmax(-1)[None], position_mask=torch.ones(1, T, 1)
    )
    settings = {
        "acceptance_rate": chance,
        "log_acceptance_rate": log_chance,
        "kl_scale": 1.0,
        "kl_decay": 3.0,
    }
    kl = L.ForwardKL()(z, target).mean()
    alpha = module.compute_lk_loss(kl_loss=kl, lk_loss_type="alpha", **settings)
    same(L.LK("alpha")(z, target).mean(), alpha, z)
    same(1 - L.TotalVariation()(z, target).mean(), chance, z)
    # their hybrid takes one mixing weight for the batch; on one step it is ours
    one = L.TargetBatch.from_logits(theirs[:1], K)
    chance, log_chance = module.compute_acceptance_rate(
        logits=z[None, :1], target_probs=theirs[:1].softmax(-1)[None], position_mask=torch.ones(1, 1, 1)
    )
    settings |= {"acceptance_rate": chance, "log_acceptance_rate": log_chance}
    kl = L.ForwardKL()(z[:1], one).mean()
    hybrid = module.compute_lk_loss(kl_loss=kl, lk_loss_type="lambda", **settings)
    same(L.LK("hybrid", 3.0)(z[:1], one).mean(), hybrid, z)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_liger_chunked(beta):
    """Hidden states and output layers in, as in `Chunked`: value and both gradients."""
    liger = peer("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, 8, generator=generator), torch.randn(V, 8, generator=generator)
    t_hidden, t_weight = torch.randn(T, 8, generator=generator), torch.randn(V, 8, generator=generator)
    loss = {0.0: L.ForwardKL(), 1.0: L.ReverseKL()}.get(beta) or L.JensenShannon(beta)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    ours = L.Chunked(loss, "mean", 8)(*leaves, L.OnlineTarget(t_hidden, t_weight, K))
    function = liger(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=8)
    copies = [x.detach().clone().requires_grad_() for x in leaves]
    theirs = function(*copies, t_hidden, t_weight, torch.zeros(T, dtype=torch.long))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    want = torch.autograd.grad(theirs, copies)
    for a, b in zip(torch.autograd.grad(ours, leaves), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_torch_agrees_on_the_data_token():
    """What SpecForge and DeepSpec train DFlash with is PyTorch's cross-entropy on the data."""
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(T, V, generator=generator), torch.randint(0, V, (T,), generator=generator)
    z.requires_grad_()
    target = L.TargetBatch.from_logits(torch.randn(T, V, generator=generator), K, next_ids=labels)
    same(L.TokenCE()(z, target), torch.nn.functional.cross_entropy(z, labels, reduction="none"), z)
