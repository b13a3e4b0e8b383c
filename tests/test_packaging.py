"""What is installed is what is there: packages, job files, and the ways in."""

from __future__ import annotations

import importlib
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import mpillm
from mpillm import kernels
from mpillm.kernels.installed import RECORD, sources_digest
from tests.conftest import ROOT, clean_environment, run_bounded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_FROM = ("cython/", "mpillm/", "jobs/", "slurm/", "docs/", "packaging/")
BESIDE = {
    "mpillm.docs": "docs",
    "mpillm.docs.pictures": "docs/pictures",
    "mpillm.jobs": "jobs",
    "mpillm.slurm": "slurm",
    "mpillm.slurm.hosts": "slurm/hosts",
}
COMPILED = getattr(kernels._compiled, "__file__", "")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_wheels_are_made_for_each_python_and_for_both_processors() -> None:
    """The classifiers do not list versions: from requires-python on, all that cibuildwheel builds."""
    wheels = PROJECT["tool"]["cibuildwheel"]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert wheels["build"].split()[0] == f"cp{oldest}-*"
    assert {name.partition("-")[2].removesuffix("-image") for name in wheels if "image" in name} == set(
        wheels["archs"]
    )


def test_every_package_is_listed() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    there = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("mpillm/**/__init__.py")
    }
    assert listed == there | BESIDE.keys()


def test_every_job_file_and_script_is_installed() -> None:
    for package, folder in BESIDE.items():
        assert PROJECT["tool"]["setuptools"]["package-dir"][package] == folder
        patterns = PROJECT["tool"]["setuptools"]["package-data"][package]
        taken = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        assert taken == {path for path in (ROOT / folder).iterdir() if path.is_file()}


def test_the_command_exists() -> None:
    module, _, function = PROJECT["project"]["scripts"]["mpillm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def copied(to: Path) -> Path:
    """A copy of what a build reads, so that nothing is built in place."""
    listed = run_bounded(["git", "ls-files"], cwd=ROOT).stdout.split()
    names = listed or [str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*") if path.is_file()]
    for name in names:
        if name.startswith(BUILT_FROM) or "/" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
    return to


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("packaging") / "checkout")


@pytest.fixture(scope="module")
def archive(checkout: Path) -> Path:
    """The source archive."""
    return build("sdist", checkout, checkout.parent / "sdist")


def build(what: str, source: Path, out: Path, **env: str) -> Path:
    """The wheel or the source archive that is built from a checkout."""
    code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
    done = run_bounded([sys.executable, "-c", code], env=clean_environment(**env), cwd=source)
    assert done.returncode == 0, done.stderr
    (built,) = out.iterdir()
    return built


def test_a_source_archive_has_what_a_build_needs(checkout: Path, archive: Path) -> None:
    """Without the headers of the kernels, `pip install` from an archive would fall back to NumPy."""
    tracked = copied(checkout.parent / "tracked")
    there = {str(path.relative_to(tracked)) for path in tracked.glob("**/*") if path.is_file()}
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {name for name in there if name.startswith(BUILT_FROM)} <= inside
    assert not {name for name in inside if Path(name).match("cython/*.c")}, (
        "made by Cython, for one version of it"
    )
    assert not {name for name in inside if name.startswith("tests")}, "without their files they do not run"


def test_without_a_compiler_wheels_of_the_archive_and_the_checkout_are_equal(
    checkout: Path, archive: Path, tmp_path: Path
) -> None:
    """No compiler, or one that fails (as it does without Python's headers): NumPy's kernels serve."""
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheels = []
    for source, compiler in ((checkout, "/nowhere/cc"), (unpacked, "false")):
        with zipfile.ZipFile(build("wheel", source, tmp_path / f"of {source.name}", CC=compiler)) as wheel:
            wheels.append({name: wheel.getinfo(name).CRC for name in wheel.namelist()})
            metadata = wheel.read(f"mpillm-{mpillm.__version__}.dist-info/METADATA").decode()
    assert wheels[0] == wheels[1]
    assert "Description-Content-Type: text/markdown" in metadata
    assert "\n# mpillm\n" in metadata
    links = re.findall(r"\]\((?!https?:)|<!--", metadata)
    assert not links, "an index has no files that a link could lead to"
    names = set(wheels[0])
    assert {"mpillm/serve/page/app.js", "mpillm/kernels/reference/products.py"} <= names
    assert not [name for name in names if name.endswith((".so", RECORD))]
    beside = {
        path for folder in BESIDE.values() for path in (checkout / folder).glob("*.*") if path.is_file()
    }
    assert {f"mpillm/{path.relative_to(checkout)}" for path in beside if path.name != "__init__.py"} <= names


@pytest.mark.skipif(not COMPILED, reason="the kernels are not compiled here")
def test_a_checkout_uses_installed_kernels_of_the_same_sources(tmp_path: Path) -> None:
    """`pip install .` and then `python -m mpillm` in the checkout: the compiled modules lie elsewhere."""
    checkout = copied(tmp_path / "checkout")
    site, header = tmp_path / "site/mpillm/kernels", checkout / "cython/core/kernels.h"
    site.mkdir(parents=True)
    for path in Path(COMPILED).parent.glob("*.so"):
        (site / path.name).symlink_to(path)
    (site / RECORD).write_text(sources_digest(checkout / "cython") + "\n")
    code = "from mpillm import kernels; print(kernels.path(), kernels.__file__, kernels.why_missing())"
    env = clean_environment(PYTHONPATH=str(tmp_path / "site"))

    def answer() -> list[str]:
        done = run_bounded([sys.executable, "-c", code], env=env, cwd=checkout)
        assert done.returncode == 0, done.stderr
        return done.stdout.split(maxsplit=2)

    path, file, *why = answer()
    assert (path, Path(file).is_relative_to(checkout), why) == (kernels.available()[-1], True, [])
    header.write_text(header.read_text() + "\n")
    path, _, why_not = answer()
    assert path == "numpy"
    assert f"those in {site} were compiled from other sources" in why_not


def names(requirements: list[str]) -> set[str]:
    """Requirements with their lower bounds, as conda writes them; behind a semicolon, for which Python."""
    plain = (requirement.replace("ml-dtypes", "ml_dtypes").replace("'", '"') for requirement in requirements)
    return {requirement.replace(">=", " >=", 1) for requirement in plain}


def _conda(needed: str | dict[str, str]) -> str:
    """A requirement of the recipe, as `names` has it."""
    if isinstance(needed, str):
        return needed
    (version,) = re.findall(r'match\(python, "<(.*)"\)', needed["if"])
    return f'{needed["then"]}; python_version < "{version}"'


def test_the_conda_recipe_needs_what_the_package_needs() -> None:
    recipe = yaml.safe_load((ROOT / "packaging/conda/recipe.yaml").read_text())
    assert recipe["package"]["version"] == mpillm.__version__
    run, host = ({_conda(needed) for needed in recipe["requirements"][when]} for when in ("run", "host"))
    assert run == names(PROJECT["project"]["dependencies"]) | {
        f"python {PROJECT['project']['requires-python']}"
    }
    assert host - {"python", "pip"} == names(PROJECT["build-system"]["requires"])


def test_the_page_lists_each_extra() -> None:
    page = (ROOT / "docs/install.md").read_text()
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", page, flags=re.M)
        for name in re.findall(r"`([a-z-]+)`", row)
    }
    ours = {"docs", "test", "fuzz", "lint"}  # CONTRIBUTING.md
    assert PROJECT["project"]["optional-dependencies"].keys() - ours <= listed


