"""Which layers a server's features come from, by comparison with the target loaded here.

Letters: T tokens · L layers · H hidden · A all layers of the target.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt16
from numpy import ndarray

from certdraft.data.corpus.chat import Prompt
from certdraft.data.record.generation import LogitHead, record_prompts
from certdraft.data.record.learned_positions import Generation
from certdraft.data.record.recording import Recording
from certdraft.data.record.server.http_server import ServerError
from certdraft.data.targets import load_target
from certdraft.data.trace.arrow_trace import as_bfloat16
from certdraft.support import facts_of

_LARGEST_ERROR = 0.1  # relative; bf16 stays below 0.02, fp8 weights below 0.08


def target_features(recording: Recording, ids: list[int]) -> UInt16[ndarray, "T A H"]:
    """Outputs of all layers of the target for a text, computed here; bits of bf16 numbers."""
    model = load_target(recording.target, revision=recording.revision, dtype=getattr(torch, recording.dtype))
    [(_, row)] = record_prompts(
        model,
        LogitHead(model),
        [Prompt(np.asarray(ids, np.int32), 0, "the test text")],
        Generation(max_new_tokens=0, max_length=len(ids)),
        batch_size=1,
        num_kept=1,
        eos_ids=frozenset(),
        feature_layers=range(facts_of(model.config).num_layers),
    )
    assert row.hidden is not None
    return row.hidden


def compare_features(
    served: UInt16[ndarray, "T L H"], here: UInt16[ndarray, "T A H"], layers: tuple[int, ...], url: str
) -> None:
    """Check that a server's features of a text are those of these layers.

    Args:
        served: what the server sent.
        here: outputs of all layers.
        layers: 0-based, of the L axis.
        url: of the server, for errors.

    Raises:
        ServerError: another layer is nearer, or none is near: another model, or one quantised coarsely.
    """
    known = as_bfloat16(here).float()[:, None]  # [T, 1, A, H]
    errors = (as_bfloat16(served).float()[:, :, None] - known).norm(dim=-1) / known.norm(dim=-1).clamp_min(
        1e-9
    )
    errors = errors.median(0).values  # [L, A]; a first token may have values of another magnitude
    for number, layer in enumerate(layers):
        nearest, error = int(errors[number].argmin()), float(errors[number, layer])
        if error > _LARGEST_ERROR:
            found = (
                f"they are those of layer {nearest}; start the server for feature_layers={list(layers)}"
                if errors[number, nearest] <= _LARGEST_ERROR
                else "and near no other layer's either: it serves other weights than `target` names"
            )
            raise ServerError(
                f"{url}: the server's features for layer {layer} differ from that layer's output by "
                f"{error:.0%} of its norm, {found}"
            )
        if nearest != layer and errors[number, nearest] < 0.5 * error:
            raise ServerError(
                f"{url}: the server's features for layer {layer} are nearer to layer {nearest}'s "
                f"({errors[number, nearest]:.2%} against {error:.2%}); start the server for feature_layers="
                f"{list(layers)}"
            )
