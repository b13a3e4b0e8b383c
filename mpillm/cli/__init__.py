"""The command line: what people type, and all that is printed for them.

This module alone is loaded before the environment has been looked at; `commands` needs NumPy and MPI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mpillm.cli.environment import prepare
from mpillm.cli.streams import unfailing
from mpillm.comm import launch
from mpillm.errors import Interrupted, JobError, MpillmError, of_system

BROKEN = 1  # exit code of a Python that lacks a library
EARLY = "Stopped before anything was computed; run the same command again."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    with unfailing():
        try:
            prepare()
            from mpillm.cli import commands

            return commands.run(arguments)
        except MpillmError as error:
            sentence, code = str(error), error.exit_code
        except KeyboardInterrupt:  # until ranks have met; then signals are answered by `running`
            started = launch.launched_by(os.environ)
            sentence, code = EARLY, Interrupted.exit_code
            if started is not None and started.launcher != launch.OPENMPI:  # which got the signal itself
                launch.end_all(started, code, os.environ)
            if started is not None and started.rank:
                return code
        except Exception as error:
            told, code = of_system(error), BROKEN
            if told is not None:
                code = JobError.exit_code
                sys.stderr.write(f"mpillm: {told}\n")
            launch.end_all(launch.launched_by(os.environ), code, os.environ)
            if told is None:
                raise
            return code
        sys.stderr.write(f"mpillm: {sentence}\n")
        return code
