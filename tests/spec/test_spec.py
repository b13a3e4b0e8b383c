"""Job files: the brief's example, defaults, and one sentence for everything that can be wrong."""

from __future__ import annotations

import contextlib
import random
import re
from pathlib import Path

import pytest

from mpillm import spec
from mpillm.errors import JobError
from mpillm.words import enough

BRIEF = """
model  = "smollm2-135m"
input  = "prompts.jsonl"
output = "out/quickstart"
quantize = "none"
[sampling]
max_tokens = 128
temperature = 0.0
top_p = 1.0
top_k = 0
min_p = 0.0
repetition_penalty = 1.0
seed = 0
stop = []
[layout]
stages = "auto"
shards = "auto"
threads = "auto"
[memory]
weights = "all"
kv = "1GiB"
max_context = 4096
[wire]
activations = "q8_0"
"""
LEAST = 'input = "in.jsonl"\noutput = "out/x"\n'


def load(folder: Path, text: str, *overrides: str, **more: str) -> spec.Spec:
    path = folder / "job.toml"
    path.write_text(text)
    return spec.load(path, overrides, **more)


def test_the_briefs_values_are_the_defaults(tmp_path: Path) -> None:
    said = load(tmp_path, BRIEF)
    # But for the wire between shards: answers do not depend on their number.
    wire = '[wire]\nactivations = "q8_0"\n'
    assert said == load(tmp_path, f'input = "prompts.jsonl"\noutput = "out/quickstart"\n{wire}')
    assert load(tmp_path, 'input = "prompts.jsonl"\noutput = "out/quickstart"\n').wire.activations == "auto"
    assert said.memory.weights_bytes is None
    assert said.memory.kv_bytes == 1024**3
    assert said.memory.kv_type == "auto"


def test_what_is_read_lies_beside_the_job_file_and_what_is_written_here(tmp_path: Path) -> None:
    said = load(tmp_path, LEAST)
    assert (said.input_path, said.output_path) == (tmp_path / "in.jsonl", Path("out/x"))
    assert load(tmp_path, LEAST + 'model = "models/small"\n').model == str(tmp_path / "models/small")
    assert load(tmp_path, LEAST + 'model = "small.gguf"\n').model == str(tmp_path / "small.gguf")
    assert load(tmp_path, LEAST + 'model = "/a/b"\n').model == "/a/b"
    assert load(tmp_path, LEAST + 'model = "hf:a/b"\n').model == "hf:a/b"
    table = load(tmp_path, LEAST + 'model = {pi = "m/small", nuc = "$M/m.gguf", default = "smollm2-135m"}\n')
    assert [table.model_on(host) for host in ("pi", "nuc", "pi (2)", "other")] == [
        str(tmp_path / "m/small"),
        "$M/m.gguf",
        str(tmp_path / "m/small"),
        "smollm2-135m",
    ]
    with pytest.raises(JobError, match="model has no value for the host 'nuc'"):
        load(tmp_path, LEAST + 'model = {pi = "m"}\n').model_on("nuc")
    for wrong in ("{}", '{pi = ""}', "{pi = 1}", '["m"]'):
        with pytest.raises(JobError, match="model"):
            load(tmp_path, f"{LEAST}model = {wrong}\n")
    typed = load(tmp_path, LEAST, "model=models/small", input="typed.jsonl", output="o")
    assert (typed.model, typed.input, typed.output.path) == ("models/small", "typed.jsonl", "o")


