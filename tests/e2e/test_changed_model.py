"""A model that is changed between two starts, or while a run uses it: never answers of both in one file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mpi
from tests.e2e.jobs import CHAT, assert_one_sentence, command, mixed_lines, run, write_lines
from tests.e2e.test_resume import wait_for_results

pytestmark = pytest.mark.mpiexec
SETTINGS = ["batch.max_num_seqs=2"]


def test_an_edited_template_is_refused_and_named(openmpi: Mpi, tmp_path: Path) -> None:
    model = shutil.copytree(CHAT, tmp_path / "model" / CHAT.name)
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(4))
    assert run(openmpi, 1, source, tmp_path / "out", model=model).returncode == 0
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "!" if template.exists() else "{{ messages }}")
    done = run(openmpi, 1, source, tmp_path / "out", model=model)
    assert_one_sentence(done, 2, "belongs to another job: the model's file chat_template.jinja is")


def test_weights_that_are_overwritten_end_the_run(openmpi: Mpi, tmp_path: Path) -> None:
    model = shutil.copytree(CHAT, tmp_path / "model" / CHAT.name)
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(200, seed=4, tokens=60))
    output = tmp_path / "out"
    launcher = subprocess.Popen(
        [str(word) for word in openmpi.command(2, *command(source, output, *SETTINGS, model=model))],
        env=openmpi.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    weights = next(model.glob("*.safetensors"))
    sound, before = weights.read_bytes(), weights.stat()
    try:
        wait_for_results(output / "journal", launcher, 4000)
        with weights.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
        said = launcher.communicate()[1]
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 2, said
    assert f"The model's file {weights} has changed while the run was using it." in said
    refused = run(openmpi, 2, source, output, *SETTINGS, model=model)
    assert_one_sentence(refused, 2, f"the model's file {weights.name} has changed; change it back")
    weights.write_bytes(sound)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(openmpi, 1, source, output, model=model).returncode == 0
    assert run(openmpi, 1, source, tmp_path / "undisturbed").returncode == 0
    assert (output / "results.jsonl").read_bytes() == (tmp_path / "undisturbed/results.jsonl").read_bytes()
