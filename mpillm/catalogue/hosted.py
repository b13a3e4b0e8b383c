"""The catalogue's models that come from Hugging Face repositories, and what all of them take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

RANKS = (1, 2, 4, 8)
# Bytes of a weight: as published, and with `quantize = "q4_0"` (18 bytes for 32 values).
BF16, Q4_0 = 2.0, 18 / 32


@dataclass(frozen=True)
class Hosted:
    """A model in a repository of safetensors files in BF16, with its number of weights in millions."""

    repository: str
    weights: int
    licence: str


HOSTED: Mapping[str, Hosted] = {
    "qwen3-0.6b": Hosted("Qwen/Qwen3-0.6B", 752, "Apache-2.0"),
    "smollm2-1.7b": Hosted("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1711, "Apache-2.0"),
    "smollm3-3b": Hosted("HuggingFaceTB/SmolLM3-3B", 3075, "Apache-2.0"),
    "qwen3-4b": Hosted("Qwen/Qwen3-4B-Instruct-2507", 4022, "Apache-2.0"),
    "mistral-7b": Hosted("mistralai/Mistral-7B-Instruct-v0.3", 7248, "Apache-2.0"),
    "olmo2-7b": Hosted("allenai/OLMo-2-1124-7B-Instruct", 7299, "Apache-2.0"),
    "granite-8b": Hosted("ibm-granite/granite-3.3-8b-instruct", 8171, "Apache-2.0"),
    "phi-4": Hosted("microsoft/phi-4", 14660, "MIT"),
    "qwen3-30b-a3b": Hosted("Qwen/Qwen3-30B-A3B-Instruct-2507", 30532, "Apache-2.0"),
}


def table(own: Iterator[tuple[str, int, str]]) -> Iterator[str]:
    """Yield the lines of `mpillm models`; `own` has name, bytes and licence of the models of the package index.

    Memory is that of all weights, shared out evenly: the KV cache comes on top; with a smaller `memory.weights` they
    are paged. `plan` has the exact numbers.
    """
    yield f"{'name':<16}{'licence':<12}{'size':>9}   GB a rank, on {' / '.join(map(str, RANKS))} ranks"
    for name, nbytes, licence in own:
        yield f"{name:<16}{licence:<12}{_size(nbytes)}   {_shared(nbytes)}"
    for name, model in HOSTED.items():
        published, quantised = (int(model.weights * 1e6 * each) for each in (BF16, Q4_0))
        yield f"{name:<16}{model.licence:<12}{_size(published)}   {_shared(published)}"
        yield f"{'with q4_0':>28}{_size(quantised)}   {_shared(quantised)}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:>6.1f} GB"


def _shared(nbytes: int) -> str:
    digits = 1 if nbytes > 1e9 else 2
    return " / ".join(f"{nbytes / ranks / 1e9:.{digits}f}" for ranks in RANKS)
