"""What Open MPI is told before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpillm.comm import openmpi
from mpillm.comm.openmpi import TRANSPORTS, starting


@pytest.fixture(autouse=True)
def no_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmpi, "DEBIAN", tmp_path / "debian")


@pytest.mark.parametrize(
    ("of_site", "of_user", "environ", "expected"),
    [
        ("", "", {}, "^ofi"),
        ("# btl = self,tcp\nbtl_tcp_links = 2\n", "", {}, "^ofi"),
        ("pml = ob1\n  btl=self,tcp\n", "", {}, None),
        ("", "btl = ^uct\n", {}, None),
        ("mca_base_param_files = /site.conf\n", "", {}, None),
        ("", "", {TRANSPORTS: "self,sm"}, "self,sm"),
    ],
)
def test_the_transport_for_one_sided_messages_is_left_out_unless_the_user_chooses(
    of_site: str, of_user: str, environ: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    for text, file in (
        (of_site, tmp_path / "etc" / "openmpi-mca-params.conf"),
        (of_user, tmp_path / "home" / ".openmpi" / "mca-params.conf"),
    ):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    environ = {"HOME": str(tmp_path / "home"), **environ}
    before = dict(environ)
    with starting(str(tmp_path / "lib" / "libmpi.so.40"), False, environ):
        assert environ.get(TRANSPORTS) == expected
    assert environ == before  # what is started from here chooses for itself


def test_a_process_that_is_alone() -> None:
    """Of a user without a home, too."""
    environ: dict[str, str] = {}
    with starting("/nowhere/lib/libmpi.so.40", True, environ):
        assert environ[TRANSPORTS] == "^ofi,sm"
        folder = Path(environ["TMPDIR"])
        assert folder.is_dir()
    assert not environ
    assert not folder.exists()
