"""Keep what the C library's allocator is given back, on Linux, instead of returning it to the kernel each time.

A forward pass frees and asks for the same tens of megabytes layer by layer. glibc maps and unmaps such blocks, and the
kernel clears every page anew: with EfficientNet-Lite0 at batch 16 7,200 page faults an image, and half of the time
(docs/embed.md). The price: a process keeps the memory of its largest batch.
"""

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@cache
def keep_freed_memory() -> bool:
    """Tell the allocator, once a process; return whether it listens (glibc does, others may not)."""
    if sys.platform != "linux":
        return False
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(tell(_MMAP_THRESHOLD, 1 << 30) and tell(_TRIM_THRESHOLD, 2**31 - 1) and tell(_TOP_PAD, 1 << 26))