def test_a_job_without_a_file() -> None:
    said = spec.load(None, ["sampling.seed=3"], model="m", input="i", output="o")
    assert (said.model, said.sampling.seed) == ("m", 3)
    with pytest.raises(
        JobError, match=r"^The command line does not say where its output is; add .* --output PATH\.$"
    ):
        spec.load(None, input="i")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("sampling.temperature=1", "sampling.temperature", 1.0),
        ("sampling.stop=['a', 'b']", "sampling.stop", ["a", "b"]),
        ("sampling.stop=END", "sampling.stop", "END"),
        ("layout.stages=3", "layout.stages", 3),
        ("layout.shards=auto", "layout.shards", "auto"),
        ("memory.weights=2GiB", "memory.weights_bytes", 2 * 1024**3),
        ("memory.weights = 500MB", "memory.weights_bytes", 500_000_000),
        ("memory.kv=1048576", "memory.kv_bytes", 1 << 20),
        ("memory.kv=1.5KiB", "memory.kv_bytes", 1536),
        ("embeddings.normalize=false", "embeddings.normalize", False),
        ("quantize=q4_0", "quantize", "q4_0"),
        ("batch.max_num_seqs=8", "batch.max_num_seqs", 8),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: str, value: object) -> None:
    found: object = load(tmp_path, LEAST, override)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[sampling]\ntemprature = 1", "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?"),
        ("temperature = 1", "has an unknown key 'temperature'; did you mean 'sampling.temperature'?"),
        ("[samplng]\nseed = 1", "has an unknown key 'samplng'; did you mean 'sampling'?"),
        ("[wire]\ncolour = 1", "has an unknown key 'wire.colour'; there are wire.activations, wire.between_stages."),
        ("[sampling]\nseed = 'x'", ": sampling.seed: expected a whole number, not 'x'."),
        ("[sampling]\ntop_p = 0", ": sampling.top_p: expected a number > 0.0, not 0."),
        ("[sampling]\nmin_p = 1.5", ": sampling.min_p: expected a number <= 1.0, not 1.5."),
        ("[sampling]\ntemperature = nan", ": sampling.temperature: expected a number >= 0.0, not nan."),
        ("[sampling]\nmax_tokens = -1", ": sampling.max_tokens: expected a whole number >= 0, not -1."),
        ("[sampling]\nstop = ['a', 1]", ": sampling.stop[1]: expected a string, not 1."),
        ("[sampling]\nstop = ''", ": sampling.stop: expected a string of length >= 1, not ''."),
        ("sampling = 3", ": sampling: expected a table, with keys such as sampling.max_tokens, not 3."),
        ("quantize = 'q5'", ": quantize: expected one of 'none', 'q8_0', 'q4_0', 'w8a8', not 'q5'."),
        ("[layout]\nstages = 'some'", ": layout.stages: expected one of 'auto', a whole number, not 'some'."),
        ("[layout]\nshards = 0", ": layout.shards: expected a whole number >= 1, not 0."),
        ("[memory]\nweights = '2 gigs'", "weights: '2 gigs' is not a size; write bytes as 2GiB, 512MiB or 500MB."),
        ("[memory]\nkv = 'all'", ": memory.kv: 'all' is not a size; write bytes as 2GiB, 512MiB or 500MB."),
        ("[memory]\nkv = '0.1'", ": memory.kv: '0.1' is not a size; it must be at least one byte."),
        ("model = ''", ": model: expected a string of length >= 1, not ''."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_path(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(JobError) as caught:
        load(tmp_path, LEAST + text)
    message = str(caught.value)
    assert message.startswith(f"The job file {tmp_path / 'job.toml'}")
    assert message.endswith(sentence), message
    assert caught.value.exit_code == 2


def test_wrong_overrides(tmp_path: Path) -> None:
    for override, sentence in [
        ("nope", "--set 'nope' is not of the form section.key=value, such as sampling.seed=3."),
        (
            "sampling.sede=3",
            "The command line has an unknown key 'sampling.sede'; did you mean 'sampling.seed'?",
        ),
        ("sampling.seed.x=3", "expected a whole number, got a table"),
        ("model.x=3", "model.x: expected a string, not 3"),
    ]:
        with pytest.raises(JobError) as caught:
            load(tmp_path, LEAST, override)
        assert sentence in str(caught.value)
    for overrides, sentence in [  # which one it is
        (
            ["sampling.seed=3", "sampling.temperature=hot"],
            "--set sampling.temperature=hot: sampling.temperature: expected a number, not 'hot'.",
        ),
        (['layout={"stages": "x"}'], '--set layout={"stages": "x"}: layout.stages: expected one of \'auto\''),
    ]:
        with pytest.raises(JobError) as caught:
            load(tmp_path, LEAST, *overrides)
        assert str(caught.value).startswith(sentence)
    with pytest.raises(
        JobError, match=r"^The job file .*: sampling.temperature: expected a number, not 'hot'"
    ):
        load(tmp_path, LEAST + '[sampling]\ntemperature = "hot"\n', "sampling.seed=3")
    with pytest.raises(JobError, match=r"--set 'quantize.x=3': quantize is a value, not a table"):
        load(tmp_path, LEAST + 'quantize = "none"\n', "quantize.x=3")


def test_paths_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        JobError, match=r"job\.toml: model contains a zero byte, which a path cannot contain\.$"
    ):
        load(tmp_path, LEAST + 'model = "a\\u0000b"')
    (tmp_path / "job.toml").write_text('input = "~nobody-of-this-name/in.jsonl"\noutput = "out"\n')
    assert spec.load(tmp_path / "job.toml").input == str(tmp_path / "~nobody-of-this-name/in.jsonl")


def test_files_that_are_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"is not TOML: .*line 2"):
        load(tmp_path, "input = 'a'\n[sampling\n")
    (tmp_path / "latin.toml").write_bytes(b"input = '\xe9'\n")
    with pytest.raises(JobError, match=r"is not UTF-8 text \(byte 9\)"):
        spec.load(tmp_path / "latin.toml")
    with pytest.raises(JobError, match=r"^The job file .*absent\.toml does not exist; "):
        spec.load(tmp_path / "absent.toml")
    with pytest.raises(JobError, match="is a directory, not a job file"):
        spec.load(tmp_path)


