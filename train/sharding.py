"""FSDP2: the weights, gradients and optimiser state of a drafter, one share on each device."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from certdraft.drafters import Drafter


def shard(drafter: Drafter, mesh: DeviceMesh, precision: str = "32-true") -> None:
    """Shard a drafter over the devices of `mesh`, in place: each decoder layer by itself, then the rest.

    Layers are gathered when they run. Embeddings, norm and head stay gathered from `paths` until the end of
    the backward pass, because losses read the head's weight itself.

    Under mixed precision the layers are gathered in the type that autocast multiplies them in, half the
    bytes, and their gradients are added over devices in fp32; autocast goes on choosing the type of
    everything else, so inputs are left as they are. The rest is gathered in fp32: the head decides ranks.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if isinstance(drafter, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "drafters are sharded over data-parallel devices only; set data_parallel_size of the "
            "ModelParallelStrategy to the number of devices and tensor_parallel_size to 1"
        )
    data = mesh["data_parallel"]
    # Values of our layers are views; nothing writes to them in place, which is what torch warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    for layer in decoder_layers(drafter):
        fully_shard(layer, mesh=data, mp_policy=policy)
        if hasattr(layer, "context"):
            register_fsdp_forward_method(layer, "context")
    fully_shard(drafter, mesh=data, reshard_after_forward=False)
    register_fsdp_forward_method(drafter, "paths")


def decoder_layers(drafter: Drafter) -> list[nn.Module]:
    """The decoder layers of a drafter, transformers' and its own: sharded, or compiled, one by one."""
    names = {
        name
        for module in drafter.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    theirs = [  # a sharded layer has a class of its own, below that of the layer
        module for module in drafter.modules() if names & {kind.__name__ for kind in type(module).__mro__}
    ]
    return theirs + drafter.own_layers
