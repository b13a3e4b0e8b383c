"""The keys of a chat that are about tools: what the model may call, must call, and has called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from mpillm.engine.request import Request
from mpillm.errors import RequestError
from mpillm.spec import Word, plain_words
from mpillm.text.chat_formats.base import Call, Tool


class Function(msgspec.Struct, frozen=True):
    """OpenAI's function of a tool."""

    name: Word
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True):
    """OpenAI's tool."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """The function that `tool_choice` names."""

    name: Word


class NamedChoice(msgspec.Struct, frozen=True):
    """OpenAI's `tool_choice` of one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


ToolMode = Literal["none", "auto", "required"]
ToolChoice = ToolMode | NamedChoice


def read_tools(given: Sequence[Any] | None) -> list[Tool]:
    """Return the tools of a body; RequestError says which is wrong."""
    tools: dict[str, Tool] = {}  # by name
    for index, item in enumerate(given or ()):
        try:
            found = msgspec.convert(item, FunctionTool).function
        except msgspec.ValidationError as error:
            text, _, place = str(error).partition(" - at `$")
            raise RequestError(f"tools[{index}]{place.rstrip('`')}: {plain_words(text)}") from None
        if found.name in tools:
            raise RequestError(f"tools[{index}]: there is another tool {found.name[:100]!r}")
        schema = {"type": "object", "properties": {}} if found.parameters is None else found.parameters
        tools[found.name] = Tool(found.name, schema, bool(found.strict))
    return list(tools.values())


def choose(tools: Sequence[Tool], asked: ToolChoice | None) -> tuple[Sequence[Tool], ToolMode]:
    """Return the tools that may be called, and whether one must be; RequestError if there is none to choose."""
    if isinstance(asked, NamedChoice):
        name = asked.function.name
        chosen = [tool for tool in tools if tool.name == name]
        if not chosen:
            raise RequestError(f"tool_choice names {name[:100]!r}, which is not among the tools")
        return chosen, "required"
    if asked == "required" and not tools:
        raise RequestError("tool_choice is 'required' and there are no tools")
    return tools, asked or "auto"


def calls_shown(calls: Sequence[Call], request: Request, id_length: int) -> list[dict[str, Any]]:
    """Return the calls of a request's answer as a message has them, with ids that follow from the request."""
    name = f"{request.choice}\0{request.id}\0".encode() + np.array(request.prompt, "<i4").tobytes()
    shown = []
    for index, call in enumerate(calls):
        digest = hashlib.blake2b(name + bytes([index % 256]), digest_size=12).hexdigest()
        id = call.id or (f"call_{digest}" if id_length > 9 else digest[:id_length])
        function = {"name": call.name, "arguments": call.arguments}
        shown.append({"id": id, "type": "function", "function": function})
    return shown


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with their arguments as objects."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise RequestError(f"{where}.function.arguments is not JSON") from None
    if not isinstance(arguments, dict | None):
        raise RequestError(f"{where}.function.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments or {}}}
