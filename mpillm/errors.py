"""Errors that a user can cause or must act on; each carries the process's exit code.

A message is one sentence or two: what is wrong, where, and what to do.
"""

from __future__ import annotations


class MpillmError(Exception):
    """Base of every error that ends in a sentence instead of a traceback."""

    exit_code = 2


class JobError(MpillmError):
    """The job file, the command line or the environment is wrong."""


class ModelError(MpillmError):
    """The model's files or its configuration cannot be used."""


class LayoutError(MpillmError):
    """The model cannot be laid out on this number of ranks."""


class OutputError(MpillmError):
    """The output directory cannot be written, or belongs to another job."""


class RequestError(MpillmError):
    """One request is wrong; it ends in an error result and costs no other request."""

    exit_code = 1


class Interrupted(MpillmError):
    """The run was stopped before its end; the same command goes on."""

    exit_code = 75
