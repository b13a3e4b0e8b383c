"""The Python interface: `LLM` on ranks of its own and on a program's, `Job`, `read_results`, and their page."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm import LLM, Job, read_results
from mpillm.api.answers import Embedding, Generation, Score
from mpillm.errors import Interrupted, JobError, ModelError, MpillmError, RequestError
from tests.api.test_left_behind import below
from tests.conftest import ROOT, Mpi, clean_environment
from tests.e2e.jobs import CHAT, command, mixed_lines, results, write_lines

pytestmark = pytest.mark.mpiexec
SETTINGS = {"memory": {"kv": "16MiB"}}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(CHAT, ranks=2, **SETTINGS) as made:
        yield made


def test_answers_are_those_of_a_run(llm: LLM, openmpi: Mpi, tmp_path: Path) -> None:
    lines = mixed_lines(12, seed=3)
    source = write_lines(tmp_path / "in.jsonl", [*lines, {"custom_id": "bad", "prompt": 5}])
    done = openmpi.run(1, *command(source, tmp_path / "out", "memory.kv=16MiB"))
    assert done.returncode == 1, done.stderr
    expected = {line["custom_id"]: line["response"]["body"] for line in results(tmp_path / "out")}
    for _ in range(2):  # called twice, it works twice
        answers = list(llm.stream([*lines, {"custom_id": "bad", "prompt": 5}]))
        assert sorted(answer.index for answer in answers) == list(range(13))
        bad = [answer for answer in answers if answer.error is not None]
        assert [answer.custom_id for answer in bad] == ["bad"]
        for answer in answers:
            if answer.error is None:
                assert answer.body == expected[answer.custom_id]
    kinds = {answer.index % 4: type(answer) for answer in answers if answer.error is None}
    assert kinds == {0: Generation, 1: Generation, 2: Score, 3: Embedding}

    found = read_results(tmp_path / "out")
    assert list(found.custom_ids) == [f"r{n}" for n in range(12)] + ["bad"]
    assert list(found.status) == [200] * 12 + [400]
    for answer in answers:
        choice = found.choices[answer.index]
        if isinstance(answer, Score):
            np.testing.assert_array_equal(answer.logprobs, found.prompt_logprobs[choice])
            np.testing.assert_array_equal(answer.tokens, found.prompts[found.prompt_of[choice]])
        elif isinstance(answer, Generation) and answer.error is None:
            for number, completion in enumerate(answer.completions):
                np.testing.assert_array_equal(completion.tokens, found.tokens[choice + number])
    rows = list(found.rows())
    assert rows[12]["error"] is not None
    assert rows[2]["logprob"] == pytest.approx(float(found.prompt_logprobs[found.choices[2]].sum()), rel=1e-5)
    assert len(rows[3]["embedding"]) == 24


def test_each_kind_of_call(llm: LLM) -> None:
    several = llm.generate(["the quick", [5, 6, 7], np.array([5, 6, 7])], max_tokens=3, logprobs=0, n=2)
    assert [len(answer.completions) for answer in several] == [2, 2, 2]
    assert several[1].prompt_tokens[0].tolist() == [5, 6, 7]
    assert several[1].completions[0].tokens.tolist() == several[2].completions[0].tokens.tolist()
    assert several[0].completions[0].logprobs is not None
    stored = pickle.loads(pickle.dumps(several))
    assert stored == several
    assert stored[1].completions == several[2].completions != several[0].completions
    assert llm.generate("the quick", max_tokens=3)[0].text == several[0].text
    hello = {"role": "user", "content": "hello \u4f60"}
    assert llm.chat([hello], max_tokens=2)[0].text == llm.chat([[hello], [hello]], max_tokens=2)[1].text
    score = llm.score("the quick brown")[0]
    assert len(score.logprobs) == len(score.tokens) - 1
    assert score.total == pytest.approx(float(score.logprobs.sum()))
    assert f"tokens={len(score.tokens)}, total={score.total:.6g}" in repr(score)  # at a prompt of Python's
    embedding = llm.embed("the quick")[0]
    assert "vectors of shape (1, 24)" in repr(embedding)
    vector = embedding.vector
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    relevance = llm.score("the quick", ["the quick", "a ship"])
    assert relevance.scores[0] == pytest.approx(1.0)
    assert relevance.scores[1] < relevance.scores[0]
    assert relevance.ranking == [0, 1]
    ranked = llm.rerank("the quick", ["a ship", "the quick"], top_n=1)
    assert ranked.ranking == [1]
    assert np.isnan(ranked.scores[0])
    with pytest.raises(RequestError, match="the model has no classifier"):
        llm.classify("the quick")[0].label  # noqa: B018


def test_a_wrong_request_costs_no_other(llm: LLM) -> None:
    with pytest.raises(TypeError, match="messages are for chat, and lines for stream"):
        llm.generate([{"role": "user", "content": "Hello"}])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="an LLM cannot be sent to another process; make one there"):
        pickle.dumps(llm)
    answers = llm.generate(["a", "b"], max_tokens=-1)
    with pytest.raises(RequestError, match=r"Request 2: max_tokens: expected a whole number >= 0\."):
        answers[1].text  # noqa: B018
    with pytest.raises(RequestError):
        llm.embed([[]])[0].vector  # noqa: B018
    assert llm.generate("a", max_tokens=1)[0].error is None


def test_callers_of_many_kinds(llm: LLM) -> None:
    """Several threads at once, and a class that is called with batches of columns, as Ray Data and datatrove do."""
    texts = [f"the quick {n}" for n in range(12)]
    expected = [answer.text for answer in llm.generate(texts, max_tokens=3)]

    class Answers:
        def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
            return {**batch, "answer": [one.text for one in llm.generate(batch["text"], max_tokens=3)]}

    batches = [{"text": part} for part in np.array_split(np.array(texts), 4)]
    with ThreadPoolExecutor(4) as threads:
        assert [text for one in threads.map(Answers(), batches) for text in one["answer"]] == expected
    assert [one.text for one in llm.generate([np.array([5, 6]), (7, 8)], max_tokens=2)] == [
        one.text for one in llm.generate([[5, 6], [7, 8]], max_tokens=2)
    ]
    (read_once,) = llm.stream([iter([5, 6])], max_tokens=2)  # type: ignore[list-item]
    assert read_once.body["usage"] == llm.generate([5, 6], max_tokens=2)[0].body["usage"]
    ranked = llm.rerank("the quick", np.array(["a ship", "the quick"]))  # type: ignore[arg-type]
    assert ranked.ranking == [1, 0]
    stream = llm.stream("the quick", max_tokens=3)
    first = next(stream)
    with pytest.raises(JobError, match="A stream of this LLM is still open"):
        llm.generate("a")
    assert list(stream) == []
    assert isinstance(first, Generation)
    assert first.text == llm.generate("the quick", max_tokens=3)[0].text
    # A stream that another thread reads on is that thread's, which is told so as well.
    stream = llm.stream(texts, max_tokens=3)
    next(stream)
    with ThreadPoolExecutor(1) as other:
        other.submit(next, stream).result()
        with pytest.raises(JobError, match="A stream of this LLM is still open"):
            other.submit(llm.generate, "a").result(timeout=60)
    child = os.fork()  # as multiprocessing does; what is collected there is not its to end
    if child == 0:
        with contextlib.suppress(BaseException):
            with pytest.raises(JobError, match="make an LLM in each forked process"):
                llm.generate("a")
            stream.close()  # the parent reads it
            llm.close()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(list(stream)) == len(texts) - 2
    assert llm.generate(texts[:1], max_tokens=3)[0].text == expected[0]


def test_a_stream_may_be_left(llm: LLM) -> None:
    expected = llm.generate("the quick", max_tokens=5)[0].text
    stream = llm.stream((f"the quick {n}" for n in range(40)), max_tokens=60)
    assert next(stream).error is None
    stream.close()
    assert llm.generate("the quick", max_tokens=5)[0].text == expected


def test_a_stream_of_an_llm_that_is_closed() -> None:
    llm = LLM(str(CHAT), **SETTINGS)
    stream = llm.stream([f"the quick {n}" for n in range(99)], max_tokens=60)
    with ThreadPoolExecutor(1) as other:  # a call that waits for its answers is woken
        assert next(stream).error is None
        rest = other.submit(list, stream)
        llm.close()
        with pytest.raises(Interrupted, match="was closed before all answers had been read"):
            rest.result()
    stream = llm.stream([f"the quick {n}" for n in range(99)], max_tokens=60)
    assert next(stream).error is None  # it is loaded again
    llm.close()
    stream.close()  # and nothing is raised


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(JobError, match="'3 bananas' is not a size"):
        LLM(str(CHAT), memory={"kv": "3 bananas"})
    with pytest.raises(JobError, match=r"unknown key 'sampling\.heat'"):
        LLM(str(CHAT), sampling={"heat": 1})
    with pytest.raises(JobError, match=r"'max_tokens'; did you mean sampling=\{'max_tokens': \.\.\.\}\?"):
        LLM(str(CHAT), max_tokens=4)
    with pytest.raises(JobError, match="unknown key 'rank'; did you mean 'ranks'"):
        LLM(str(CHAT), rank=2)
    with pytest.raises(JobError, match="ranks must be a whole number >= 1, not '2'"):
        LLM(str(CHAT), "2")  # type: ignore[arg-type]
    with pytest.raises(MpillmError, match="cannot be laid out on 3 ranks"):
        LLM(str(CHAT), ranks=3, layout={"shards": 1})


def test_ranks_without_a_core_of_their_own_do_not_compute() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # that of mpiexec and its ranks
    try:
        with LLM(str(CHAT), ranks=2, **SETTINGS) as llm:
            assert str(llm.layout) == "1 stage x 1 shard"
            answers = [llm.generate("the quick", max_tokens=5)[0].text for _ in range(2)]
    finally:
        os.sched_setaffinity(0, before)
    with LLM(str(CHAT), ranks=1, **SETTINGS) as llm:
        assert answers == 2 * [llm.generate("the quick", max_tokens=5)[0].text]


def test_without_an_mpi_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPI4PY_LIBMPI", "/nowhere/libmpi.so")
    with pytest.raises(JobError, match=r"^No MPI library can be loaded .*: correct MPI4PY_LIBMPI"):
        LLM(CHAT)


def test_ranks_that_die_are_started_again() -> None:
    before = below(os.getpid())
    with LLM(str(CHAT), **SETTINGS) as llm:
        expected = llm.generate("the quick", max_tokens=5)[0].text
        (mine,) = [rank for rank in below(os.getpid()) if rank not in before]
        stream = llm.stream([f"the quick {n}" for n in range(200)], max_tokens=100)
        next(stream)
        mine.kill()
        with pytest.raises(Interrupted, match=r"The ranks have ended \(exit code -9\)"):
            list(stream)
        assert llm.generate("the quick", max_tokens=5)[0].text == expected


PROGRAM = """
import sys
from mpi4py import MPI
from mpillm import LLM

