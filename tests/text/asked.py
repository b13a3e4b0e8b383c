"""What tests ask of a tokenizer, and the package does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpillm.text.tokenizer import Tokenizer


def render_chat(tokenizer: Tokenizer, messages: list[Any], options: Mapping[str, Any] | None = None) -> str:
    """The text that the chat template makes of messages."""
    rendered: str = tokenizer._chats.chosen(options).render(messages, options)
    return rendered


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(id) for id in ids if tokenizer.is_control(id)]
