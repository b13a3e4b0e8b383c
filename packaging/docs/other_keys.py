"""Writes the lists of keys without effect into docs/requests.md: `python packaging/docs/other_keys.py`.

The lists stand at the end of the page, below its last heading.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import msgspec

from mpillm.batch.other_keys import NEUTRAL, REFUSED, Ignored

PAGE = Path(__file__).parents[2] / "docs/requests.md"
HEADING = "\n## Other keys\n"
KINDS = {
    "string": "a string",
    "boolean": "`true` or `false`",
    "integer": "a whole number",
    "object": "an object",
}


def section() -> str:
    """The lists, as the page has them."""
    (_, schemas) = msgspec.json.schema_components([Ignored])
    ignored = [
        f"| `{key}` | {_kind(kind)} |" for key, kind in sorted(schemas["Ignored"]["properties"].items())
    ]
    neutral = [
        f"| `{key}` | {', '.join(f'`{json.dumps(value)}`' for value in values)} |"
        for key, values in sorted(NEUTRAL.items())
    ]
    refused = ", ".join(f"`{key}`" for key in sorted(REFUSED))
    return "\n".join(
        [
            "`packaging/docs/other_keys.py` writes these lists. Keys that are explained above have the meaning that",
            "they have there; elsewhere these are accepted and change no answer, if their value is of this kind or",
            "null:\n",
            "| key | value |\n|---|---|",
            *ignored,
            '\n`prediction` has a `type` (`"content"`) and a `content`. `stream_options` may have `include_usage`;',
            "`include_obfuscation` and `continuous_usage_stats` must be false. In the same way, these keys are refused",
            "unless they are null or have a value of this table (`best_of` in chats also the value of `n`):\n",
            "| key | value without effect |\n|---|---|",
            *neutral,
            *textwrap.wrap(f"Always refused, unless null: {refused}.", 120, initial_indent="\n"),
            "",
        ]
    )


def _kind(schema: dict[str, object]) -> str:
    """What of JSON a key takes."""
    options = schema.get("anyOf")
    assert isinstance(options, list)
    words = [
        ", ".join(f'`"{word}"`' for word in one["enum"])
        if "enum" in one
        else KINDS[one.get("type", "object")]
        for one in options
        if one.get("type") != "null"
    ]
    return " or ".join(words)


if __name__ == "__main__":
    above, heading, _ = PAGE.read_text().partition(HEADING)
    PAGE.write_text(f"{above}{heading}\n{section()}")
