"""AdamW with a learning rate and weight decay of each parameter's own, and clipping by module."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curation.dinov2.config import OptimConfig
from curation.dinov2.network import Network
from curation.dinov2.schedules import StepSettings
from curation.dinov2.tensors import placed, whole

_TOKENS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed.")


@dataclass(frozen=True)
class Multipliers:
    """Factors on the scheduled values for one parameter."""

    lr: float
    weight_decay: float
    is_last_layer: bool
    is_backbone: bool = False


def multipliers(name: str, depth: int, layer_decay: float, patch_embed_lr_mult: float) -> Multipliers:
    """Return the factors of a parameter by its name in ``Network``.

    The learning rate falls by ``layer_decay`` from block to block towards the input, and the patch embedding's further
    by its own factor. Biases, norms and layer scales do not decay; tokens and position embeddings do.
    """
    lr = 1.0
    if name.startswith("backbone."):
        inner = name.removeprefix("backbone.")
        block = re.match(r"blocks\.(\d+)\.", inner)
        if inner.startswith(_TOKENS):
            lr = layer_decay ** (depth + 1)
        elif block:
            lr = layer_decay ** (depth - int(block[1]))
        if inner.startswith("patch_embed."):
            lr *= patch_embed_lr_mult
    undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
    return Multipliers(lr, 0.0 if undecayed else 1.0, "last_layer" in name, name.startswith("backbone."))


class Optimizer:
    """AdamW over a student.

    Args:
        student: Its parameters are grouped by their multipliers.
        config: Betas, decay and clipping.
    """

    def __init__(self, student: Network, config: OptimConfig) -> None:
        self._student = student
        self._config = config
        self._names: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad
        }
        groups: dict[Multipliers, list[nn.Parameter]] = {}
        for name, parameter in self._names.items():
            key = multipliers(name, student.backbone.config.shape.depth, config.layer_decay, config.patch_embed_lr_mult)
            groups.setdefault(key, []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": parameters, "multipliers": key} for key, parameters in groups.items()],
            lr=0.0,
            betas=config.betas,
            fused=True,
        )
        self.num_updates = 0

    def clip(self) -> dict[str, float]:
        """Scale gradients down to the largest norm, each module on its own; return the norms before, by module.

        A module that stands still has none.
        """
        norms = {}
        for name, module in self._student.named_children():
            found = [parameter for parameter in module.parameters() if parameter.grad is not None]
            if not found:
                continue
            norm = nn.utils.get_total_norm([parameter.grad for parameter in found if parameter.grad is not None])
            norms[name] = float(whole(norm))
            if not norms[name] < self._config.clip_norm:  # most steps need no pass over the gradients
                nn.utils.clip_grads_with_norm_(found, self._config.clip_norm, norm)
        return norms

    def step(self, now: StepSettings) -> None:
        """Update the student with the gradients it has."""
        for group in self._adamw.param_groups:
            factors: Multipliers = group["multipliers"]
            lr = now.last_layer_lr if factors.is_last_layer else now.lr
            group["lr"] = lr * factors.lr * (now.backbone_lr_mult if factors.is_backbone else 1.0)
            group["weight_decay"] = now.weight_decay * factors.weight_decay
        self._adamw.step()
        self.num_updates += 1

    def zero_grad(self) -> None:
        """Forget gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return what is held of each parameter that was updated, by kind: ``exp_avg/…``, ``exp_avg_sq/…``, ``step/…``.

        The last is how often it was: less often than others where it stood still at first.
        """
        return {
            f"{kind}/{name}": self._adamw.state[parameter][kind]
            for name, parameter in self._names.items()
            for kind in ("exp_avg", "exp_avg_sq", "step")
            if parameter in self._adamw.state
        }

    def restore(self, tensors: dict[str, Tensor], num_updates: int) -> None:
        """Take back what ``state`` gave, after ``num_updates`` updates."""
        self.num_updates = num_updates
        every = torch.tensor(float(num_updates))
        for name, parameter in self._names.items():
            if f"exp_avg/{name}" in tensors:
                self._adamw.state[parameter] = {
                    "step": tensors.get(f"step/{name}", every).to(parameter.device, copy=True),
                    **{m: placed(tensors[f"{m}/{name}"], parameter).clone() for m in ("exp_avg", "exp_avg_sq")},
                }
