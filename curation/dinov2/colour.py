"""Colour jitter, grey, blur, solarise and normalisation of a batch of views, on the device.

What happens to a view is drawn on the CPU from its own numbers; the arithmetic runs in float32 on values in [0, 1], on
all views at once or, on a CPU, on as many as fit into its cache. An operation differs by one grey level from the
published 8-bit one, which rounds its result, and a chain of them by two.

On one core (AVX-512) a pass over values in the cache costs a quarter of one over values in memory, and ``torch.where``
and comparisons five to ten times as much as ``maximum``, so there are none of them here.
"""

from collections.abc import Callable
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
_SIXTH = 255 / 6  # of the hue circle, in the steps of a hue of 8 bits
_GREY = (0.299, 0.587, 0.114)
_CACHED_VALUES = 1 << 18  # a megabyte: one global crop, or nine local ones

Draws = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ColourPlan:
    """What happens to each of N views; it stays on the CPU, which so never waits for the device.

    Attributes:
        factors_N4: Brightness, contrast and saturation factors and the turn of hue (1 is a full circle).
        order_N4: Which of the four comes first, second, third and last.
        jitter_N: Whether the four happen at all.
        grey_N: Whether the view becomes grey.
        sigma_N: Standard deviation of the blur in pixels; 0: none.
        solarise_N: Whether the view is solarised.
    """

    factors_N4: Numbers
    order_N4: npt.NDArray[np.int64]
    jitter_N: Flags
    grey_N: Flags
    sigma_N: Numbers
    solarise_N: Flags

    @classmethod
    def joined(cls, plans: "list[ColourPlan]") -> "ColourPlan":
        """Return one plan for the views of several, one after the other."""
        return cls(**{name: np.concatenate([getattr(plan, name) for plan in plans]) for name in vars(plans[0])})

    def part(self, views: slice) -> "ColourPlan":
        """Return the plan of some of the views."""
        return ColourPlan(**{name: value[views] for name, value in vars(self).items()})


def draw(seed: int, position: int, num_views: int) -> Draws:
    """Return the random numbers of all views of one sample, (views, 13) in [0, 1)."""
    return generator(seed, Purpose.COLOUR, position).random((num_views, NUM_DRAWS))


def plan(draws_N: Draws, config: CropsConfig, blur_p: float, solarise_p: float) -> ColourPlan:
    """Turn the numbers of N views of one kind into what happens to them."""
    unit = 2 * draws_N[:, 1:5] - 1
    factors = unit * np.array([config.brightness, config.contrast, config.saturation, config.hue])
    factors[:, :3] += 1
    low, high = config.blur_sigma_px
    sigma = np.where(draws_N[:, 10] < blur_p, low + (high - low) * draws_N[:, 11], 0.0)
    return ColourPlan(
        factors_N4=factors.astype(np.float32),
        order_N4=np.argsort(draws_N[:, 5:9], axis=1),
        jitter_N=draws_N[:, 0] < config.jitter_p,
        grey_N=draws_N[:, 9] < config.grey_p,
        sigma_N=sigma.astype(np.float32),
        solarise_N=draws_N[:, 12] < solarise_p,
    )


def augment(views_N3HW: Tensor, steps: ColourPlan, config: CropsConfig) -> Tensor:
    """Return normalised float32 views: three channels, or luma where there is one mean.

    Args:
        views_N3HW: uint8 crops, on the device.
        steps: What happens to each.
        config: Mean and standard deviation.
    """
    num, _, height, width = views_N3HW.shape
    mean, std = (
        torch.tensor(v).to(views_N3HW.device, non_blocking=True).view(1, -1, 1, 1) for v in (config.mean, config.std)
    )
    out = torch.empty(num, mean.numel(), height, width, device=mean.device)
    at_once = max(1, num if out.is_cuda else _CACHED_VALUES // (3 * height * width))
    for first in range(0, num, at_once):
        views = slice(first, first + at_once)
        x = _coloured(views_N3HW[views].float().mul_(1 / 255), steps.part(views))
        torch.sub(x if mean.numel() > 1 else grey(x), mean, out=out[views]).div_(std)
    return out


def _coloured(x_N3HW: Tensor, steps: ColourPlan) -> Tensor:
    x = x_N3HW
    for place in range(4):
        for index, operation in enumerate((brightness, contrast, saturation, hue)):
            chosen = steps.jitter_N & (steps.order_N4[:, place] == index)
            x = _on(x, chosen, operation, steps.factors_N4[:, index].reshape(-1, 1, 1, 1))
    x = _on(x, steps.grey_N, lambda some: grey(some).repeat(1, 3, 1, 1))  # written to next
    x = _on(x, steps.sigma_N > 0, blur, steps.sigma_N)
    return _on(x, steps.solarise_N, solarise)


def _on(x_N3HW: Tensor, chosen_N: Flags, operation: Callable[..., Tensor], *numbers_N: Numbers) -> Tensor:
    """Return the views after an operation on some of them."""
    rows = np.flatnonzero(chosen_N)
    if not len(rows):
        return x_N3HW
    device = x_N3HW.device
    numbers = [torch.from_numpy(values[rows]).to(device, non_blocking=True) for values in numbers_N]
    if len(rows) == len(x_N3HW):
        return operation(x_N3HW, *numbers)
    index = torch.from_numpy(rows).to(device, non_blocking=True)
    return x_N3HW.index_copy_(0, index, operation(x_N3HW.index_select(0, index), *numbers))


def grey(x_N3HW: Tensor) -> Tensor:
    """Return luma, (N, 1, H, W)."""
    red, green, blue = torch.split(x_N3HW, 1, dim=1)
    luma: Tensor = (_GREY[0] * red).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])
    return luma


