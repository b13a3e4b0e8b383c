"""mpillm: batches of LLM requests on CPUs, over MPI."""

from typing import TYPE_CHECKING, Any

from mpillm.version import __version__ as __version__

if TYPE_CHECKING:
    from mpillm.api.job import Job as Job
    from mpillm.api.llm import LLM as LLM
    from mpillm.api.results import read_results as read_results

__all__ = ["LLM", "Job", "read_results"]

# Loaded when they are asked for: `python -m mpillm` looks at its environment before anything large is there.
_EXPORTS = {"LLM": "mpillm.api.llm", "Job": "mpillm.api.job", "read_results": "mpillm.api.results"}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
