"""Tensors of which this process may hold a part only."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; where it is in parts all processes must ask."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def own(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in place."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor the way another one is held."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
    return value.to(like)