def brightness(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black."""
    return (x_N3HW * factor).clamp_(0, 1)


def contrast(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the view's mean luma."""
    mean = grey(x_N3HW.mean(dim=(2, 3), keepdim=True))
    return (x_N3HW * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x_N3HW: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its own luma."""
    return torch.lerp(grey(x_N3HW), x_N3HW, factor).clamp_(0, 1)


def hue(x_N3HW: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue circle by a share of a full turn, in HSV whose hue has 8 bits, as in the published 8-bit operation.

    A circle has 255 of its steps, and turning goes on after 256. They are up to six grey levels wide: with an exact hue
    single pixels were 12 levels from the published ones.
    """
    red, green, blue = torch.split(x_N3HW, 1, dim=1)
    upper, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, upper), torch.minimum(red, upper)
    low = torch.minimum(middle, lower)
    chroma = value - low
    # Hue in sixths is |base + (middle - lower) / chroma|, base by what is largest: red 0 (-6 if blue exceeds green),
    # green -2, blue 4.
    blue_leads, red_trails = _is_positive(blue - green), _is_positive(upper - red)
    base = red_trails.mul_(blue_leads.mul(12 * _SIXTH).sub_(2 * _SIXTH)).sub_(blue_leads, alpha=6 * _SIXTH)
    steps = base.add_(middle.sub_(lower).div_(chroma.clamp(min=1e-12)), alpha=_SIXTH).abs_().floor_()
    steps.add_(turn.mul(255).trunc_().view(-1, 1, 1, 1))
    steps.sub_(steps.mul(1 / 256).floor_(), alpha=256)
    # A channel moves with the distance to a place on the circle: red from cyan, green and blue from themselves.
    turned = torch.empty_like(x_N3HW)
    torch.addcmul(low, chroma, _ramp(steps, 3), value=1 / _SIXTH, out=turned[:, :1])
    torch.addcmul(value, chroma, _ramp(steps, 2), value=-1 / _SIXTH, out=turned[:, 1:2])
    torch.addcmul(value, chroma, _ramp(steps, 4), value=-1 / _SIXTH, out=turned[:, 2:])
    return turned


def _is_positive(x: Tensor) -> Tensor:
    """Return 1 where x > 0, else 0, as float; ``x`` changes. A comparison takes five times as long on a CPU."""
    return x.mul_(1e30).clamp_(0, 1)


def _ramp(steps: Tensor, place: int) -> Tensor:
    return (steps - place * _SIXTH).abs_().sub_(_SIXTH).clamp_(0, _SIXTH)


def blur(x_N3HW: Tensor, sigma_N: Tensor) -> Tensor:
    """Return views under a separable 9-tap Gaussian, edges reflected."""
    half = BLUR_TAPS // 2
    taps = torch.arange(-half, half + 1, device=x_N3HW.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma_N.unsqueeze(1)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).view(-1, BLUR_TAPS, 1, 1, 1)
    x = functional.pad(x_N3HW, (half, half, half, half), mode="reflect")
    for dim in (2, 3):
        length = x.shape[dim] - 2 * half
        blurred = kernel[:, 0] * x.narrow(dim, 0, length)
        for tap in range(1, BLUR_TAPS):
            blurred.addcmul_(kernel[:, tap], x.narrow(dim, tap, length))
        x = blurred
    return x


def solarise(x_N3HW: Tensor) -> Tensor:
    """Invert the brighter half of the values: 128 and above of 8 bits."""
    return torch.minimum(x_N3HW, 1 - x_N3HW)
