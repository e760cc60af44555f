"""The peer's half of `benchmarks/peer_training.py`: a speculators drafter that trains when it is told to.

Runs in the environment that `python tests/interop/environments.py speculators` makes, and therefore imports
nothing of certdraft. `serve`, the loop that both halves run, is here for the same reason.

Letters: S tokens of the text, L tapped layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKED = 64  # tokens of the text on which loss and gradient are compared

# Loss and number of drafts of one forward pass; over the first CHECKED tokens alone if told so.
Forward = Callable[[bool], tuple[Tensor, int]]


def serve(model: nn.Module, forward: Forward) -> None:
    """Reports loss and gradient norm at the start, then runs as many steps as each line of stdin says.

    A step is forward, backward, clipping and AdamW. Its CPU seconds go to stdout, with the growth of the
    largest resident size over the one before these steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    loss, _ = forward(True)
    loss.backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    optimizer.zero_grad()
    start = {"loss_nats": float(loss.detach()), "gradient_norm": norm}
    _say({"parameters": sum(p.numel() for p in parameters), "start": start})
    del loss
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what set-up has left behind is not there for the steps to grow into
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        before = _status("VmRSS")
        seconds, losses, drafts = [], [], 0
        for _ in range(int(line)):
            began = time.process_time()
            loss, drafts = forward(False)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            seconds.append(time.process_time() - began)
        peak = _status("VmHWM") - before
        _say({"seconds": seconds, "losses_nats": losses, "drafts": drafts, "peak_bytes": peak})


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def eagle(folder: Path, settings: dict[str, Any], text: dict[str, Tensor]) -> tuple[nn.Module, Forward]:
    """`Eagle3DraftModel`, with a Llama layer as is its default: no norm on queries and keys."""
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3.core import Eagle3DraftModel
    from transformers import LlamaConfig

    model = Eagle3DraftModel.from_training_args(
        LlamaConfig(**_sizes(folder), num_hidden_layers=1),
        target_layer_ids=[layer + 1 for layer in settings["layers"]],  # it counts the embeddings as 0
        norm_before_residual=False,
        ttt_steps=settings["unroll"],
        **_shared(folder, settings),
    )
    model.lm_head.weight.requires_grad_(settings["train_head"])  # frozen unless told otherwise
    _load(model, folder / "eagle.pt")
    loss_config = resolve_loss_config("kl_div", implementation="eager")
    unroll = settings["unroll"]

    def forward(checked: bool) -> tuple[Tensor, int]:
        num = CHECKED if checked else text["input_ids"].shape[1]
        # Its loader shifts a text like this: token t with the features of t − 1 and the target's state at t.
        _, loss, _ = model(
            hidden_states=text["features"][:, : num - 1],
            input_ids=text["input_ids"][:, 1:num],
            document_ids=torch.zeros(1, num - 1, dtype=torch.long),
            loss_mask=torch.ones(1, num - 1, dtype=torch.bool),
            position_ids=torch.arange(1, num)[None],
            verifier_last_hidden_states=text["last"][:, 1:num],
            ttt_steps=unroll,
            loss_config=loss_config,
        )
        return loss, sum(num - 1 - depth for depth in range(unroll))

    return model, forward


def block(folder: Path, settings: dict[str, Any], text: dict[str, Tensor]) -> tuple[nn.Module, Forward]:
    """`DFlashDraftModel` with full attention in all layers."""
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash.core import DFlashDraftModel
    from transformers import Qwen3Config

    model = DFlashDraftModel.from_training_args(
        Qwen3Config(**_sizes(folder), num_hidden_layers=len(settings["layers"])),
        target_layer_ids=[layer + 1 for layer in settings["layers"]],
        block_size=settings["block_size"],
        mask_token_id=settings["mask_token_id"],
        **_shared(folder, settings),
    )
    _load(model, folder / "block.pt")
    loss_config = resolve_loss_config("kl_div", implementation="eager")
    size = settings["block_size"]

    def forward(checked: bool) -> tuple[Tensor, int]:
        num = CHECKED if checked else text["input_ids"].shape[1]
        anchors = num - size if checked else settings["num_anchors"]  # all there can be, or a draw
        _, loss, _ = model(
            hidden_states=text["features"][:, :num],
            input_ids=text["input_ids"][:, :num],
            document_ids=torch.zeros(1, num, dtype=torch.long),
            loss_mask=torch.ones(1, num, dtype=torch.bool),
            position_ids=torch.arange(num)[None],
            verifier_last_hidden_states=text["last"][:, :num],
            loss_config=loss_config,
            gamma=settings["gamma"],
            max_anchors=anchors,
        )
        return loss, anchors * (size - 1)

    return model, forward


def _sizes(folder: Path) -> dict[str, Any]:
    """A layer's sizes, those of the target."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps rope_parameters"
    )
    return {name: config[name] for name in names.split()} | {"tie_word_embeddings": False}


def _shared(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "verifier_name_or_path": str(folder),
        "draft_vocab_size": settings["vocab_size"],
        "draft_attn_impl": settings["attention"],
    }


def _load(model: nn.Module, start: Path) -> None:
    """Starts from the same weights as certdraft's drafter; refuses if a trained tensor gets none."""
    weights = {name.replace("midlayer.", "layers.0."): value for name, value in torch.load(start).items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if unknown or set(missing) - frozen:
        raise ValueError(f"{start.name}: unknown {unknown}, missing {sorted(set(missing) - frozen)}.")


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    text = torch.load(folder / f"{settings['family']}-text.pt")
    text["features"] = text["features"].flatten(-2)  # [1, S, L·H]
    make = {"eagle": eagle, "block": block}[settings["family"]]
    model, forward = make(folder, settings, text)
    serve(model.train(), forward)


if __name__ == "__main__":
    main()
