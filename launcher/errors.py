"""What a failure means: whose it is, whether trying again can help, and the exit code that says so.

0 done; 1 the run failed, or the machine lacks something; 2 bad input (a key, a file, an option); 130 Ctrl-C.
"""

from __future__ import annotations

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class RunFailed(RuntimeError):
    """A run ended without its result; the message is all that a person needs."""

    def __init__(self, message: str, exit_code: int = FAILED, details: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        """The process's."""
        self.details = details
        """The traceback of the rank that failed, shown with --debug and for our own defects."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it is no Exception, so that nothing on the way swallows it."""


class TopologyError(RuntimeError):
    """The workers were placed where the layout cannot run well; a restart would place them there again."""

    retryable = False


def is_retryable(error: BaseException) -> bool:
    """Whether restarting the workers from the last checkpoint may get past `error`.

    Peers that vanish, networks and file systems show as RuntimeError (torch.distributed) or OSError. Anything
    else would meet the same data with the same numbers, and fail again.
    """
    declared = getattr(error, "retryable", None)
    if declared is not None:
        return bool(declared)
    if isinstance(error, NotImplementedError) or type(error).__name__ == "OutOfMemoryError":
        return False
    return isinstance(error, RuntimeError | OSError | EOFError)


def is_meant(error: BaseException) -> bool:
    """Whether `error` is a message for people: raised by triptych on purpose, not within some library."""
    if isinstance(error, RunFailed):
        return True
    if not isinstance(error, ValueError | RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("triptych.")


def exit_code(error: BaseException) -> int:
    """The exit code for an error that ends the program."""
    if isinstance(error, RunFailed):
        return error.exit_code
    return BAD_INPUT if isinstance(error, ValueError) and is_meant(error) else FAILED
