"""The chat templates of a model, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from mpillm.errors import RequestError
from mpillm.text.confined import ConfinedTemplate
from mpillm.text.parts import TokenizerParts


class ChatTemplates:
    """The templates of a tokenizer by their names; a process is started for one when it is first used."""

    def __init__(self, parts: TokenizerParts, now: Callable[[], datetime]) -> None:
        """`now` tells a template the time."""
        self._parts, self._now = parts, now
        self._started: dict[str, ConfinedTemplate] = {}

    def read(self, name: str) -> bool:
        """Return whether any template reads a variable of this name, as far as its text says."""
        return any(name in template for template in self._parts.templates.values())

    def chosen(self, options: Mapping[str, Any] | None) -> ConfinedTemplate:
        """Return the template for a chat with these options; RequestError if the model has none."""
        templates = self._parts.templates
        name = "tool_use" if options and options.get("tools") and "tool_use" in templates else "default"
        if name not in templates:
            raise RequestError("The model has no chat template; use a prompt with /v1/completions.")
        if name not in self._started:
            variables = dict(self._parts.named)
            self._started[name] = ConfinedTemplate(templates[name], self._parts.control, variables, self._now)
        return self._started[name]
