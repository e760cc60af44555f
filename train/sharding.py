"""FSDP2: the weights, gradients and optimiser state of a drafter, one share on each device."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from certdraft.drafters import Drafter


def shard(drafter: Drafter, mesh: DeviceMesh) -> None:
    """Shard a drafter over the devices of `mesh`, in place: each decoder layer by itself, then the rest.

    Layers are gathered when they run. Embeddings, norm and head stay gathered from `paths` until the end of
    the backward pass, because losses read the head's weight itself.

    Args:
        drafter: with its network; sharded only once.
        mesh: of Lightning's `ModelParallelStrategy`.

    Raises:
        ValueError: the strategy requests tensor parallelism.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(drafter, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "drafters are sharded over data-parallel devices only; set data_parallel_size of the "
            "ModelParallelStrategy to the number of devices and tensor_parallel_size to 1"
        )
    data = mesh["data_parallel"]
    for layer in decoder_layers(drafter):
        fully_shard(layer, mesh=data)
    fully_shard(drafter, mesh=data, reshard_after_forward=False)
    register_fsdp_forward_method(drafter, "paths")


def decoder_layers(drafter: Drafter) -> list[nn.Module]:
    """The decoder layers of transformers models inside a drafter: sharded, or compiled, one by one."""
    names = {
        name
        for module in drafter.modules()
        if isinstance(module, PreTrainedModel)
        for name in module._no_split_modules or ()
    }
    return [module for module in drafter.modules() if type(module).__name__ in names]
