"""Errors that a user can cause or must act on; each carries the process's exit code.

A message is one sentence or two: what is wrong, where, and what to do.
"""

from __future__ import annotations

import errno
import os

NOT_FINITE = "The model's output for this request is not finite (NaN or infinity), so there is no answer."
TOO_LONG = "context_length_exceeded"  # OpenAI's code


class MpillmError(Exception):
    """Base of every error that ends in a sentence instead of a traceback."""

    exit_code = 2


class JobError(MpillmError):
    """The job file, the command line or the environment is wrong."""


class ModelError(MpillmError):
    """The model's files or its configuration cannot be used."""


class LayoutError(MpillmError):
    """The model cannot be laid out on this number of ranks."""


# The errors that say that something is impossible. Code that then tries something else catches these, not MpillmError:
# a signal may raise Interrupted anywhere, and that must end the process.
IMPOSSIBLE = (JobError, ModelError, LayoutError)


class OutputError(MpillmError):
    """The output directory cannot be written, or belongs to another job."""


class RequestError(MpillmError):
    """One request is wrong; it ends in an error result and costs no other request."""

    exit_code = 1

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        """`param` is the key that is wrong, `code` OpenAI's name of the error, if there is one."""
        super().__init__(message)
        self.param, self.code = param, code


class UnsuitedError(RequestError):
    """The model can answer no such request, whatever its values.

    The model lacks a tokenizer, a chat template, a classifier.
    """


class NotFiniteError(MpillmError):
    """The model's output for a request is NaN or infinite; the request has no answer."""

    exit_code = 1

    def __init__(self) -> None:
        super().__init__(NOT_FINITE)


class Interrupted(MpillmError):
    """The run was interrupted; the same command continues it."""

    exit_code = 75


class NoSpace(Interrupted):
    """A disk is full; the same goes on when there is space."""


_AGAIN = "and run the same command again"
_MEMORY = f"lower memory.weights or memory.kv, or raise the limit (ulimit -v, a cgroup's), {_AGAIN}"
_RAN_OUT = {
    errno.ENOMEM: f"There is not enough memory ({{}}); {_MEMORY}.",
    errno.EMFILE: f"Too many files are open ({{}}); raise the limit (ulimit -n), {_AGAIN}.",
    errno.ENFILE: f"Too many files are open on this machine ({{}}); close some, {_AGAIN}.",
    errno.EAGAIN: f"No more processes or threads can be started ({{}}); raise the limits (ulimit -u and -v, a "
    f"cgroup's), {_AGAIN}.",
}
_WORDS = {  # errors without a number: threads that do not start, libraries that are not mapped
    "can't start new thread": errno.EAGAIN,
    "Resource temporarily unavailable": errno.EAGAIN,
    "failed to map segment": errno.ENOMEM,
    "Cannot allocate memory": errno.ENOMEM,
    "Too many open files": errno.EMFILE,
}


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # what a write ends with where there is no space
_FAILED = FULL | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}  # what may work again


def of_system(error: BaseException) -> MpillmError | None:
    """Return the error to tell the user where the system refused memory, threads, a file; None for other errors.

    It is for what no code nearer to the cause has put into better words.
    """
    if (sentence := _out_of(error)) is not None:
        return Interrupted(sentence)
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else None
    if error.errno in _FAILED:
        what = f"{where or 'A file'} cannot be read or written ({error.strerror})"
        return Interrupted(f"{what}; free some space or repair the disk, {_AGAIN}.")
    return None if where is None else JobError(f"{where} cannot be used: {error.strerror}.")


def _out_of(error: BaseException) -> str | None:
    """Return a sentence on the resource that the process lacks, and what to do; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif isinstance(error, (ImportError, RuntimeError)):
        number = next((number for words, number in _WORDS.items() if words in str(error)), None)
    sentence = _RAN_OUT.get(number) if number is not None else None
    return sentence.format(str(error) or type(error).__name__) if sentence else None
