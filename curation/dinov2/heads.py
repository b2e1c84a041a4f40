"""The projection head: features to what prototype scores are made of."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from curation.dinov2.config import HeadConfig
from curation.dinov2.scores import Projected


class Prototypes(nn.Module):
    """Rows of learned length and direction: ``weight_g · v / |v|``, no bias."""

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)

    def forward(self) -> Tensor:
        """Return the prototypes, (K, D)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)


class ProjectionHead(nn.Module):
    """Linear layers with GELU between, a bottleneck of unit length, then prototypes.

    Source:
        Caron et al. 2021, "Emerging properties in self-supervised vision transformers".
    """

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        widths = [dim, *[config.hidden_dim] * (config.layers - 1), config.bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1]) if config.layers > 1 else layers[0]
        self.last_layer = Prototypes(config.bottleneck_dim, config.prototypes)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_ND: Tensor) -> Projected:
        """Return what prototype scores are made of: cosines times the length of each prototype."""
        return Projected(functional.normalize(self.mlp(x_ND), dim=-1, eps=1e-12), self.last_layer())