def test_containers_install_what_there_is() -> None:
    """They copy what a wheel is built from, and nothing else of a checkout, which may hold environments and results."""
    extras = PROJECT["project"]["optional-dependencies"].keys()
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "cython", "mpillm"} | {
        folder.partition("/")[0] for folder in BESIDE.values()
    }
    for name in ("Containerfile", "apptainer.def"):
        text = (ROOT / "packaging" / name).read_text()
        copied = [
            words for words in map(str.split, text.splitlines()) if words and words[-1].startswith("/source/")
        ]
        assert {word for words in copied for word in words[:-1]} - {"COPY"} == needed, name
        (wanted,) = re.findall(r"\[([^\]\"]*MPI[^\]\"]*)\]", text)
        chosen = [re.sub(r"\W+", "", word) for word in wanted.split(",")]
        assert chosen[0] == "MPI"
        assert set(chosen[1:]) <= extras
        assert "openmpi" in re.findall(r"MPI=(\w+)", text)
    job = yaml.safe_load((ROOT / "packaging/kubernetes/mpijob.yaml").read_text())
    replicas = job["spec"]["mpiReplicaSpecs"]
    (launcher,) = replicas["Launcher"]["template"]["spec"]["containers"]
    assert launcher["command"][2] == str(replicas["Worker"]["replicas"] * job["spec"]["slotsPerWorker"])
    assert launcher["command"][3:7] == ["python", "-m", "mpillm", "run"]
    hostfile = {"name": "PRTE_MCA_prte_default_hostfile", "value": "/etc/mpi/hostfile"}
    assert hostfile in launcher["env"], "the operator's variables are Open MPI 4's"
    (worker,) = replicas["Worker"]["template"]["spec"]["containers"]
    assert not {"command", "args"} & worker.keys(), "the operator starts sshd only where there is none"
    text = (ROOT / "packaging/kubernetes/Containerfile").read_text()
    assert "openssh-server" in text
    assert {launcher["image"], worker["image"]} == set(re.findall(r"build -t (\S+)", text))
