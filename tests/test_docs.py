"""What the documentation says can be typed: every command in it is parsed, and what it names exists.

Commands that need a cluster run in tests/cluster; the two at the top of the README run in CI.
"""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpillm import read_results, spec
from mpillm.batch.endpoints import ENDPOINTS
from mpillm.cli.arguments import command_parser
from mpillm.cli.parser import HIDDEN
from mpillm.engine.limits import Totals
from mpillm.model.families import architectures, gguf_architectures
from mpillm.serve import openapi
from mpillm.serve.metrics import Metrics
from tests.conftest import ROOT, clean_environment, run_bounded
from tests.job_helpers import CHAT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = {"slurm": "*.sbatch", "slurm/hosts": "*", "jobs": "*.toml"}
SCRIPTS = [path for folder, names in FOLDERS.items() for path in sorted((ROOT / folder).glob(names))]

# Options that stand between a launcher and the program, with the words that each takes.
LAUNCHER_OPTIONS = {
    "--with-ft": 1,
    "-n": 1,
    "-f": 1,
    "-iface": 1,
    "--pty": 0,
    "--hostfile": 1,
    "--mca": 2,
    "--prtemca": 2,
    "--map-by": 1,
    "--bind-to": 1,
    "-x": 1,
}
# Programs of others; what they do is theirs.
SYSTEM = {
    "auditwheel",
    "schemathesis",
    "inspect",
    "export",
    "split",
    "mkdir",
    "module",
    "sbcast",
    "cd",
    "apt",
    "pip",
    "python3",
    "ssh-copy-id",
    "ssh-keygen",
    "sudo",
    ".",
}
MADE_UP = {"JOB.toml", "hosts", "records.jsonl"}


def fenced(page: Path) -> Iterator[str]:
    """The lines of a page's shell blocks, without comments."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S):
        yield from filter(None, (line.partition(" #")[0].strip() for line in block.splitlines()))


def indented(script: Path) -> Iterator[str]:
    """What a script's opening comment says to type."""
    yield from (line[1:].strip() for line in script.read_text().splitlines() if line.startswith("#     "))


COMMANDS = [(page, line) for page in PAGES for line in fenced(page)]
COMMANDS += [(script, line) for script in SCRIPTS for line in indented(script)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.name}: {line}" for page, line in COMMANDS])
def test_a_command_can_be_typed(page: Path, line: str) -> None:
    words = shlex.split(line)
    program = words[0].rpartition("/")[2]
    if program == "make":
        done = run_bounded(["make", "--dry-run", *words[1:]], cwd=ROOT)
        assert done.returncode == 0, done.stderr
    elif program == "sbatch":
        check_sbatch(words[1:])
    elif program in ("mpiexec", "srun"):
        check_launch(words[1:])
    elif program == "mpillm":
        check_mpillm(words[1:])
    elif program == "python":
        check_python(words)
    else:
        assert program in SYSTEM, f"{page.name} has a command that no test knows: {line}"
        check_extras(words)


def check_sbatch(words: list[str]) -> None:
    """Options, one of our scripts, then what `mpillm run` gets."""
    at = next(index for index, word in enumerate(words) if not word.startswith("-"))
    script = ROOT / words[at]
    assert script.is_file(), script
    rest = words[at + 1 :]
    if script.name == "array.sbatch":
        rest = [rest[0], "--input", rest[1], "--output", rest[2], *rest[3:]]
    check_mpillm(["run", *rest])


def check_launch(words: list[str]) -> None:
    # Else Open MPI finds no python of a virtual environment on the other hosts.
    assert "--hostfile" not in words or words[words.index("-x") + 1] == "PATH", words
    while words[0].startswith("-"):
        option = words[0]
        taken = 0 if "=" in option else LAUNCHER_OPTIONS[option]
        if option in ("-f", "--hostfile"):
            assert words[1] in MADE_UP or (ROOT / words[1]).is_file(), words[1]
        words = words[1 + taken :]
    check_python(words)


