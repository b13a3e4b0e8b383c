"""The chat formats by their names, and which one a model has, by its chat template and its tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mpillm.errors import RequestError
from mpillm.text.chat_formats.bare import BareObjects, Pythonic
from mpillm.text.chat_formats.base import CallFormat
from mpillm.text.chat_formats.escaped import Escaped
from mpillm.text.chat_formats.in_json import COHERE_KEYS, COMMAND_R_KEYS, NamedCalls, Objects
from mpillm.text.chat_formats.in_tags import Tags
from mpillm.text.chat_formats.tagged import ChatFormat, Tagged
from mpillm.text.harmony import MARKS, Harmony

# Around reasoning. A model has those whose second one its template knows.
TAGS = (
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<think>", "</think>"),
    ("<|channel>thought\n", "<channel|>"),
    ("Here is my thought process:", "Here is my response:"),
)

# Around what is said behind the reasoning (Hunyuan; ERNIE, Granite), in models whose template knows the second one.
FRAMES = (("<answer>", "</answer>"), ("<response>", "</response>"))

_SECTION = ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>")
_CALL = ("<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>")
_SEP = "<\uff5ctool\u2581sep\uff5c>"
_KIMI = "<|tool_call_begin|>", "<|tool_call_end|>"
_KIMI_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"

# DeepSeek's own markup of V3.2 and V4, in which the frame's name differs.
_DSML: dict[str, Any] = {
    "between": "\n",
    "named": '">',
    "key": '<\uff5cDSML\uff5cparameter name="',
    "value": '" string="',
    "as_text": 'true">',
    "as_json": 'false">',
    "stop": "</\uff5cDSML\uff5cparameter>",
}


def _dsml(frame: str) -> tuple[str, str, tuple[str, str]]:
    """Return the marks around a call and around all calls."""
    around = f"<\uff5cDSML\uff5c{frame}>\n", f"\n</\uff5cDSML\uff5c{frame}>"
    return '<\uff5cDSML\uff5cinvoke name="', "</\uff5cDSML\uff5cinvoke>", around


CALLS: dict[str, CallFormat] = {
    "hermes": Objects("<tool_call>", "</tool_call>", between="\n"),
    "qwen3_coder": Tags(
        "<function=", "</function>", ("<tool_call>\n", "\n</tool_call>"), each=True, between="\n", lines=True
    ),
    "seed_oss": Tags(
        "<function=", "</function>", ("<seed:tool_call>\n", "\n</seed:tool_call>"), each=True, between="\n"
    ),
    "glm": Tags(
        "<tool_call>",
        "</tool_call>",
        between="\n",
        named="",
        key="<arg_key>",
        value="</arg_key>\n<arg_value>",
        stop="</arg_value>",
    ),
    "minimax": Tags(
        '<invoke name="',
        "</invoke>",
        ("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        between="\n",
        named='">',
        key='<parameter name="',
        value='">',
    ),
    "deepseek_v32": Tags(*_dsml("function_calls"), **_DSML),
    "deepseek_v4": Tags(*_dsml("tool_calls"), **_DSML),
    "deepseek_v3": NamedCalls(
        *_CALL, _SECTION, between="\n", head=f"function{_SEP}{{name}}\n```json\n", tail="\n```"
    ),
    "deepseek_v31": NamedCalls(*_CALL, _SECTION, head=f"{{name}}{_SEP}"),
    "kimi": NamedCalls(
        *_KIMI, _KIMI_SECTION, head="functions.{name}:{n}<|tool_call_argument_begin|>", ids=True
    ),
    "mistral": Objects("[TOOL_CALLS]", "", id_length=9, listed=True, space=""),
    "mistral_args": NamedCalls("[TOOL_CALLS]", "", id_length=9, head="{name}[ARGS]", own_id="[CALL_ID]"),
    "granite": Objects("<|tool_call|>", "", listed=True, space=""),
    "phi4_mini": Objects("<|tool_call|>", "<|/tool_call|>", listed=True, space=""),
    "command_r": Objects(
        "Action:", "```", listed=True, keys=COMMAND_R_KEYS, fence="```json", no_call="directly_answer"
    ),
    "functiongemma": Escaped("<start_function_call>", "<end_function_call>", quote="<escape>"),
    "gemma4": Escaped("<|tool_call>", "<tool_call|>", quote='<|"|>'),
    "cohere": Objects("<|START_ACTION|>", "<|END_ACTION|>", listed=True, keys=COHERE_KEYS),
    "tool_calls": Objects("<tool_calls>", "</tool_calls>", listed=True, space=""),
    "nemotron": Objects("<TOOLCALL>", "</TOOLCALL>", listed=True, space=""),
    "llama3_json": BareObjects(),
    "pythonic": Pythonic(),
    "lfm2": Pythonic(marks=("<|tool_call_start|>", "<|tool_call_end|>"), marked=True),
    "olmo3": Pythonic(marks=("<function_calls>", "</function_calls>"), marked=True, lines=True),
}

# What a template (or the vocabulary) must have, by format; the first one that fits is the model's.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("seed_oss", ("<seed:tool_call>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("glm", ("<arg_key>",)),
    ("deepseek_v32", ("\uff5cDSML\uff5c", "function_calls")),
    ("deepseek_v4", ("\uff5cDSML\uff5c",)),
    ("functiongemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>",)),
    ("kimi", (_KIMI[0],)),
    ("deepseek_v3", (_CALL[0], "```json")),
    ("deepseek_v31", (_CALL[0],)),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("phi4_mini", ("<|/tool_call|>",)),
    ("granite", ("<|tool_call|>",)),
    ("cohere", ("<|START_ACTION|>",)),
    ("command_r", ("Write 'Action:'",)),
    ("tool_calls", ("<tool_calls>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("olmo3", ("<function_calls>",)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("hermes", ("<tool_call>",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("pythonic", ("<|python_start|>",)),
    ("llama3_json", ("<|start_header_id|>ipython",)),
    ("llama3_json", ("<|python_tag|>", '"parameters": ')),
)


def format_of(
    templates: Collection[str], tokens: Collection[str], reasoning: Sequence[str] | str, tool_calls: str
) -> ChatFormat:
    """Return the format of a model with these chat templates and added tokens.

    `reasoning` is "auto", "none", or the two tags around it, and `tool_calls` "auto", "none", or a name of `CALLS`.
    """
    if set(MARKS) <= set(tokens) and "none" not in (reasoning, tool_calls):
        return Harmony()
    text = "\n".join(templates)
    tags: tuple[str, str] | None = None
    if reasoning == "auto":
        tags = next((pair for pair in TAGS if pair[1] in text), None)
    elif not isinstance(reasoning, str):
        tags = (reasoning[0], reasoning[1])
    name = tool_calls
    if name == "auto":
        name = next(
            (
                name
                for name, signs in _SIGNS
                if all(sign in text or sign in tokens for sign in signs) and "tools" in text
            ),
            "none",
        )
    if name != "none" and name not in CALLS:
        raise RequestError(f"there is no format of tool calls {name!r}; there are {', '.join(CALLS)}")
    frame = next((pair for pair in FRAMES if tags is not None and pair[1] in text), None)
    return Tagged(tags, CALLS.get(name), frame)
