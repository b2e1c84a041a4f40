"""Numba compilation that also works where nothing can be written.

``numba.njit(cache=True)`` spares every process a second or so of compiling, but fails at import when neither the
package's folder, ``NUMBA_CACHE_DIR`` nor the user's cache folder is writable (read-only images, users without a home).
"""

import threading
from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile ``function`` with Numba, cached on disk where a folder can be written.

    The interpreter lock is released while it runs. Floating-point sums may be reordered (``reassoc``, ``contract``):
    every kernel of this package sums values whose float64 sums are exact in any order, see ``vectors``.

    Numba's cache notices a change of a kernel's own file, not of a kernel that it calls in another one: after editing
    such a kernel in place, remove ``__pycache__``. (An installation replaces all files.)

    Nothing is compiled, and Numba is not imported (0.4 s), before a kernel is called for the first time.
    """
    return cast(F, _Kernel(cast(FunctionType, function), _njit))


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a Numba intrinsic of ``function``, for kernels to call; like ``compiled``, when one of them is called."""
    return _Kernel(cast(FunctionType, function), _intrinsic)


class _Kernel:
    """A kernel that is compiled when it is first called, with the kernels that it calls."""

    def __init__(self, function: FunctionType, make: Callable[[FunctionType], Callable[..., Any]]) -> None:
        self._function = function
        self._make = make
        self._compiled: Callable[..., Any] | None = None
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self.compile())(*arguments)

    def compile(self) -> Callable[..., Any]:
        """Return the compiled function."""
        with _compiling:
            if self._compiled is None:
                names = self._function.__globals__
                for name in self._function.__code__.co_names:  # Numba looks there, and knows its own kind only
                    if isinstance(names.get(name), _Kernel):
                        names[name] = names[name].compile()
                self._compiled = self._make(self._function)
            return self._compiled


_compiling = threading.RLock()


def _njit(function: FunctionType) -> Callable[..., Any]:
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        result: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no writable place: compile in each process instead
        result = numba.njit(**options)(function)
    return result


def _intrinsic(function: FunctionType) -> Callable[..., Any]:
    from numba.extending import intrinsic as make

    made: Callable[..., Any] = make(function)
    return made
