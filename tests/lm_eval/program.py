"""Runs `mpillm` with its words without the harness's own tasks, which take a while to be listed.

KILLED_AFTER in the environment ends the process with SIGKILL when so many answers are cached.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from typing import Any

import lm_eval.tasks
from lm_eval.api.model import CacheHook

from mpillm.cli import main


class Deadly(CacheHook):  # type: ignore[misc]
    left = int(os.environ.get("KILLED_AFTER", "0"))

    def add_partial(self, *answer: Any) -> None:
        super().add_partial(*answer)
        Deadly.left -= 1
        if not Deadly.left:
            self.dbdict.commit()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    if Deadly.left:
        lm_eval.api.model.CacheHook = Deadly
    sys.exit(main(sys.argv[1:]))
