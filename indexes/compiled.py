"""Numba compilation that also works where nothing can be written.

``numba.njit(cache=True)`` spares every process a second or so of compiling, but fails at import when neither the
package's folder, ``NUMBA_CACHE_DIR`` nor the user's cache folder is writable (read-only images, users without a home).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile ``function`` with Numba, cached on disk where a folder can be written.

    The interpreter lock is released while it runs. Floating-point sums may be reordered (``reassoc``, ``contract``):
    every kernel of this package sums values whose float64 sums are exact in any order, see ``vectors``.

    Numba's cache notices a change of a kernel's own file, not of a kernel that it calls in another one: after editing
    such a kernel in place, remove ``__pycache__``. (An installation replaces all files.)
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        result: F = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable place: compile in each process instead
        result = numba.njit(**options)(function)
    return result
