"""The house is as docs/architecture.md draws it: the files it names exist, each room has a row, nothing is circular.

That a room imports only lower ones is checked by import-linter.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mpillm"
PAGE = (ROOT / "docs/architecture.md").read_text()


def named() -> list[str]:
    """The paths in code marks: with a slash, and each of their directories is a name."""
    return sorted(
        {name for name in re.findall(r"`([\w.*/]+)`", PAGE) if "/" in name and not name.startswith("/")}
    )


def found(name: str) -> bool:
    """Whether a path is there, from the root of the repository or of the package."""
    return any(list(root.glob(name + end)) for root in (ROOT, PACKAGE) for end in ("", ".py"))


def test_what_the_page_names_is_there() -> None:
    assert [name for name in named() if not found(name)] == []
    assert len(named()) > 20
    assert not found("engine/nothing")


def test_each_room_has_a_row_and_says_what_is_in_it() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    capacities = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rows - {"errors"} == capacities
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py" or path.parent.parent == PACKAGE:
            assert ast.get_docstring(ast.parse(path.read_text())), path


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, also in functions and for typing alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def test_no_module_imports_itself_by_way_of_others_not_even_for_typing() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    imported = {name: set(imports(path, modules)) - {name} for name, path in modules.items()}
    while leaves := [name for name, others in imported.items() if not others & imported.keys()]:
        for name in leaves:
            del imported[name]
    assert not imported


def test_no_run_begins_with_libraries_that_it_may_never_need() -> None:
    """What is loaded before the first token is waited for on every host."""
    program = (
        "import mpi4py, sys; mpi4py.rc.initialize = False; from mpillm.run import runner; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"numpy", "msgspec"} <= set(done.stdout.split())
    assert {"gguf", "h5py", "jinja2", "yaml", "torch", "pyarrow"} & set(done.stdout.split()) == set()


def test_what_the_kernels_ask_the_preprocessor_for_is_defined_somewhere() -> None:
    """A shape of the layer that no path defines is no error of C: its code would be left out in silence."""
    text = "\n".join(path.read_text() for path in (ROOT / "cython/core").glob("*.[ch]"))
    asked = re.findall(r"^ *# *(?:el)?if.*", text, re.MULTILINE)
    names = {name for line in asked for name in re.findall(r"\b(?:VEC|MK)_\w+", line)}
    assert "VEC_QUERIES" in names
    assert {name for name in names if not re.search(rf"# *define {name}\b", text)} == set()
