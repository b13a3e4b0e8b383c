"""lm-evaluation-harness on a tiny model gives what its `hf` gives on the same float32 model (see make_expected)."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, clean_environment, run_bounded
from tests.lm_eval.make_expected import ARGS, HERE, MODEL, RUNS, TASKS, read

EXPECTED: dict[str, Any] = json.loads((HERE / "expected.json").read_text())


def evaluate(folder: Path, run: str, ranks: int, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`mpillm lm-eval` on the tiny tasks, with samples in `folder`."""
    args = ["--model_args", f"model={MODEL},memory.kv=64MiB,ranks={ranks},{ARGS[run]}"]
    handed = [*args, *TASKS, *RUNS[run], *more, "--output_path", str(folder), "--log_samples"]
    home = clean_environment(HF_HOME=str(folder / "hf"), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", **env)
    return run_bounded(
        [sys.executable, "-m", "tests.lm_eval.program", "lm-eval", *handed], env=home, cwd=ROOT
    )


def assert_expected(folder: Path, run: str) -> None:
    found = read(folder)
    assert set(found) == set(EXPECTED[run])
    for task, expected in EXPECTED[run].items():
        got = found[task]
        assert got["metrics"].keys() == expected["metrics"].keys()
        for metric, value in expected["metrics"].items():
            assert got["metrics"][metric] == pytest.approx(value, rel=1e-5), (task, metric)
        for document, (ours, theirs) in enumerate(zip(got["answers"], expected["answers"], strict=True)):
            if task == "tiny_generation":
                assert ours == theirs, document
            elif task == "tiny_rolling":
                np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=1e-5)
            else:
                assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
                logprobs = ([np.float64(logprob) for logprob, _ in answers] for answers in (ours, theirs))
                np.testing.assert_allclose(*logprobs, atol=2e-4)


@pytest.mark.mpiexec
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_evaluation_goes_on_from_its_cache_and_gives_the_numbers_of_hf(tmp_path: Path) -> None:
    cached = ["--use_cache", str(tmp_path / "cache")]
    killed = evaluate(tmp_path, "plain", 1, *cached, KILLED_AFTER="11")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = evaluate(tmp_path, "plain", 2, *cached)
    assert done.returncode == 0, done.stderr
    assert "Cached requests: 11, Requests remaining: 14" in done.stderr
    assert_expected(tmp_path, "plain")


@pytest.mark.slow
def test_chat_templates_and_examples_give_the_numbers_of_hf(tmp_path: Path) -> None:
    done = evaluate(tmp_path, "chat", 1)
    assert done.returncode == 0, done.stderr
    assert_expected(tmp_path, "chat")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_a_model_of_the_harness_takes(tmp_path: Path) -> None:
    """A name; a template without a system role, its arguments, and a token behind which the answer begins."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}{{ 'think' if enable_thinking else 'a' * times }}"
    )
    model = with_template(tmp_path / "model", template)
    words = [sys.executable, "-c", TAKEN, str(model)]
    done = run_bounded(words, 100, clean_environment(HF_HUB_OFFLINE="1"), ROOT)
    assert done.returncode == 0, done.stderr
    assert "continues without its system message" in done.stderr
    unnamed, chat, plain, said, behind = json.loads(done.stdout.splitlines()[-1])
    assert unnamed == "No model is named; type --model_args model=smollm2-135m."
    assert (chat, plain) == ("the foxthink", "the foxaaa")
    assert len(behind) < len(said)
    assert said.endswith(behind)


TAKEN = """
import json, sys
from lm_eval.api.instance import Instance
from mpillm.api.lm_eval import HarnessLM
from mpillm.errors import JobError
try:
    HarnessLM()
except JobError as error:
    unnamed = str(error)
def made(**more):
    return HarnessLM(sys.argv[1], **{"memory.kv": "64MiB"}, **more)
chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}]
asked = [Instance("generate_until", {}, ("the fox", {"until": [], "max_gen_toks": 12}), 0)]
first = made(enable_thinking=True)
said = first.generate_until(asked)[0]
tokens = first.tok_encode(said, False)
second = made(chat_template_args={"times": 3}, think_end_token=str(tokens[0]))
shown = [unnamed, first.apply_chat_template(chat)]
shown += [second.apply_chat_template(chat[1:]), said, second.generate_until(asked)[0]]
print(json.dumps(shown))
"""


def with_template(folder: Path, template: str) -> Path:
    """A copy of the model with another chat template."""
    shutil.copytree(ROOT / MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def test_lm_eval_is_not_started_by_mpiexec() -> None:
    words = [sys.executable, "-m", "mpillm", "lm-eval", "--tasks", "any"]
    done = run_bounded(words, env=clean_environment(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2"))
    assert done.returncode == 2
    assert "lm-eval starts its ranks by itself" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "none"], "lm-evaluation-harness has stopped: ValueError: Tasks not found: none"),
        (
            ["--model", "smollm2-135m", *TASKS],
            "--model names a class of the harness; type --model_args model=NAME for a model.",
        ),
    ],
)
def test_what_is_refused_is_said(words: list[str], said: str) -> None:
    words = ["--model_args", f"model={MODEL}", *words]
    done = run_bounded([sys.executable, "-m", "mpillm", "lm-eval", *words], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"mpillm: {said}"), done.stderr
    assert "Traceback" not in done.stderr
