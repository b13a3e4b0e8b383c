"""Writes declarations.pxi: what core/kernels.h declares, in Cython's words. setup.py runs it before Cython.

It reads what that header has: prototypes and inline functions, enums, structs of scalars, tables
`#define NAME(X) X(row, ...) X(row, ...)` and the macros of one `name` that enums apply to them.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

CORE = Path(__file__).parent / "core"
WIDTH = 120
PLAIN = re.compile(r"typedef struct \{([^}\[]*)\} (mk_\w+);")  # structs without arrays
OPAQUE = ("mk_step", "mk_product", "mk_work")  # structs that core/path.h defines


def declarations(header: str) -> str:
    """The extern block for a header's text."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL).replace("\\\n", " ")
    tables = {
        name: re.findall(r"\bX\((\w+)", rows) for name, rows in re.findall(r"#define (\w+)\(X\)(.*)", text)
    }
    macros = dict(re.findall(r"#define (\w+)\(name\b[^)]*\) (.*)", text))

    def expanded(use: re.Match[str]) -> str:
        """A table with a macro applied to its rows."""
        return " ".join(macros[use[2]].replace("##name", row).replace("name", row) for row in tables[use[1]])

    lines = ['cdef extern from "core/path.h" nogil:']
    for body in re.findall(r"enum \{(.*?)\}", text, re.DOTALL):
        names = re.findall(r"(\w+)\s*(?:=[^,]*)?(?:,|$)", re.sub(r"(\w+)\((\w+)\)", expanded, body).strip())
        lines += ["    enum:", *(f"        {name}" for name in names)]
    for name in OPAQUE:
        lines += [f"    ctypedef struct {name}:", "        pass"]
    for fields, name in PLAIN.findall(text):
        lines += [f"    ctypedef struct {name}:"]
        lines += [f"        {' '.join(one.split())}" for one in fields.split(";") if one.strip()]
    lines += [f"    int {name}(int type)" for name in re.findall(r"^MK_TRAIT\((\w+),", text, re.MULTILINE)]
    for function in re.findall(
        r"^(?:static inline )?((?:const )?\w+ \*?mk_\w+\([^)]*\))[;\s]", text, re.MULTILINE
    ):
        prototype = "    " + " ".join(function.split()).replace("(void)", "()")
        lines += textwrap.wrap(prototype, WIDTH, subsequent_indent=" " * (prototype.index("(") + 1))
    return "\n".join(lines) + "\n"


def write() -> None:
    """Bring declarations.pxi up to date; an unchanged one keeps its time, so that nothing is built again."""
    to = Path(__file__).with_name("declarations.pxi")
    made = declarations((CORE / "kernels.h").read_text())
    if not to.exists() or to.read_text() != made:
        to.write_text(made)