NINES = "9" * 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[memory]\nkv = " + NINES,
            r"memory\.kv: expected a whole number .*, not 9{40}\.\.\. \(400 characters\)\.$",
        ),
        (
            f'[memory]\nkv = "{NINES}GiB"',
            r"memory\.kv: '9{39}\.\.\. \(405 characters\) is not a size; .* 8 EiB\.$",
        ),
        ("[memory]\nkv = " + "9" * 5000, "is not TOML: a number in it has too many digits"),
        (f"[memory]\nmax_context = {NINES}", r"memory\.max_context: expected a whole number"),
        (f"[sampling]\nmax_tokens = {NINES}", r"sampling\.max_tokens: expected a whole number"),
        ("k = " + "[" * 20_000 + "]" * 20_000, "is not TOML: it is nested too deeply"),
        ("k = " + "{a = " * 20_000 + "1" + "}" * 20_000, "is not TOML: it is nested too deeply"),
    ],
    ids=range(7),
)
def test_values_beyond_all_measure(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=words):
        load(tmp_path, LEAST + text)
    key, _, value = text.removeprefix("[memory]\n").removeprefix("[sampling]\n").partition(" = ")
    section = "memory." if "[memory]" in text else "sampling." if "[sampling]" in text else ""
    with pytest.raises(JobError):
        load(tmp_path, LEAST, f"{section}{key}={value}")


def test_an_input_that_would_be_written_over(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"The input \S+ and the output \S+ are the same; give the results"):
        spec.load(None, input=str(tmp_path / "a"), output=str(tmp_path / "b/../a"))
    with pytest.raises(JobError, match="overlap: the input lies inside"):
        spec.load(None, input=str(tmp_path / "out/results.jsonl"), output=str(tmp_path / "out"))


def test_the_fingerprint_knows_what_changes_results_and_nothing_else(tmp_path: Path) -> None:
    plain = load(tmp_path, LEAST)
    same = [
        "layout.stages=2",
        "layout.threads=1",
        "memory.weights=1GiB",
        "memory.kv=2GiB",
        "batch.max_num_seqs=3",
        "batch.prefix_sharing=false",
    ]
    same += ["memory.policy=lru", "job.checkpoint_tokens=0", "output=elsewhere"]
    other = [
        "sampling.seed=1",
        "sampling.stop=x",
        "quantize=q8_0",
        "wire.activations=f32",
        "memory.max_context=10",
    ]
    other += ["embeddings.pooling=last", "memory.kv_type=f16", "sampling.temperature=0.5"]
    assert {load(tmp_path, LEAST, override).fingerprint() for override in same} == {plain.fingerprint()}
    prints = {load(tmp_path, LEAST, override).fingerprint() for override in other}
    assert len(prints) == len(other)
    assert plain.fingerprint() not in prints


