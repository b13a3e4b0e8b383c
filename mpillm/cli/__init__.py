"""The command line: what people type, and all that is printed for them.

This module alone is loaded before the environment has been looked at; `commands` needs NumPy and MPI.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mpillm.cli.environment import prepare
from mpillm.cli.streams import unfailing
from mpillm.errors import JobError, MpillmError, of_system


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code."""
    with unfailing():
        try:
            prepare()
            from mpillm.cli import commands

            return commands.run(arguments)
        except MpillmError as error:
            sentence, code = str(error), error.exit_code
        except (Exception, KeyboardInterrupt) as error:
            told = of_system(error)
            if told is None:
                raise
            sentence, code = str(told), JobError.exit_code
        sys.stderr.write(f"mpillm: {sentence}\n")
        return code
