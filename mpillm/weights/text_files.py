"""The files of a model's directory, beside its weights, that decide its answers."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"  # the most tokens of a text
# How text becomes tokens, how chats become text, when an answer ends, and how embeddings are made.
NAMES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "tekken.json", "tiktoken.model", "*.tiktoken", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", MODULES, PROMPTS,
    LENGTHS,
)  # fmt: skip


# A directory with such files, a tokenizer file (.t), or a GGUF file's fields.
TokenizerSource = Path | dict[str, Any]


def text_folder(tokenizer: TokenizerSource) -> Path | None:
    """Return the directory of a tokenizer's files; None if it is in a file."""
    return tokenizer if isinstance(tokenizer, Path) and tokenizer.is_dir() else None


def text_fields(tokenizer: TokenizerSource) -> dict[str, Any] | None:
    """Return the fields `tokenizer.*` of a GGUF file that a tokenizer comes from; None if it has files of its own."""
    return tokenizer if isinstance(tokenizer, dict) else None


def text_files(tokenizer: TokenizerSource) -> list[Path]:
    """Return a tokenizer's own files: none if it comes from fields.

    Those of a directory are followed by the configurations and the weights of the modules that modules.json names.
    """
    if isinstance(tokenizer, dict):
        return []
    if tokenizer.is_file():
        return [tokenizer]
    folder = tokenizer
    found = [path for name in NAMES for path in sorted(folder.glob(name))]
    modules = (
        folder / name / file for name in modules_in(folder) for file in ("config.json", "model.safetensors")
    )
    return found + [path for path in modules if path.is_file()]


def modules_in(folder: Path) -> list[str]:
    """Return the directories of modules, below `folder`.

    None where modules.json cannot be read, which `embedding_settings` reports.
    """
    try:
        modules = json.loads((folder / MODULES).read_text("utf-8"))
        paths = [PurePosixPath(module["path"]) for module in modules if module.get("path")]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return []
    return [str(path) for path in paths if not path.is_absolute() and ".." not in path.parts]
