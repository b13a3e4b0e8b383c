"""What the tests of runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.run.cgroups import Cgroup


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    try:
        made = Cgroup()
    except (OSError, KeyError) as error:
        pytest.skip(f"no memory cgroup can be made here (root can, mostly): {error}")
    yield made
    made.path.rmdir()
