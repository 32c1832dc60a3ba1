"""What a failure means: whose it is, whether trying again can help, and the exit code that says so.

0 done; 1 the run failed, or the machine lacks something; 2 bad input (a key, a file, an option); 130 Ctrl-C.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

_REMOTE = ("_RemoteTraceback", "RankError")
"""Causes that hold the traceback of another process: of concurrent.futures, and of parallel.local."""
_ROOT = Path(__file__).parent.parent
_ROOMS = ("launcher", "tools", "training", "parallel", "models", "data_pipeline", "kernels")
_FRAME = re.compile(r'^ *File "(.+)", line \d+, in .+\n *(.*)$', re.MULTILINE)


class RunFailed(RuntimeError):
    """A run ended without its result; the message is all that a person needs."""

    def __init__(
        self, message: str, exit_code: int = FAILED, details: str = "", is_defect: bool = False
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """The process's."""
        self.details = details
        """The traceback of the rank that failed, shown with --debug and for our own defects."""
        self.is_defect = is_defect
        """Whether what failed a rank was no message for people."""

    @classmethod
    def of(cls, failure: Mapping[str, Any], prefix: str = "") -> RunFailed:
        """From a run directory's failure.json."""
        return cls(
            prefix + failure["message"],
            int(failure["exit_code"]),
            failure["traceback"],
            bool(failure["is_defect"]),
        )


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so that nothing on the way swallows it."""


class TopologyError(RuntimeError):
    """The workers were placed where the layout cannot run well; a restart would place them there again."""

    retryable = False


def is_retryable(error: BaseException) -> bool:
    """Whether restarting the workers from the last checkpoint may get past `error`.

    Peers that vanish, networks and file systems show as RuntimeError (torch.distributed) or OSError. Anything
    else would meet the same data with the same numbers, and fail again; what the machine lacks, which is what
    our own RuntimeErrors say, it would lack again.
    """
    declared = getattr(error, "retryable", None)
    if declared is not None:
        return bool(declared)
    if isinstance(error, NotImplementedError) or _is_out_of_memory(error):
        return False
    if isinstance(error, RuntimeError) and is_meant(error):
        return False
    return isinstance(error, RuntimeError | OSError | EOFError)


def is_meant(error: BaseException) -> bool:
    """Whether `error` is a message for people, and no defect of ours.

    It is one when triptych raised it on purpose: a ValueError or RuntimeError of a `raise` statement of ours,
    not of a library, and not of an operator that we called. A file system that refuses, and a machine that
    runs out of memory, say themselves what is wrong.
    """
    if isinstance(error, RunFailed):
        return not error.is_defect
    if isinstance(error, OSError) or _is_out_of_memory(error):
        return True
    if not isinstance(error, ValueError | RuntimeError):
        return False
    if type(error.__cause__).__name__ in _REMOTE:
        frames = _FRAME.findall(str(error.__cause__))
    else:
        frames = [(frame.filename, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    return bool(frames) and _is_our_raise(*frames[-1])


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ends the program."""
    if isinstance(error, RunFailed):
        return error.exit_code
    return BAD_INPUT if isinstance(error, ValueError) and is_meant(error) else FAILED


def _is_our_raise(filename: str, line: str) -> bool:
    path = Path(filename)
    in_a_room = path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _ROOMS
    return in_a_room and line.startswith("raise ")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
