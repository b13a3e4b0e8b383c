"""`LLM` and `Job` in a notebook: called twice, interrupted, beside the command line; nothing is left of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

from tests.conftest import HANGS
from tests.e2e.jobs import CHAT, mixed_lines, write_lines

CELLS = [
    f'from mpillm import LLM, Job\nmodel = {str(CHAT)!r}\nllm = LLM(model, memory={{"kv": "16MiB"}})',
    'texts = [one.text for one in llm.generate(["the quick", "brown"], max_tokens=3)]',
    """import os, signal, threading
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    llm.generate([f"fox {n}" for n in range(5000)], max_tokens=400, ignore_eos=True)
except KeyboardInterrupt:
    print("interrupted")""",
    'assert [one.text for one in llm.generate(["the quick", "brown"], max_tokens=3)] == texts',
    """from mpillm.cli import main
words = ["run", "--model", model, "--input", "in.jsonl", "--set", "memory.kv=16MiB", "--output"]
codes = [main([*words, name]) for name in ("one", "two")]
assert codes == [0, 0] and open("one/results.jsonl").read() == open("two/results.jsonl").read()""",
    """import asyncio, psutil
with LLM(model, memory={"kv": "16MiB"}) as second:  # beside the first, and from threads of the notebook's loop
    asks = [asyncio.to_thread(one.generate, ["the quick", "brown"], max_tokens=3) for one in (second, second, llm)]
    assert all([one.text for one in answers] == texts for answers in await asyncio.gather(*asks))
llm = LLM(model, memory={"kv": "16MiB"})  # as if the first cell ran again: the ranks before end
print(*(one.pid for one in psutil.Process().children(recursive=True) if "ranks" in one.cmdline()))""",
]


@pytest.mark.mpiexec
@pytest.mark.slow
def test_a_notebook(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", mixed_lines(4))
    notebook: Any = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    client = NotebookClient(notebook, timeout=HANGS, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises what a cell raises; the kernel ends, and the notebook has not closed its LLM
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert said[2] == "interrupted\n"
    ranks = [int(pid) for pid in said[-1].split()]
    assert len(ranks) == 1
    gone, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in ranks if psutil.pid_exists(pid)], timeout=HANGS
    )
    assert not alive, gone
