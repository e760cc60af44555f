"""The command that starts a vLLM server for a recording with features, and how layers are counted there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from certdraft.data.record.recording import Recording
from certdraft.data.targets import EMBEDDED, embedded_target_path, target_config
from certdraft.support import facts_of

# what `vllm serve` runs; vLLM's CPU build starts only so
_VLLM = ("python", "-m", "vllm.entrypoints.openai.api_server", "--model")


def engine_layers(layers: Sequence[int]) -> list[int]:
    """vLLM's ids of 0-based layers, ascending as in its files: 0 is the embeddings, i + 1 layer i's output.

    Examples:
        >>> engine_layers((17, 1))
        [2, 18]
    """
    return sorted(layer + 1 for layer in layers)


def layers_folder(layers: Sequence[int]) -> str:
    """Name of the folder for these layers' features: the only sign of what a file there holds.

    Examples:
        >>> layers_folder((17, 1))
        'layers_2_18'
    """
    return "_".join(["layers", *map(str, engine_layers(layers))])


def serve_command(recording: Recording, features_dir: str) -> str:
    """The shell command that starts a vLLM server for this recording.

    Args:
        recording: with feature_layers.
        features_dir: folder that the server and this machine share.
    """
    limit = facts_of(target_config(recording.target, revision=recording.revision)).max_positions
    longest = recording.generation.max_length + 1  # a request for given text generates one token
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {
            "hf_config": {"eagle_aux_hidden_state_layer_ids": engine_layers(recording.feature_layers)}
        },
    }
    folder = Path(features_dir).expanduser() / layers_folder(recording.feature_layers)
    transfer = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    target = str(embedded_target_path()) if recording.target == EMBEDDED else recording.target
    words = [
        *_VLLM, target, *(["--revision", recording.revision] if recording.revision else []),
        "--max-logprobs", str(recording.num_kept),
        "--max-model-len", str(longest if limit is None else min(longest, limit)),
        "--generation-config", "vllm", "--hf-overrides", json.dumps({"head_dtype": "float32"}),
        "--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    return f"mkdir -p {shlex.quote(str(folder))} && {shlex.join(words)}"
