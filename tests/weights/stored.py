"""Copies of small models, one in each form in which models are stored, with all files that may lie beside them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.numpy import load_file

from tests.conftest import run_bounded
from tests.job_helpers import CHAT
from tests.model.golden import FIXTURES
from tests.text.test_ranks import tekken as write_tekken
from tests.weights.build import Tiny, write_gguf, write_hf
from tests.weights.dllama_files import convert, tokens_of, write_tokenizer


def directory(folder: Path) -> Path:
    """A model of Hugging Face with all that may lie beside it."""
    shutil.copytree(CHAT, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")
    return folder


def tekken(folder: Path) -> Path:
    shutil.copytree(CHAT, folder)
    (folder / "tokenizer.json").unlink()
    return write_tekken(folder)


def packed(folder: Path) -> Path:
    words = [sys.executable, "-m", "mpillm", "pack", directory(folder.with_name("source")), folder]
    run_bounded([*words, "--weights", "q8_0"])
    return folder


def dllama(folder: Path) -> Path:
    folder.mkdir()
    convert(CHAT, folder / "a.m")
    tokens, bos, end = tokens_of(CHAT)
    write_tokenizer(folder / "a.t", tokens, bos, [end])
    return folder / "a.m"


def sharded(folder: Path) -> Path:
    """The chat model's weights in three files."""
    shutil.copytree(CHAT, folder)
    tensors = load_file(CHAT / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return write_hf(folder, tensors, json.loads((CHAT / "config.json").read_text()), shards=3)


def split(folder: Path) -> Path:
    folder.mkdir()
    write_gguf(folder / "m.gguf", Tiny(hidden=32, n_layers=2, intermediate=64), split=2)
    return min(folder.iterdir())


MODELS: dict[str, Callable[[Path], Path]] = {
    "directory": directory,
    "pooled": lambda folder: shutil.copytree(FIXTURES / "pooled" / "embedding_gemma", folder),
    "tekken": tekken,
    "packed": packed,
    "sharded": sharded,
    "split": split,
    "dllama": dllama,
}
