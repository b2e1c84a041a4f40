"""Curate self-supervised image datasets from crawled pages, and train DINOv2 on them."""

from importlib import metadata

try:
    __version__ = metadata.version("curation")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "0+unknown"
