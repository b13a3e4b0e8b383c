"""The job file: TOML to frozen structs, with every unknown key, wrong type and wrong value named by its path.

Paths: what a job file reads (`input`, `adapters`, and `model` where it is a path) is found from the job file's own
directory; what it writes (`output`) goes under the directory the command was started in. A path typed on the
command line always starts from there.
"""

from __future__ import annotations

from mpillm.spec.job import Spec, key_called, known_keys, tightest
from mpillm.spec.messages import allowed_words, plain_words
from mpillm.spec.reading import UNREAD, checked, load
from mpillm.spec.sections import (
    BatchSection,
    ChatSection,
    DraftSection,
    EmbeddingsSection,
    Fraction,
    JobSection,
    JsonSchema,
    LayoutSection,
    MemorySection,
    OutputSection,
    Penalty,
    Pooling,
    ResponseFormat,
    SamplingSection,
    Section,
    Seed,
    StopStrings,
    StructuralTags,
    StructuredOutputs,
    Subtracted,
    TableFormat,
    Temperature,
    TopK,
    TopP,
    WireSection,
    Word,
)
from mpillm.spec.sizes import byte_size, shown_bytes, unit_meant

__all__ = [
    "UNREAD",
    "BatchSection", "ChatSection", "DraftSection", "EmbeddingsSection", "Fraction", "JobSection", "JsonSchema",
    "LayoutSection", "MemorySection", "OutputSection", "Penalty", "Pooling", "ResponseFormat", "SamplingSection",
    "Section", "Seed", "Spec", "StopStrings", "StructuralTags", "StructuredOutputs", "Subtracted", "TableFormat",
    "Temperature", "TopK", "TopP", "WireSection", "Word", "allowed_words", "byte_size", "checked",
    "key_called", "known_keys", "load", "plain_words", "shown_bytes", "tightest", "unit_meant",
]  # fmt: skip