comm = MPI.COMM_WORLD
settings = {"memory": {"kv": "8MiB"}}
with LLM(sys.argv[1], **settings) as llm:
    texts = [answer.text for answer in llm.generate(["the quick", "brown fox"], max_tokens=4)]
    streamed = {answer.index: answer.text for answer in llm.stream(["the quick", "brown fox"], max_tokens=4)}
half = comm.Split(comm.rank // 2)
with LLM(sys.argv[1], comm=half, **settings) as llm:
    alone = llm.generate("the quick", max_tokens=4)[0].text
assert not MPI.Is_finalized()
assert comm.allreduce(1) == 4
assert texts == [streamed[0], streamed[1]] and alone == texts[0]
sys.stdout.write(f"{texts!r}\\n")
"""


def test_on_the_ranks_of_a_program(mpi: Mpi, llm: LLM, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = mpi.run(4, program, CHAT)
    assert done.returncode == 0, done.stderr
    texts = [answer.text for answer in llm.generate(["the quick", "brown fox"], max_tokens=4)]
    assert done.stdout.splitlines() == [repr(texts)] * 4


UNLIKE = """
import sys
from mpi4py import MPI
from mpillm import LLM
from mpillm.errors import JobError

own = 2**20 + MPI.COMM_WORLD.rank, -MPI.COMM_WORLD.rank or 2**20
for kv in own:
    try:
        LLM(sys.argv[1], memory={"kv": kv})
    except JobError as error:
        sys.stdout.write(f"{error}\\n")
"""


def test_ranks_of_a_program_that_ask_for_different_things(mpi: Mpi, tmp_path: Path) -> None:
    """Such as a part of their own memory: the cache would have another size on each, and end the run later."""
    program = tmp_path / "program.py"
    program.write_text(UNLIKE)
    done = mpi.run(2, program, CHAT)
    assert done.returncode == 0, done.stderr
    unlike, wrong = sorted(set(done.stdout.splitlines()), reverse=True)
    assert done.stdout.count(unlike) == done.stdout.count(wrong) == 2
    assert re.match(r"memory\.kv is 1048577 on rank 1 \(host .*\) and 1048576 on rank 0; give LLM", unlike)
    assert re.match(r"LLM: memory\.kv: expected .*, not -1\. \(on rank 1 of 2, host ", wrong), wrong


def test_a_job(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(5))
    job = Job(model=CHAT, input=source, output=tmp_path / "out", sampling={"max_tokens": 3}, **SETTINGS)
    assert job.spec.sampling.max_tokens == 3
    found = job.run()
    assert repr(found) == f"<Results {tmp_path / 'out'}: 5 requests>"
    assert re.fullmatch(r"<Ragged: \d+ rows, \d+ values \(int32\)>", repr(found.tokens))
    with pytest.raises(ValueError, match="frames of pandas or polars, not of 'numpy'"):
        found.frame("numpy")  # type: ignore[arg-type]
    with pytest.raises(JobError, match=r"belongs to another job: sampling\.seed"):
        Job(
            model=CHAT,
            input=source,
            output=tmp_path / "out",
            sampling={"max_tokens": 3, "seed": 4},
            **SETTINGS,
        ).run()
    with pytest.raises(JobError, match="There are no results in"):
        read_results(tmp_path)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openmpi: Mpi) -> None:
    """All code of docs/python.md in one script, with a tiny model in place of the default one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "the quick"}) + "\n")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), flags=re.M | re.S)
    assert len(blocks) == 5
    code = [block.replace('"smollm2-135m"', repr(str(CHAT))) for block in blocks]
    # A random model has no opinion on cheese.
    script = "\n".join(code[:4]).replace(
        "assert scores[0].total > scores[1].total", "assert scores[0].total < 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("request-1 ")
    (tmp_path / "program.py").write_text(code[4])
    done = openmpi.run(2, tmp_path / "program.py")
    assert done.returncode == 0, done.stderr
