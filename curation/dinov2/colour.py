"""Colour jitter, grey, blur, solarise and normalisation of a batch of views, on the device.

What happens to a view is drawn on the CPU from its own numbers; the arithmetic runs on all views at once, in float32 on
values in [0, 1]. It differs by one or two grey levels from the published 8-bit operations, which round after each step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from curation.dinov2.config import CropsConfig
from curation.dinov2.randomness import Purpose, generator

NUM_DRAWS = 13
BLUR_TAPS = 9
SOLARISE_THRESHOLD = 127.5 / 255  # 128 and above of 8 bits are inverted
_GREY = (0.299, 0.587, 0.114)

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColourPlan:
    """What happens to each of N views.

    Attributes:
        factors_N4: Brightness, contrast and saturation factors and the turn of hue (1 is a full circle).
        order_N4: Which of the four comes first, second, third and last.
        jitter_N: Whether the four happen at all.
        grey_N: Whether the view becomes grey.
        sigma_N: Standard deviation of the blur in pixels; 0: none.
        solarise_N: Whether the view is solarised.
    """

    factors_N4: Tensor
    order_N4: Tensor
    jitter_N: Tensor
    grey_N: Tensor
    sigma_N: Tensor
    solarise_N: Tensor

    def to(self, device: torch.device) -> "ColourPlan":
        """Return the plan on a device."""
        return ColourPlan(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def draw(seed: int, position: int, num_views: int) -> Draws:
    """Return the random numbers of all views of one sample, (views, 13) in [0, 1)."""
    return np.stack([generator(seed, Purpose.COLOUR, position, view).random(NUM_DRAWS) for view in range(num_views)])


def plan(draws_N: Draws, config: CropsConfig, blur_p: float, solarise_p: float) -> ColourPlan:
    """Turn the numbers of N views of one kind into what happens to them."""
    unit = 2 * draws_N[:, 1:5] - 1
    factors = unit * np.array([config.brightness, config.contrast, config.saturation, config.hue])
    factors[:, :3] += 1
    low, high = config.blur_sigma_px
    sigma = np.where(draws_N[:, 10] < blur_p, low + (high - low) * draws_N[:, 11], 0.0)
    return ColourPlan(
        factors_N4=torch.from_numpy(factors.astype(np.float32)),
        order_N4=torch.from_numpy(np.argsort(draws_N[:, 5:9], axis=1)),
        jitter_N=torch.from_numpy(draws_N[:, 0] < config.jitter_p),
        grey_N=torch.from_numpy(draws_N[:, 9] < config.grey_p),
        sigma_N=torch.from_numpy(sigma.astype(np.float32)),
        solarise_N=torch.from_numpy(draws_N[:, 12] < solarise_p),
    )


def augment(views_N3HW: Tensor, steps: ColourPlan, config: CropsConfig) -> Tensor:
    """Return normalised float32 views.

    Args:
        views_N3HW: uint8 crops.
        steps: What happens to each, on the same device.
        config: Mean and standard deviation.
    """
    x = views_N3HW.float() / 255
    for place in range(4):
        for index, operation in enumerate((brightness, contrast, saturation, hue)):
            rows = torch.nonzero(steps.jitter_N & (steps.order_N4[:, place] == index)).flatten()
            if len(rows):
                x[rows] = operation(x[rows], steps.factors_N4[rows, index].view(-1, 1, 1, 1))
    rows = torch.nonzero(steps.grey_N).flatten()
    x[rows] = grey(x[rows]).expand(-1, 3, -1, -1)
    rows = torch.nonzero(steps.sigma_N).flatten()
    x[rows] = blur(x[rows], steps.sigma_N[rows])
    rows = torch.nonzero(steps.solarise_N).flatten()
    x[rows] = solarise(x[rows])
    if len(config.mean) == 1:
        x = grey(x)
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (config.mean, config.std))
    return (x - mean) / std


def grey(x_N3HW: Tensor) -> Tensor:
    """Return luma, (N, 1, H, W)."""
    red, green, blue = x_N3HW.unbind(dim=1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue).unsqueeze(1)


def brightness(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black."""
    return (x_N3HW * factor).clamp(0, 1)


def contrast(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the view's mean luma."""
    mean = grey(x_N3HW).mean(dim=(2, 3), keepdim=True)
    return (mean + (x_N3HW - mean) * factor).clamp(0, 1)


def saturation(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its own luma."""
    luma = grey(x_N3HW)
    return (luma + (x_N3HW - luma) * factor).clamp(0, 1)


def hue(x_N3HW: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue circle by a share of a full turn, in HSV."""
    value, low = x_N3HW.amax(dim=1), x_N3HW.amin(dim=1)
    chroma = value - low
    red, green, blue = x_N3HW.unbind(dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixth = sixth + 6 * turn.view(-1, 1, 1)
    # Channel n of the turned colour, from the distance to its own hue: 5 for red, 3 for green, 1 for blue.
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(offset + sixth, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(x_N3HW: Tensor, sigma_N: Tensor) -> Tensor:
    """Return views under a separable 9-tap Gaussian, edges reflected."""
    half = BLUR_TAPS // 2
    taps = torch.arange(-half, half + 1, device=x_N3HW.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma_N.unsqueeze(1)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    x = functional.pad(x_N3HW, (half, half, half, half), mode="reflect")
    for dim in (2, 3):
        length = x.shape[dim] - 2 * half
        x = sum((kernel[:, k].view(-1, 1, 1, 1) * x.narrow(dim, k, length) for k in range(BLUR_TAPS)), torch.zeros(()))
    return x


def solarise(x_N3HW: Tensor) -> Tensor:
    """Invert the brighter half of the values."""
    return torch.where(x_N3HW < SOLARISE_THRESHOLD, x_N3HW, 1 - x_N3HW)
