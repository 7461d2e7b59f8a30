"""How a process ends that has run collectives.

gloo reports a collective as done before its worker thread has let go of the collective's tensors, for which it takes the GIL.
Where the interpreter begins to go while the thread waits for the GIL, CPython before 3.14 ends the thread by unwinding it
through a destructor that must not throw: "terminate called without an active exception", SIGABRT, after all work was done.
(From 3.14 on the thread stops for ever, holding a lock.) ``destroy_process_group`` does not help: the threads end with the
group, and each parameter of ZeRO-3 refers to it.

A command never lets its interpreter go: ``run_command``. In a script of a user's own, which ends as any Python does, an exit
handler waits until these threads are at rest: ``rest_at_exit``.
"""

import atexit
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from . import interrupts

_GLOO_WORKER = "pt_gloo_runloop"  # torch's name of the threads that run a gloo group's collectives
_LONGEST_WAIT = 30.0  # seconds; a thread that is not at rest by then is left to its luck
_BETWEEN_LOOKS = 0.02  # seconds; several times the 5 ms after which a thread that waits for the GIL wakes up


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` as the last thing that this process does. Its result is the exit status; None: 0.

    SystemExit and other exceptions end the process as they would end Python: with SystemExit's code, or with a traceback and
    status 1; an interrupt with one line. Non-daemon threads, exit handlers and buffers of stdout and stderr have their turn.
    """
    status = _status_of(main)
    atexit.unregister(_rest)  # that is for an interpreter which goes
    for last in (threading._shutdown, atexit._run_exitfuncs, _flush):  # what the interpreter does first, in its order
        try:
            last()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = status or 1
    os._exit(status)


def _status_of(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupts.say("interrupted")
        return interrupts.status()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C and C++ have printed


@functools.cache
def rest_at_exit() -> None:
    """From the first call on, the interpreter does not go before gloo's threads are at rest. Needs Linux's /proc."""
    atexit.register(_rest)


def _rest() -> None:
    """Wait until every worker of gloo sleeps and has slept for a while in which nobody held the GIL.

    It then waits for work, or for a peer in a collective that has not ended (one that is dead must not be waited for).
    """
    before, end = {}, time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < end:
        workers = _gloo_workers()
        if workers == before and all(state == "S" for state, _ in workers.values()):
            return
        before = workers
        time.sleep(_BETWEEN_LOOKS)


def _gloo_workers() -> dict[str, tuple[str, str]]:
    """Of each worker thread of gloo in this process: its state ("S": asleep) and how often it has gone to sleep."""
    workers = {}
    with suppress(FileNotFoundError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{thread}/status") as file:
                fields = dict(line.split(":", 1) for line in file)
                if fields["Name"].strip() == _GLOO_WORKER:
                    workers[thread] = (fields["State"].split()[0], fields["voluntary_ctxt_switches"].strip())
    return workers
