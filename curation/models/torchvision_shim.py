"""Make timm importable beside a torchvision whose compiled operators do not load.

Some torchvision wheels are CUDA builds. Beside a CPU-only torch their extension cannot be loaded, and importing
torchvision fails with ``operator torchvision::nms does not exist``, because it registers shape functions for operators
that nobody declared. timm imports torchvision but uses none of its operators, so declaring them is enough.
"""

import importlib
import importlib.util
import sys
from functools import cache

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def prepare() -> "torch.library.Library | None":
    """Import torchvision; only where that fails for want of its operators, declare them and import it again.

    Returns:
        The declared library, which has to stay alive; None where torchvision is fine or absent.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    importlib.import_module("torchvision")
    return library