def check_python(words: list[str]) -> None:
    if words[:2] == ["python", "-m"] and words[2] in (
        "tests.batch.throughput",
        "tests.arm.machine",
        "tests.chaos",
        "tests.cluster.layouts",
        "tests.cluster.table",
        "tests.fuzz",
        "tests.kernels.instructions",
        "tests.planning.times",
        "tests.serve.load",
        "tests.text.schema_suite",
        "tests.unequal",
        "tests.unequal.losses",
    ):
        return  # their own tests run them
    if words[:4] == ["python", "-m", "pytest", "--with-mpi"]:
        assert (ROOT / words[4]).is_dir(), words  # make test-mpi runs it
        return
    assert words[:3] == ["python", "-m", "mpillm"], words
    check_mpillm(words[3:])


def check_mpillm(words: list[str]) -> None:
    """The command line parses, and the job it names is a good one."""
    options = command_parser().parse_args(words)
    if options.command == "launch":
        assert options.hostfile is None or (ROOT / options.hostfile).is_file(), options.hostfile
        return check_mpillm(options.words)
    job = getattr(options, "job", None)
    if job is not None and str(job) not in MADE_UP:
        loaded = spec.load(
            ROOT / job, options.set, model=options.model, input=options.input, output=options.output
        )
        assert options.input or loaded.input_path.is_file(), loaded.input
    elif getattr(options, "input", None) and str(options.input) not in MADE_UP:
        assert (ROOT / options.input).is_file(), options.input


