"""Hosts with files of their own: what is wrong on one of them is said in a sentence with its name."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import mpi4py
import pytest

from mpillm import version
from tests.cluster import hosts as tools
from tests.cluster.hosts import Hosts
from tests.cluster.jobs import MODEL, write_job
from tests.cluster.test_hosts import environment
from tests.conftest import FINDERS, Mpi, run_bounded

pytestmark = [pytest.mark.hosts, pytest.mark.mpiexec]

COPY = f"mount -t tmpfs tmpfs {{model}} && cp -r {MODEL}/. {{model}} && chown -R 1234 {{model}}"
ON = r" \(on rank 1 of 2, host {host}\)"
# What is done on the second host, and what is said.
CASES = {
    "another version": (
        f"mount --bind {{folder}}/version.py {version.__file__}",
        r"Rank 1 on {host} runs mpillm 0\.0\.7\b.*, and rank 0 on {first} .+; install the same version on every host\.",
    ),
    "another MPI": (
        "{other_mpi}",
        r".+'s mpiexec started this rank, but its Python has loaded another MPI, .+ on every host .+" + ON,
    ),
    "no MPI": ("mount --bind /dev/null {library}", r"No MPI library can be loaded \(.+" + ON),
    "another time": (
        f"mount --bind {{folder}}/ahead.py {mpi4py.__file__}",
        r"The clock of {host} is 7\d\d\d seconds ahead of that of {first}: answers do not depend on it, .+",
    ),
    "another model": (
        f"mount --bind {MODEL.parent}/qwen3 {{model}}",
        r"Rank 1 on {host} sees another model at {model} .+; put the same files on every node\.",
    ),
    "no model": (
        "mount -t tmpfs tmpfs {model}",
        r"{model} has no config\.json: it is not a complete Hugging Face model\." + ON,
    ),
    "no permission for the model": (
        f"{COPY} && chmod 700 {{model}}",
        r"The model {model} cannot be read: Permission denied\." + ON,
    ),
    "no permission for a file of the model": (
        f"{COPY} && chmod 600 {{model}}/model.safetensors",
        r"{model}/model\.safetensors cannot be read: Permission denied\." + ON,
    ),
    "no space": (
        "mount -o loop {folder}/disk {spill} && head -c 1000000 /dev/zero > {spill}/all 2>/dev/null; true",
        r"memory\.kv_spill: \d+ bytes cannot be allocated in {spill} \(No space left on device; .+" + ON,
    ),
    "no permission to write": (
        "mount --bind {folder}/locked {spill} && chown 1234 {spill} && chmod 700 {spill}",
        r"memory\.spill_dir = {spill}: a file cannot be created there \(Permission denied\).+" + ON,
    ),
}
# With so little memory each rank keeps a part of the KV cache in a file.
TIGHT = ("memory.weights=60000", "memory.kv=20000", "memory.kv_spill=1MiB")


def small_disk(image: Path, where: Path) -> bool:
    """Make a file system in a file; whether it can be mounted."""
    if not shutil.which("mkfs.ext2"):
        return False
    words = f"mkfs.ext2 -q -N 32 {image} 200k && mount -o loop {image} {where}"
    return run_bounded(["unshare", "--mount", "sh", "-c", words]).returncode == 0


def libraries(mpi: Mpi) -> dict[str, str]:
    """The library that a rank loads, and what has it load that of the other MPI; both MPIs are there."""
    openmpi, mpich = FINDERS["openmpi"](), FINDERS["mpich"]()
    if openmpi is None or mpich is None:
        pytest.skip("this takes both MPIs")
    theirs, ours = Path(mpich.env["MPI4PY_LIBMPI"]), openmpi.mpiexec.parent.parent / "lib" / "libmpi.so.40"
    if mpi.name == "openmpi":
        return {"library": str(ours), "other_mpi": f"export MPI4PY_LIBMPI={theirs}"}
    replaced = f"ln -s {ours.parent}/* {theirs.parent} && ln -sf {ours} {theirs}"
    return {"library": str(theirs), "other_mpi": f"mount -t tmpfs tmpfs {theirs.parent} && {replaced}"}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_on_a_host_is_said_with_its_name(mpi: Mpi, tmp_path: Path, case: str) -> None:
    if reason := tools.missing():
        pytest.skip(reason)
    before, said = CASES[case]
    words = libraries(mpi) if "MPI" in case else {}
    places = {"folder": tmp_path, "model": tmp_path / "model", "spill": tmp_path / "spill"}
    shutil.copytree(MODEL, places["model"])
    for name in ("spill", "locked"):
        (tmp_path / name).mkdir()
    if case == "no space" and not small_disk(tmp_path / "disk", places["spill"]):
        pytest.skip("no file system can be mounted out of a file here")
    other = re.sub(r'"[^"]+"$', '"0.0.7"', Path(version.__file__).read_text(), flags=re.M)
    (tmp_path / "version.py").write_text(other)
    ahead = "import time\nnow = time.time\ntime.time = lambda: now() + 7200\n"
    (tmp_path / "ahead.py").write_text(Path(mpi4py.__file__).read_text() + ahead)
    job, hostfile = write_job(tmp_path), tmp_path / "hosts"
    # Rank 0 waits for its shards, and begins before other replicas are ready.
    layout = "layout.shards=2" if mpi.name == "openmpi" else "layout.replicas=2"
    settings = [f"model={places['model']}", f"memory.spill_dir={places['spill']}", layout, *TIGHT]
    program = [
        sys.executable, "-B", "-m", "mpillm", "run", job, *(f"--set={setting}" for setting in settings)
    ]  # fmt: skip
    with Hosts(tmp_path, 2).up() as hosts:
        hosts.before(2, before.format(**places, **words))
        hostfile.write_text(hosts.listed(mpi, 2))
        command = [*hosts.launcher(mpi, hostfile), "-n", "2", *program]
        done = run_bounded(hosts.on_first(command, environment(mpi)), 60, cwd=tmp_path)
    assert done.returncode == (0 if case == "another time" else 2), done.stderr
    names = {"host": f"{hosts.prefix}2", "first": f"{hosts.prefix}1"}
    pattern = said.format(**names, **{name: re.escape(str(path)) for name, path in places.items()})
    assert len(re.findall(f"^mpillm: {pattern}$", done.stderr, re.M)) == 1, done.stderr
