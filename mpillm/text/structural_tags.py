"""Structural tags: any text, in which the parts that begin with a trigger are JSON between two tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpillm.errors import RequestError
from mpillm.text.chat_formats.lark import Lark
from mpillm.text.constrain import MAX_CHOICES, json_grammar


class Structure(NamedTuple):
    """`begin`, JSON that `schema` accepts, and `end`."""

    begin: str
    schema: Any
    end: str


def tags_grammar(
    structures: Sequence[Structure], triggers: Sequence[str], control: Mapping[str, int], **options: Any
) -> str:
    """Text in which one of the structures follows wherever one of the triggers comes; a structure begins with it.

    `control` are the control tokens with their ids. The `options` are those of `json_grammar`. RequestError if a
    structure begins with no trigger, or a trigger begins no structure.
    """
    if len(structures) > MAX_CHOICES:
        raise RequestError(f"there are {len(structures)} structures, and {MAX_CHOICES} are the maximum")
    lark = Lark(control)
    of_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    for index, structure in enumerate(structures):
        trigger = max(filter(structure.begin.startswith, triggers), key=len, default=None)
        if trigger is None:
            raise RequestError(f"structures[{index}] begins with none of the triggers")
        (grammar,) = json.loads(json_grammar(structure.schema, **options))["grammars"]
        inline = f"%json {json.dumps(grammar['json_schema'])}"
        begin, end = (lark.literal(text) for text in (structure.begin[len(trigger) :], structure.end))
        of_trigger[trigger].append(f"{begin} {inline} {end}")
    unused = next((trigger for trigger, parts in of_trigger.items() if not parts), None)
    if unused is not None:
        raise RequestError(f"the trigger {unused[:60]!r} begins no structure")
    parts = [
        lark.rule(f"{lark.until(trigger)} ({' | '.join(map(lark.rule, of_trigger[trigger]))})")
        for trigger in of_trigger
    ]
    return lark.whole(f"({' | '.join(parts)})* ANY")