def check_extras(words: list[str]) -> None:
    """`pip install '.[extra]'` names an extra that there is."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for name in re.findall(r"^\.\[(.*)\]$", word):
            assert set(name.split(",")) <= set(extras), word


@pytest.mark.mpiexec
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_quickstart_runs_as_printed(tmp_path: Path) -> None:
    """The README's first command, typed into a new shell after `make`: also as root, and on fewer than 4 cores."""
    activate = ROOT / ".venv" / "bin" / "activate"
    if not activate.exists():
        pytest.skip("make has not been here: there is no .venv")
    typed = next(line for line in fenced(ROOT / "README.md") if line.startswith("mpillm"))
    env = {
        name: os.environ[name]
        for name in ("HOME", "PATH", "MPILLM_CACHE", "PIP_INDEX_URL")
        if name in os.environ
    }
    script = f'. "{activate}" && python -m mpillm pull smollm2-135m && echo pulled && {typed}'
    done = run_bounded(["sh", "-c", script], 390, env, tmp_path)
    if "pulled" not in done.stdout:
        pytest.skip(f"the default model cannot be had: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "8 answered, 0 with an error" in done.stderr
    lines = (tmp_path / "out" / "quickstart" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 8
    again = run_bounded(["sh", "-c", f'. "{activate}" && {typed}'], env=env, cwd=tmp_path)
    assert "8 by earlier runs" in again.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in headings
            }


def job_table() -> str:
    """The part of docs/formats.md that has a row for each key of a job."""
    return (ROOT / "docs" / "formats.md").read_text().partition("## The job file")[2].partition("\n## ")[0]


def test_the_keys_of_a_job_are_described() -> None:
    """Each key has a row, and no other has one; `.shards` after `layout.stages` is `layout.shards`."""
    named: set[str] = set()
    for row in re.findall(r"^\| (`[a-z_.`, ]+`) \|", job_table(), flags=re.M):
        section = ""
        for key in re.findall(r"`([a-z_.]+)`", row):
            section = section if key.startswith(".") else key.rpartition(".")[0]
            named.add(section + key if key.startswith(".") else key)
    assert named == set(spec.known_keys())


def test_the_defaults_are_the_real_ones() -> None:
    defaults = spec.Spec(input="a", output=spec.OutputSection(path="b"))
    for key, shown in re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", job_table(), flags=re.M):
        value: object = defaults
        for name in key.split("."):
            value = getattr(value, name)
        assert tomllib.loads(f"value = {shown}")["value"] == value, key


# What Python, Open MPI and the kernel say; all other messages in the page are ours.
THEIRS = (
    "The virtual environment was not created",
    "requires a different Python",
    "There are not enough slots available",
    "prterun has detected",
    "prterun detected",
    "prterun was unable to find",
)


def test_all_classes_are_on_the_page_of_models() -> None:
    page = (ROOT / "docs/models.md").read_text()
    missing = [name for name in (*architectures(), *gguf_architectures()) if f"`{name}`" not in page]
    assert not missing


def test_messages_in_troubleshooting_are_real() -> None:
    """A message's parts, between its dots, are in the sources."""
    sources = [path.read_text() for path in (ROOT / "mpillm").glob("**/*.py")]
    # As a reader sees it: a sentence that the source breaks into several strings is one.
    text = " ".join(re.sub(r"\"\s+f?\"", "", source) for source in sources)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    assert len(messages) > 8
    for message in messages:
        if not message.startswith(THEIRS):
            for part in filter(None, (part.strip() for part in re.split(r"\.\.\.|\b\d+\b", message))):
                assert part in text, (part, message)


def test_each_way_of_dying_has_its_test() -> None:
    page = (ROOT / "docs" / "failures.md").read_text()
    rows = [row for row in page.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        path, name = re.findall(r"`(tests/[^`:]+)::(\w+)` \|$", row)[0]
        assert f"def {name}(" in (ROOT / path).read_text(), row


def test_numbers_in_memory_md_are_right() -> None:
    """The KV cache of one token of SmolLM2, as the page works it out."""
    text = (ROOT / "docs" / "memory.md").read_text()
    product = re.search(r"2 x 30 x 3 x 64 x 2 bytes = ([\d.]+) KiB", text)
    assert product
    assert float(product[1]) * 1024 == 2 * 30 * 3 * 64 * 2


def test_the_site_is_built(tmp_path: Path) -> None:
    """Every page is in it, no link is broken, and the reference has every command, endpoint and exit code."""
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = run_bounded(words, env=clean_environment(NO_MKDOCS_2_WARNING="1"), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    reference = html.unescape((tmp_path / "site/reference/index.html").read_text())
    subparsers = command_parser()._subparsers
    assert subparsers is not None
    choices = next(action.choices for action in subparsers._group_actions)
    assert choices is not None
    for told in [f"mpillm {name}" for name in choices if name not in HIDDEN]:
        assert f">{told}<" in reference, told
    metrics = [name for name, _ in Metrics(Totals()).described()]
    urls = [*(endpoint.url for endpoint in ENDPOINTS), *openapi.document()["paths"]]
    assert len(metrics) > 5
    for told in [*urls, *spec.known_keys(), *metrics, *map(str, (0, 1, 2, 70, 75))]:
        assert f">{told}<" in reference, told
    for page in (ROOT / "docs").glob("*.md"):
        name = "" if page.stem == "index" else page.stem
        assert (tmp_path / "site" / name / "index.html").is_file(), page


RESULTS = ROOT / "docs/results.md"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that docs/results.md reads: drawn tokens, scores and an error; its commands were typed."""
    folder = tmp_path_factory.mktemp("results")
    lines = [
        *({"prompt": f"the fox {number}", "max_tokens": 3, "logprobs": number % 2} for number in range(3)),
        {"prompt": 5},
        {"prompt": "a dog", "max_tokens": 4},
    ]
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    mine = ["run", "--model", str(CHAT), "--input", "in.jsonl", "--output", "out/mine"]
    for words in (mine, *(line.split()[1:] for line in fenced(RESULTS))):
        done = run_bounded([sys.executable, "-m", "mpillm", *words], env=clean_environment(), cwd=folder)
        assert done.returncode == (words is mine), done.stderr
    return folder


def test_the_python_code_of_the_page_on_results_runs(results: Path) -> None:
    sections = [
        re.findall(r"^```python\n(.*?)^```", section, flags=re.M | re.S)
        for section in RESULTS.read_text().split("\n## ")
    ]
    code = [block for blocks in sections for block in blocks]
    alone = [f"exec({''.join(blocks)!r}, {{}})" for blocks in sections]  # whoever begins to read there
    told = (
        "print(len(answers), list(failed.custom_id), tokens.tolist() == list(results.tokens[0]), len(means))"
    )
    words = [sys.executable, "-c", "\n".join([*alone, *code, told])]
    done = run_bounded(words, env=clean_environment(), cwd=results)
    assert done.stdout.splitlines()[-1:] == ["5 ['request-4'] True 3"], done.stderr


def test_the_r_code_of_the_page_on_results_runs(results: Path) -> None:
    rscript = shutil.which("Rscript")
    if not rscript or run_bounded([rscript, "-e", 'library("hdf5r")']).returncode:
        pytest.skip("R and its package hdf5r are missing: apt install r-base-core r-cran-hdf5r")
    (code,) = re.findall(r"^```r\n(.*?)^```", RESULTS.read_text(), flags=re.M | re.S)
    told = "cat(nrow(answers), subset(answers, status != 200)$custom_id, tokens)"
    done = run_bounded([rscript, "-e", f"{code}\n{told}"], cwd=results)
    tokens = read_results(results / "out/mine").tokens[0]
    assert done.stdout.splitlines()[-1:] == [" ".join(map(str, [5, "request-4", *tokens]))], done.stderr


def test_the_tutorial_for_python_runs(tmp_path: Path) -> None:
    """The code of docs/tutorial-python.md, with a tiny model in place of the default one."""
    text = (ROOT / "docs/tutorial-python.md").read_text().replace('"smollm2-135m"', repr(str(CHAT)))
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
    done = run_bounded([sys.executable, "-c", script], env=clean_environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 200"


def test_the_tutorial_for_slurm_runs(tmp_path: Path) -> None:
    """Its commands, typed one after the other with its example as the input and a tiny model.

    The environment and pull are left out, and sbatch's words are run here; tests/cluster/test_slurm.py has the
    scripts in a Slurm.
    """
    page, env = ROOT / "docs/tutorial-slurm.md", clean_environment()
    folder, typed = tmp_path, list(fenced(page))
    for line in typed:
        words = shlex.split(line)
        if words[0] in ("pip", "python3", ".") or words[3:4] == ["pull"]:
            continue
        if words[0] == "cd":
            folder /= words[1]
            continue
        if words[0] == "sbatch":
            words = ["python", "-m", "mpillm", "run", *words[words.index("slurm/one-node.sbatch") + 1 :]]
        if words[3] in ("plan", "run"):
            words += ["--model", str(CHAT)]
        done = run_bounded([sys.executable, *words[1:]], env=env, cwd=folder)
        assert done.returncode == 0, (line, done.stderr)
        if words[3] == "init":
            (request,) = re.findall(r"^```json\n(.*?)^```", page.read_text(), flags=re.M | re.S)
            (folder / words[-1] / "records.jsonl").write_text(request)
    answer = json.loads((folder / "out/records/results.jsonl").read_text())
    assert answer["custom_id"] == "record-1"
    assert answer["response"]["body"]["choices"][0]["message"]["content"] in ("positive", "negative")
    assert (folder / "out/records/report.html").is_file()


def test_the_requests_that_pages_show_are_answered(tmp_path: Path) -> None:
    """All of one line, in one run of a tiny model (which has no classifier) with the adapter that they name."""
    lines = [line for page in PAGES for line in re.findall(r'^\{"\w+": .*\}$', page.read_text(), flags=re.M)]
    assert len(lines) > 10
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    words = ["run", "--model", CHAT, "--input", "in.jsonl", "--output", "out"]
    adapter = ["--set", f"adapters.french={ROOT / 'tests/fixtures/adapters/chat_all'}"]
    run_bounded([sys.executable, "-m", "mpillm", *words, *adapter], env=clean_environment(), cwd=tmp_path)
    answers = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    failed = {
        line: answer["error"]["message"]
        for line, answer in zip(lines, answers, strict=True)
        if answer["error"]
    }
    assert [line for line in failed if "/v1/classify" not in line] == [], failed
