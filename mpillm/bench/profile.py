"""The share of a step that the kernels take: inside a `Profile`, the kernel calls of this process are timed."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from types import TracebackType
from typing import Any

from mpillm import kernels

_NO_WORK = {"activation_nbytes", "available", "kv_pools", "packed_nbytes", "path", "set_path"}


class Profile:
    """Seconds by kernel and step; only one can be entered at a time."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps: list[tuple[bool, dict[str, float]]] = []

    def __enter__(self) -> Profile:
        names = [name for name in kernels.__all__ if name not in _NO_WORK]
        self._before = {name: getattr(kernels, name) for name in names if _is_kernel(getattr(kernels, name))}
        for name, kernel in self._before.items():
            setattr(kernels, name, self._timed(name, kernel))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, kernel in self._before.items():
            setattr(kernels, name, kernel)

    def step(self, prompt: bool) -> None:
        """End a step, which computed tokens of a prompt or did not."""
        self._steps.append((prompt, dict(self._seconds)))
        self._seconds.clear()

    def typical(self, prompt: bool) -> list[tuple[str, float]]:
        """Return seconds by kernel, in descending order: of all steps with prompts, or of the median step without."""
        steps = [seconds for with_prompt, seconds in self._steps if with_prompt is prompt]
        names = {name for seconds in steps for name in seconds}
        merge = sum if prompt else median
        found = {name: float(merge([seconds.get(name, 0.0) for seconds in steps])) for name in names}
        return sorted(found.items(), key=lambda item: -item[1])

    def _timed(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        clock, seconds = time.perf_counter, self._seconds

        @functools.wraps(kernel)
        def timed(*args: Any, **named: Any) -> Any:
            start = clock()
            result = kernel(*args, **named)
            seconds[name] += clock() - start
            return result

        return timed


def _is_kernel(thing: object) -> bool:
    return callable(thing) and not isinstance(thing, type)
