"""How several processes share a network: a copy each (DDP), or a part each (FSDP2). Alone, nothing is wrapped.

``curation.dinov2.tensors`` hides which way was taken, so that a checkpoint fits any number of processes.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from curation.dinov2.config import TrainConfig
from curation.dinov2.model import Block
from curation.dinov2.network import Network
from curation.dinov2.tensors import placed
from curation.dinov2.world import World
from curation.errors import TrainError


def prepare(networks: Iterable[Network], config: TrainConfig) -> None:
    """Set how blocks run, before the networks are wrapped.

    Raises:
        TrainError: Blocks are to be compiled, and there is no compiler.
    """
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if config.compile and not any(map(shutil.which, compilers)):
        raise TrainError("compile: PyTorch needs a C++ compiler, such as g++; install one, or set compile to false")
    for network in networks:
        network.backbone.recomputes = config.activation_checkpointing
        for block in network.backbone.blocks if config.compile else ():
            if isinstance(block, Block):
                block.compile_forward()


def cut(networks: Iterable[Network], world: World, device: torch.device) -> None:
    """Leave each process a part of every parameter, in place: whole blocks and heads are put together when they run.

    The networks must be equal in all processes.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    for network in networks:
        heads = [module for name, module in network.named_children() if name != "backbone"]
        for module in (*network.backbone.blocks, *heads):
            fully_shard(module, mesh=mesh)
        # A network that learns lets go of the rest after its backward pass; the teacher has none.
        fully_shard(network, mesh=mesh, reshard_after_forward=not any(p.requires_grad for p in network.parameters()))


def copied(network: Network, device: torch.device) -> DistributedDataParallel:
    """Return the network with gradients that are averaged over processes: those of the heads where they learn alone.

    It waits for the gradient of each parameter that has one when it is made, so it is made anew when that changes.
    """
    ids = [device.index or 0] if device.type == "cuda" else None
    still = [p for p in network.backbone.parameters() if p.requires_grad] if network.heads_alone else []
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    finally:
        for parameter in still:
            parameter.requires_grad_(True)


def unsynced(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes keep gradients to this process, to be averaged with later ones."""
    if isinstance(module, DistributedDataParallel):
        context: AbstractContextManager[None] = module.no_sync()
        return context
    return _unsynced_parts(module) if isinstance(module, FSDPModule) else nullcontext()


@contextmanager
def _unsynced_parts(module: FSDPModule) -> Any:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors.

    Raises:
        RuntimeError: Names or shapes are not those of the module.
    """
    held = module.state_dict()
    module.load_state_dict(
        {name: placed(value, held[name]) if name in held else value for name, value in tensors.items()}
    )
