"""Ctrl-C, and the SIGTERM of a launcher or a batch system: one line of rank 0, and how to go on; never a traceback.

A command arms this before it imports anything else. While it imports, a signal ends the process at once; behind ``begin`` it
is a KeyboardInterrupt, whichever of the two signals it was, and all that follow are ignored: a launcher ends its ranks by
SIGTERM that have had the terminal's SIGINT already. Imports nothing of this package.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
WHILE_STARTING = "ds_zoadamu: interrupted while it started; the same command begins anew"
_UNTIL_AGAIN = 0.05  # seconds
_begun = False
_got = signal.SIGINT


def arm() -> None:
    """From now on SIGINT and SIGTERM end this process in order; that of a rank ends when its launcher has ended."""
    launched = "LOCAL_RANK" in os.environ
    for number in _SIGNALS:
        if launched or signal.getsignal(number) != signal.SIG_IGN:  # in the background of a script it is ignored
            signal.signal(number, _on_signal)
    if launched:
        end_with_parent(signal.SIGKILL)  # also one that waits in a collective of a GPU; no step is lost by it


def begin() -> None:
    """From now on a signal is a KeyboardInterrupt."""
    global _begun
    _begun = True


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when the one that has started it ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def status() -> int:
    """The exit status of a process that was interrupted, as a shell counts it."""
    return 128 + _got


def is_interrupt(error: BaseException) -> bool:
    """Whether it is this rank that was interrupted, or another one whose last words it has."""
    return isinstance(error, KeyboardInterrupt) or str(error).endswith(f": {KeyboardInterrupt.__name__}")


def say(line: str) -> None:
    """Print to stderr on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _on_signal(number: int, frame: object) -> None:
    global _got
    _got = signal.Signals(number)
    if not _begun:
        say(WHILE_STARTING)
        os._exit(status())
    launched = "LOCAL_RANK" in os.environ
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN if launched else signal.SIG_DFL)  # who presses twice does not want to wait
    sys.excepthook = _lost
    sys.unraisablehook = lambda lost: _lost(lost.exc_type, lost.exc_value, lost.exc_traceback)
    raise KeyboardInterrupt


def _lost(kind: type[BaseException], error: BaseException | None, trace: object) -> None:
    """C code that has called Python prints what is raised there, and goes on: an interrupt is raised again a little later."""
    if issubclass(kind, OSError) and "ignored due to race condition" in str(error):  # says Python of a second signal
        return
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    signal.signal(signal.SIGALRM, _again)
    signal.setitimer(signal.ITIMER_REAL, _UNTIL_AGAIN)


def _again(number: int, frame: object) -> None:
    raise KeyboardInterrupt
