"""The facts about a tokenizer that files of all kinds provide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import tokenizers

from mpillm.errors import ModelError

T = TypeVar("T")

# Tokens that end a generation by their name, as llama.cpp's src/llama-vocab.cpp lists them.
_ENDS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> <|eom_id|> <EOT>
    _<EOT> <|end_of_text|> <end_of_utterance> <\uff5cend\u2581of\u2581sentence\uff5c> <|fim_pad|> <fim-pad> <fim_pad>
    <|fim_repo|> <|repo_name|> <reponame> <|file_sep|>
"""
END_NAMES = frozenset(_ENDS.split())


@dataclass
class TokenizerParts:
    """A tokenizer of the `tokenizers` library, and what the files say about it besides."""

    core: tokenizers.Tokenizer
    where: str  # the file, for messages
    named: dict[str, str] = field(default_factory=dict)  # "bos_token" -> "<s>", as templates know them
    control: set[str] = field(default_factory=set)  # tokens that structure a text and are not part of it
    end_ids: frozenset[int] = frozenset()
    # None: the tokenizer's own post-processor decides. With a tokenizer.json it always does, whatever add_bos_token in
    # tokenizer_config.json says, as in transformers 5.
    add_bos: bool | None = None
    add_eos: bool | None = None
    templates: dict[str, str] = field(default_factory=dict)  # "default", "tool_use", ...


def or_model_error(make: Callable[[], T], where: str) -> T:
    """Return what `make` returns; whatever the tokenizers library raises, even a Rust panic, becomes a ModelError."""
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # a panic is a BaseException
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"The tokenizer in {where} cannot be used: {first}.") from error


def looks_special(content: str) -> bool:
    """Return whether an added token not marked as special is a control token, by the rule of llama.cpp's converter."""
    return (
        (content.startswith("<|") and content.endswith("|>"))
        or (content.startswith("<\uff5c") and content.endswith("\uff5c>"))
        or (content.startswith("<unused") and content.endswith(">"))
        or content in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
    )
