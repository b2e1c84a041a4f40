"""Curate self-supervised image datasets from crawled pages, and train DINOv2 on them."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata  # takes longer than all else that `curate --help` imports

    try:
        return metadata.version("curation")
    except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
        return "0+unknown"
