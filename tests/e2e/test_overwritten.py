"""A file of the model that is changed in place while a run uses it: the run ends and names it, whatever file it is.

What was computed with the changed file is not in the journal.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mpillm import spec
from mpillm.planning import plan
from mpillm.store.output import JOURNAL
from mpillm.store.records import Result, good_records, tag_of
from tests.conftest import clean_environment, run_bounded
from tests.e2e.jobs import command, write_lines
from tests.model.golden import FIXTURES
from tests.weights.stored import MODELS

PROGRAM = Path(__file__).with_name("overwriting.py")
PAGED = "memory.weights={minimum}"
WAYS = {
    "overwritten": ("memory.loader=mmap",),
    "a stretch of it": ("memory.loader=read", PAGED),
    "shortened": ("memory.loader=mmap", PAGED),
}
# One file is changed in every way; of the others each format is paged from, or mapped.
FILES = {
    "one file": ("directory", "model.safetensors", tuple(WAYS)),
    "one of several": ("sharded", "model-00002-of-*", ("a stretch of it",)),
    "GGUF": ("split", "*-00002-of-*", ("shortened",)),
    "packed": ("packed", "layer-00001.*", ("a stretch of it", "shortened")),
    "Distributed-Llama": ("dllama", "a.m", ("shortened",)),
    "its tokens": ("dllama", "a.t", ("overwritten",)),
    "configuration": ("directory", "config.json", ("overwritten",)),
    "tokenizer": ("directory", "tokenizer.json", ("shortened",)),
    "template": ("directory", "chat_template.jinja", ("a stretch of it",)),
    "adapter": ("directory", "adapter/adapter_model.safetensors", ("overwritten",)),
}


def lines(tuned: bool) -> list[dict[str, object]]:
    body = {"max_tokens": 5, "ignore_eos": True, **({"model": "tuned"} if tuned else {})}
    return [{"prompt": [5 + n, 6, 7], **body} for n in range(12)]


def start(*words: str | Path) -> subprocess.CompletedProcess[str]:
    env = clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return run_bounded([sys.executable, *words], env=env)


def answers(output: Path) -> dict[str, bytes]:
    """What the journal has of each answer."""
    with (output / JOURNAL).open("rb") as journal:
        records = [payload for _, payload in good_records(journal.fileno()) if tag_of(payload) == "result"]
    results = [msgspec.msgpack.decode(payload, type=Result) for payload in records]
    return {result.custom_id: result.line for result in results}


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_named_and_its_answers_are_dropped(name: str, tmp_path: Path) -> None:
    kind, pattern, ways = FILES[name]
    model = MODELS[kind](tmp_path / "model")
    folder = tmp_path / "model"
    adapter = (
        shutil.copytree(FIXTURES / "adapters" / "chat_all", folder / "adapter") if name == "adapter" else None
    )
    source = write_lines(tmp_path / "in.jsonl", lines(tuned=adapter is not None))
    settings = [
        "batch.max_num_seqs=2",
        "layout.threads=1",
        *([f"adapters.tuned={adapter}"] if adapter else ()),
    ]
    undisturbed = start(*command(source, tmp_path / "undisturbed", *settings, model=model))
    assert undisturbed.returncode == 0, undisturbed.stderr
    sound = answers(tmp_path / "undisturbed")
    job = spec.load(None, settings, model=str(model), input=str(source), output=str(tmp_path / "out"))
    minimum = plan.make(job, 1).ranks[0].weights_minimum
    file = max(folder.glob(pattern), key=lambda path: path.stat().st_size)
    content, times = file.read_bytes(), file.stat()
    for number, way in enumerate(ways):
        output = tmp_path / str(number)
        more = [one.format(minimum=minimum) for one in WAYS[way]]
        done = start(PROGRAM, file, way, *command(source, output, *settings, *more, model=model)[2:])
        assert done.returncode == 2, (way, done.stderr)
        assert "Traceback" not in done.stderr
        assert str(file) in done.stderr, way
        kept = answers(output)
        assert kept.items() <= sound.items(), way
        assert not (output / "results.jsonl").exists()
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