def test_sizes_are_read_back() -> None:
    draw = random.Random(1)
    for _ in range(50):
        count, unit = draw.randrange(1, 10**6), draw.choice(["KiB", "MiB", "kb", "GB"])
        factor = {"KiB": 2**10, "MiB": 2**20, "kb": 1000, "GB": 10**9}[unit]
        assert spec.byte_size(f"{count} {unit}") == count * factor
    assert [spec.shown_bytes(n) for n in (17, 1536, 3 * 2**30, 5 * 2**50)] == [
        "17 B",
        "1.5 KiB",
        "3.0 GiB",
        "5120.0 TiB",
    ]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ('output = "o"\n', ["output.format=csv"]),
        ('[output]\npath = "o"\nformat = "csv"\n', []),
        ('output.format = "csv"\n', ["output=o", "output.format=csv"]),
    ],
)
def test_an_output_may_be_a_path_or_a_table(text: str, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(f'input = "in.jsonl"\n{text}')
    said = spec.load(tmp_path / "job.toml", overrides)
    assert said.output == spec.OutputSection(path="o", format="csv")
    assert spec.load(tmp_path / "job.toml", overrides, output="p").output.path == "p"
    with pytest.raises(JobError, match=r"output.format: expected one of 'none', .*'parquet', .*not 'xls'"):
        spec.load(tmp_path / "job.toml", ["output.path=o", "output.format=xls"])


@pytest.mark.parametrize(
    "wrong", ["1979-05-27", "5", "[1]", "true", "inf", '"x"', "[[1]]", "{a = 1}", "[{}]", '""']
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(wrong: str, tmp_path: Path) -> None:
    """At every key of a job, whatever else the command line adds to it."""
    for key in spec.Spec.__struct_fields__:
        (tmp_path / "job.toml").write_text(f"{key} = {wrong}\n")
        for more in ([], [f"{key}.path=o"], [f"{key}.model=m"], [f"{key}=7"]):
            for output in (None, "o"):
                with contextlib.suppress(JobError):
                    spec.load(tmp_path / "job.toml", more, input="i", output=output)


def test_values_of_ranks_and_hosts() -> None:
    """A list has one for each rank, a table one for each host; hosts on paper have a number behind their name."""
    job = spec.load(
        None,
        [
            "memory.weights=['1GiB', 'all']",
            "memory.kv={pi='2GiB', default='3GiB'}",
            "layout.threads={pi=4, nuc=2}",
        ],
        input="in",
        output="out",
    )
    first, second = job.on_rank(0, "pi (3)"), job.on_rank(1, "nuc")
    assert [(one.memory.weights_bytes, one.memory.kv_bytes, one.layout.threads) for one in (first, second)] == [
        (2**30, 2 * 2**30, 4), (None, 3 * 2**30, 2),
    ]  # fmt: skip
    later = job.of_ranks([1])  # rank 0 was lost
    assert (later.on_rank(0, "nuc"), later.memory.kv) == (second, job.memory.kv)
    narrow = spec.tightest([first, second])
    assert (narrow.memory.weights_bytes, narrow.memory.kv_bytes) == (2**30, 2 * 2**30)
    assert job.fingerprint() == spec.load(None, [], input="in", output="out").fingerprint()
    for rank, host, words in [
        (2, "pi", "memory.weights is a list of 2 values, and there is none for rank 2"),
        (0, "mac", "layout.threads has no value for the host 'mac'"),
    ]:
        with pytest.raises(JobError, match=words):
            job.on_rank(rank, host)
    with pytest.raises(JobError, match=r"weights: 'much' is not a size"):
        spec.load(None, ["memory.weights=['1GiB', 'much']"], input="in", output="out")
    assert list(job.unused(["pi", "nuc", "pi"])) == []
    assert list(job.unused(["pi"])) == [
        "memory.weights is a list of 2 values, and there is only 1 rank.",
        "layout.threads has a value for nuc, where no rank is; the ranks are on pi.",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('layout.threads="x"', "layout.threads: expected one of 'auto', a whole number, not 'x'."),
        ('layout.threads=[1, "x"]', "layout.threads[1]: expected one of 'auto', a whole number, not 'x'."),
        ('layout.threads={pi="x"}', "layout.threads.pi: expected one of 'auto', a whole number, not 'x'."),
        ("layout.threads={pi=1, nuc=0}", "layout.threads.nuc: expected a whole number >= 1, not 0."),
        ("memory.kv=[1, -1]", "memory.kv[1]: expected a whole number >= 1, not -1."),
        ("memory.kv={pi=[1]}", "memory.kv.pi: expected a whole number or a string, not [1]."),
        ("model={pi=3}", "model.pi: expected a string, not 3."),
        ("adapters={a=3}", "adapters.a: expected a string, not 3."),
    ],
)
def test_wrong_values_of_ranks_and_hosts(given: str, said: str) -> None:
    """The sentence names the entry of a list or a table, and the setting that gave it."""
    with pytest.raises(JobError, match=f"^{re.escape(f'--set {given}: {said}')}$"):
        spec.load(None, [given], input="in", output="out")


def test_what_is_enough_is_little_more() -> None:
    draw = random.Random(1)
    for count in (1, 1023, 1024, 2**40, *(draw.randrange(1, 2 ** draw.randrange(1, 50)) for _ in range(200))):
        assert count <= spec.byte_size(enough(count)) <= count * 1.1 + 1
    assert enough(30_640_896) == "29.3MiB"
