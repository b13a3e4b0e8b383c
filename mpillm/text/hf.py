"""A tokenizer from a Hugging Face directory: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from mpillm.errors import ModelError
from mpillm.foreign import HEAD, what_it_is
from mpillm.text import from_ranks
from mpillm.text.parts import END_NAMES, TokenizerParts, looks_special, or_model_error

log = logging.getLogger(__name__)

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Keys that transformers 4 obeys.
OBEYED_KEYS = {
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "CohereTokenizer",
}
OLD_FILES = ("tokenizer.model", "vocab.json", "vocab.txt")


def read(path: Path) -> TokenizerParts | None:
    """Return the tokenizer of a directory, or of a tokenizer.json and the files beside it; None if there is none."""
    folder = path if path.is_dir() else path.parent
    file = folder / "tokenizer.json"
    ranks = None if file.exists() else from_ranks.file_in(folder)
    if ranks is None and not file.exists():
        if old := [name for name in OLD_FILES if (folder / name).exists()]:
            log.warning(
                "%s has %s but no tokenizer.json, so prompts must be token ids; transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
                *(folder, old[0]),
            )
        return None
    config = _object(folder / "tokenizer_config.json")
    parts = from_ranks.read(ranks, config) if ranks else _of_json(file)
    _added_tokens(parts, config, _object(folder / "added_tokens.json"))
    parts.named |= _named(_object(folder / "special_tokens_map.json") | config)
    _control(parts, config)
    parts.end_ids = _end_ids(parts, folder)
    parts.templates = _templates(folder, config)
    _warn_of_old_saves(parts, config)
    return parts


def _of_json(file: Path) -> TokenizerParts:
    core = or_model_error(lambda: tokenizers.Tokenizer.from_str(_text(file)), str(file))
    core.no_truncation()
    core.no_padding()
    return TokenizerParts(core, str(file))


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        if what := what_it_is(data[:HEAD]):
            raise ModelError(f"{file} {what}.")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}.") from error


def _object(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object.")
    return value


def _content(token: object) -> str | None:
    """Return the text of a token that is written as a string or as a serialised AddedToken."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added_tokens(parts: TokenizerParts, config: dict[str, Any], old: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json lists, in the order of their ids, as transformers does.

    Without such a list those of `old`, which has the ids by tokens (added_tokens.json), are added.
    """
    known = {token.content for token in parts.core.get_added_tokens_decoder().values()}
    try:
        listed = config.get("added_tokens_decoder") or {
            str(id): {"content": token} for token, id in old.items()
        }
        items = sorted((int(id), token) for id, token in listed.items())
        for id, token in items:
            if token["content"] in known:
                continue
            flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = bool(token.get("normalized", not flags["special"]))
            added = tokenizers.AddedToken(token["content"], normalized=normalized, **flags)
            parts.core.add_tokens([added])
            if parts.core.token_to_id(token["content"]) != id:
                raise ModelError(
                    f"tokenizer_config.json beside {parts.where} gives {token['content']!r} the id {id}, "
                    f"but it would be {parts.core.token_to_id(token['content'])}."
                )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"added_tokens_decoder in tokenizer_config.json, or added_tokens.json, beside {parts.where} is malformed."
        ) from error


def _named(config: dict[str, Any]) -> dict[str, str]:
    """Return tokens by the names that templates know (bos_token, ...); null means that there is none."""
    found = {name: _content(config.get(name)) for name in NAMED}
    return {name: content for name, content in found.items() if content is not None}


def _control(parts: TokenizerParts, config: dict[str, Any]) -> None:
    """Add the tokens that either file marks as special, and those whose name or text says so."""
    added = {token.content: token.special for token in parts.core.get_added_tokens_decoder().values()}
    parts.control |= {content for content, special in added.items() if special or looks_special(content)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    for content in map(_content, extra):
        if content and parts.core.token_to_id(content) is not None:
            parts.control.add(content)
    for name, content in parts.named.items():
        # A pad_token may be a word of the vocabulary, since no text is padded; it stays a word.
        known = parts.core.token_to_id(content) is not None
        if content in added or (known and name in ("bos_token", "eos_token")):
            parts.control.add(content)


def _end_ids(parts: TokenizerParts, folder: Path) -> frozenset[int]:
    """Return the ends of generation_config.json or, without it, of config.json and known names; and the eos_token."""
    ids: set[int] = set()
    generation = _object(folder / "generation_config.json")
    for source, name in (
        (generation, "generation_config.json"),
        (_object(folder / "config.json"), "config.json"),
    ):
        value = source.get("eos_token_id")
        for id in value if isinstance(value, list) else [value]:
            if id is None or id == -1:  # both say that there is none
                continue
            if type(id) is not int or id < 0:
                raise ModelError(f"eos_token_id in {folder / name} is {id!r}, which is not a token id.")
            ids.add(id)
        if ids:
            break
    names = {parts.named.get("eos_token")} | (set() if generation else END_NAMES & parts.control)
    ids |= {id for name in names if name and (id := parts.core.token_to_id(name)) is not None}
    return frozenset(ids)


def _warn_of_old_saves(parts: TokenizerParts, config: dict[str, Any]) -> None:
    """Say where add_bos_token or add_eos_token means something else than what tokenizer.json does.

    The post-processor in tokenizer.json decides, as in transformers 5, which drops both keys when it loads or saves a
    tokenizer. Of some classes transformers 4 made a post-processor from the keys, whatever tokenizer.json had.
    """
    if str(config.get("tokenizer_class")).removesuffix("Fast") not in OBEYED_KEYS:
        return
    bare, full = (list(parts.core.encode("a", add_special_tokens=add).ids) for add in (False, True))
    for key, name, at in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        id = parts.core.token_to_id(parts.named.get(name, ""))
        adds = len(full) > len(bare) and full[at] == id
        if id is not None and isinstance(config.get(key), bool) and config[key] != adds:
            log.warning(
                "tokenizer_config.json beside %s says %s = %s, but tokenizer.json adds %s %s: it decides, as in "
                "transformers 5 (transformers 4 obeyed the key); a prompt may hold the token itself",
                *(parts.where, key, str(config[key]).lower(), "a" if adds else "no", parts.named[name]),
            )


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name.

    Files take precedence over tokenizer_config.json, which has one template or several; models for images may have
    theirs in chat_template.json alone.
    """
    found: dict[str, str] = {}
    given = config.get("chat_template")
    if given is None:
        given = _object(folder / "chat_template.json").get("chat_template")
    if isinstance(given, dict):
        given = [{"name": name, "template": template} for name, template in given.items()]
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        for item in given:
            if not (isinstance(item, dict) and isinstance(item.get("template"), str)):
                raise ModelError(f"chat_template in {folder / 'tokenizer_config.json'} is malformed.")
            found[str(item.get("name"))] = item["template"]
    file = folder / "chat_template.jinja"
    if file.exists():
        found["default"] = _text(file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _text(file)
    return found
