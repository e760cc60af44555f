"""Hidden states on disk as vLLM's ExampleHiddenStatesConnector leaves them; written from its behaviour.

The lock file exists, locked, before the path is returned; the file follows, and then the lock is dropped.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import uuid
from typing import Any

import torch
from safetensors.torch import save


def begin_file(model: Any, ids: list[int], name: str, features: dict[str, Any], fault: str | None) -> str:
    """Returns the path at once; a thread writes the file."""
    path = os.path.join(features["folder"], f"cmpl-{name}-0-{uuid.uuid4().hex[:8]}.safetensors")
    if fault == "elsewhere":
        return "/etc/passwd"
    lock = None
    if fault != "unlocked":
        lock = os.open(path + ".lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Thread(target=write, args=(model, ids, path, lock, features, fault), daemon=True).start()
    return path


def write(
    model: Any, ids: list[int], path: str, lock: int | None, features: dict[str, Any], fault: str | None
) -> None:
    time.sleep(features.get("delay_s", 0.02))
    try:
        if fault == "stuck":
            time.sleep(10)
        if fault not in ("missing", "unlocked", "stuck"):
            content = save(spoil(tensors_of(model, ids, features["layers"]), fault))
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2 if fault == "half" else None])
    finally:
        if lock is not None:
            os.close(lock)


def tensors_of(model: Any, ids: list[int], layers: list[int]) -> dict[str, torch.Tensor]:
    """As vLLM counts layers: 0 is the embeddings, i + 1 the output of layer i, before any final norm."""
    body = model.model
    modules = [body.embed_tokens, *body.layers]
    outputs: dict[int, torch.Tensor] = {}
    mine = threading.get_ident()

    def keep(number: int) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if threading.get_ident() == mine:  # other threads run the model at the same time
                outputs[number] = output

        return hook

    with torch.no_grad():
        hooks = [modules[number].register_forward_hook(keep(number)) for number in layers]
        body(input_ids=torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
    hidden = torch.stack([outputs[number][0] for number in sorted(set(layers))], dim=1)
    return {"hidden_states": hidden.bfloat16().contiguous(), "token_ids": torch.tensor(ids)}


def spoil(tensors: dict[str, torch.Tensor], fault: str | None) -> dict[str, torch.Tensor]:
    hidden = tensors["hidden_states"]
    if fault == "shape":
        tensors["hidden_states"] = hidden[:, :1].contiguous()
    elif fault == "long":
        tensors["hidden_states"] = torch.zeros(1 << 17)
    elif fault == "nan":
        hidden[3] = torch.nan
    elif fault == "tokens":
        tensors["token_ids"][0] += 1
    elif fault == "keys":
        tensors["kv"] = tensors.pop("hidden_states")
    return tensors
