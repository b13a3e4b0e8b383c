"""Read what an input asks of a model: its lines, and the texts that the model's files add to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from mpillm.model.config import ModelConfig
from mpillm.model.embedding import answer_words, has_answer_ids
from mpillm.planning.input_memory import input_needs
from mpillm.planning.input_needs import InputNeeds
from mpillm.planning.token_count import Around
from mpillm.spec import Spec
from mpillm.text import Tokenizer, load_tokenizer
from mpillm.text.from_dllama import template_in
from mpillm.weights.source import Source
from mpillm.weights.text_files import PROMPTS, text_fields, text_files, text_folder


def needs_of(
    spec: Spec, config: ModelConfig, source: Source, load: Callable[[], Tokenizer | None] | None = None
) -> InputNeeds:
    """Return the requirements of the input. `load` returns the model's tokenizer; without it, it is loaded here."""
    return input_needs(
        spec,
        config.hidden,
        around(spec, config, source),
        load or (lambda: load_tokenizer(source.tokenizer, config.vocab)),
        config.whole_prompts,
    )


def around(spec: Spec, config: ModelConfig, source: Source) -> Around:
    """Return the bytes of a model's chat template and of its longest prompt for embeddings.

    The template counts 0 if there is none or if there are several. A model without a classifier reads the two texts of
    a pair separately (see `run.opened`).
    """
    folder, fields = text_folder(source.tokenizer), text_fields(source.tokenizer)
    template, prompts = None, dict[str, str]()
    if fields is not None:
        template = fields.get("tokenizer.chat_template")
    elif folder is not None:
        template = _read(folder / "tokenizer_config.json").get("chat_template")
        if template is None:
            template = _read(folder / "chat_template.json").get("chat_template")
        with suppress(OSError, UnicodeDecodeError):
            template = (folder / "chat_template.jinja").read_text("utf-8")
        found = _read(folder / PROMPTS).get("prompts")
        prompts = found if isinstance(found, dict) else {}
    else:
        for path in text_files(source.tokenizer):
            template = template_in(path)
    return Around(
        len(template) if isinstance(template, str) else 0,
        max((len(str(p)) for p in prompts.values()), default=0),
        not _reads_pairs(spec, config, source),
    )


def _reads_pairs(spec: Spec, config: ModelConfig, source: Source) -> bool:
    """Return whether a model may read a query and a document together."""
    if config.classifier is not None or not config.generates:
        return config.classifier is not None
    ids = has_answer_ids(source)
    return ids or bool(answer_words(source, config.pair_template, spec.scoring.tokens, ids))


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if it cannot be read. Loading the model reports such an error."""
    with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    return {}
