"""Arbitration policies: from the features of a mismatch to the log-odds that the drafter's token is taken.

A policy is any callable [N, F] → [N]. `ArbiterPolicy` is the trained one, saved as safetensors with a json
beside it; the others are baselines with one number each.

Letters: N mismatches · F features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from certdraft.arbitration.mismatch_features import FEATURES
from certdraft.support import open_to_readers, write_file, write_text

Policy = Callable[[Tensor], Tensor]  # features [N, F] → log-odds [N] that the drafter's token is taken

WEIGHTS_FILE, SETTINGS_FILE = "policy.safetensors", "policy.json"
_FORMAT = 1
_COLUMN = {name: index for index, name in enumerate(FEATURES)}


class ArbiterPolicy(nn.Module):
    """Standardised features → log-odds: linear, or with one hidden layer.

    `facts` are the further entries of policy.json: how the policy was trained. `texts` among them are the
    `ArbitrationSettings` (depth, look-ahead, override budget, ...) that it has to be used with.

    Args:
        hidden: units of the hidden layer, 0 for a linear policy.
        initial_log_odds: bias of the output; negative, so that training starts near strict decoding. −2 is
            an override at 12 % of mismatches.
    """

    mean: Tensor
    scale: Tensor
    measured: Tensor

    def __init__(self, hidden: int = 32, initial_log_odds: float = -2.0) -> None:
        super().__init__()
        if hidden < 0:
            raise ValueError(f"ArbiterPolicy.hidden is {hidden}; give a number of units, or 0 for linear")
        self.hidden, self.initial_log_odds = hidden, initial_log_odds
        num = len(FEATURES)
        last = nn.Linear(hidden or num, 1)
        nn.init.zeros_(last.weight)  # the first policy is the same everywhere
        nn.init.constant_(last.bias, initial_log_odds)
        self.network = nn.Sequential(nn.Linear(num, hidden), nn.ReLU(), last) if hidden else last
        self.facts: dict[str, Any] = {}
        self.register_buffer("mean", torch.zeros(num))
        self.register_buffer("scale", torch.ones(num))
        self.register_buffer("measured", torch.tensor(False))

    @property
    def texts(self) -> dict[str, Any]:
        """Settings of the texts that the policy was trained on; empty for an untrained one."""
        return self.facts.get("texts") or {}

    def forward(self, features: Float[Tensor, "*step F"]) -> Float[Tensor, "*step"]:
        """Log-odds that the drafter's token is taken."""
        return self.network((features - self.mean) / self.scale)[..., 0]

    @torch.no_grad()
    def standardise(self, features: Float[Tensor, "N F"]) -> None:
        """Set centre and scale of each feature from a sample, the first batch of a training."""
        if len(features) < 2:
            return
        self.mean.copy_(features.mean(0))
        deviation = features.std(0)
        self.scale.copy_(torch.where(deviation > 1e-3, deviation, 1.0))
        self.measured.fill_(True)

    def save(self, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Write policy.safetensors and policy.json.

        Args:
            folder: made if missing.
            facts: further entries of the json, such as how the policy was trained; `self.facts` if None.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        settings = {
            "format": _FORMAT,
            "features": list(FEATURES),
            "hidden": self.hidden,
            **(self.facts if facts is None else facts),
        }
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_file(path / WEIGHTS_FILE, lambda temporary: save_file(weights, temporary))
        write_text(path / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        open_to_readers(path)


def load_policy(folder: str | Path) -> ArbiterPolicy:
    """Load a policy that `ArbiterPolicy.save` wrote, in eval mode.

    Raises:
        FileNotFoundError: no policy in the folder.
        ValueError: a policy of other features, or weights that do not fit.
    """
    path = Path(folder)
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}; give a folder that a policy was saved to")
    try:
        settings = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))
        features, hidden = settings["features"], int(settings["hidden"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / SETTINGS_FILE} is not a policy's settings: {error!r}") from error
    if settings.get("format") != _FORMAT or features != list(FEATURES):
        raise ValueError(
            f"{path}: the policy reads {features} (format {settings.get('format')}), this version computes "
            f"{list(FEATURES)} (format {_FORMAT}); train it again"
        )
    policy = ArbiterPolicy(hidden)
    policy.facts = {k: v for k, v in settings.items() if k not in ("format", "features", "hidden")}
    try:
        policy.load_state_dict(load_file(path / WEIGHTS_FILE))
    except (RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path / WEIGHTS_FILE} does not fit its {SETTINGS_FILE}: {first}") from error
    return policy.eval()


class LogRatio:
    """Baseline: the drafter's token is taken where the target finds it nearly as probable as its own.

    Args:
        bound: nats; taken when log p(y) − log p(x) < bound. 0 never takes one, +inf always.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        return self.bound - features[:, _COLUMN["target_log_ratio"]]


class TypicalAcceptance:
    """Baseline: typical acceptance, p(x) > min(epsilon, delta · exp(−H(p))).

    Args:
        epsilon: probability that always suffices.
        delta: share of exp(−H) that suffices; √epsilon when not given, as is usual.
    """

    def __init__(self, epsilon: float, delta: float | None = None) -> None:
        self.epsilon, self.delta = epsilon, math.sqrt(epsilon) if delta is None else delta

    def __call__(self, features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        logp = features[:, _COLUMN["target_logp"]] - features[:, _COLUMN["target_log_ratio"]]
        typical = math.log(self.delta) - features[:, _COLUMN["target_entropy"]]
        return logp - typical.clamp_max(math.log(self.epsilon))


class RandomArbitration:
    """Baseline: a biased coin.

    Args:
        rate: share of mismatches at which the drafter's token is taken, in [0, 1].
        seed: of the coin.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        self.rate, self._generator = rate, torch.Generator().manual_seed(seed)

    def __call__(self, features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
        draws = torch.rand(len(features), generator=self._generator)
        return torch.where(draws < self.rate, 1.0, -1.0).to(features.device)
