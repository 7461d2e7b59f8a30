"""How a process ends: with which status, what has its turn before, and that no thread of gloo is caught by it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# The last exit handler leaves a worker of gloo as a busy machine now and then does: the collective is reported as done, the
# worker still holds its tensor, and waits for the GIL in order to let go.
STRANDED = """
import atexit, ctypes, os, sys, time
import torch.distributed as dist
import torch
from ds_zoadamu import ending

class Tensor:
    def __init__(self, getrefcount=sys.getrefcount):
        self.tensor, self.getrefcount = torch.ones(1), getrefcount
        self.count = getrefcount(self.tensor)

    def is_held(self):  # by C++, beside Python
        return self.getrefcount(self.tensor) > self.count

    def __del__(self, sleep=time.sleep):  # when the interpreter goes
        if self.is_held():
            sleep(60)  # a busy machine is slow to wake the worker; when it does, this process is over

tensor = Tensor()
libc = ctypes.PyDLL(None)  # its functions keep the GIL
status = ctypes.create_string_buffer(4096)

def asleep(threads):
    for thread in threads:
        file = libc.open(b"/proc/self/task/%s/status" % thread.encode(), os.O_RDONLY)
        count = libc.read(file, status, len(status))
        libc.close(file)
        if b"State:\\tS" not in status.raw[:count]:
            return False
    return True

def strand():
    workers = list(ending._gloo_workers())
    sys.setswitchinterval(1e6)  # who has the GIL keeps it until it lets go by itself
    for _ in range(100_000):
        dist.all_reduce(tensor.tensor)
        if tensor.is_held():
            break
    else:
        os._exit(77)
    looks = 0
    while looks < 3:
        libc.usleep(20_000)
        looks = looks + 1 if asleep(workers) else 0
    print("stranded" if tensor.is_held() else "released")

def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return 3

if sys.argv[1] == "as a script that waits":
    ending.rest_at_exit()
atexit.register(strand)
if sys.argv[1] == "as a command":
    ending.run_command(main)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def stranded():
    """The processes in which a worker is stranded, by the way in which they end; all started at once."""
    ways = ("as ever", "as a command", "as a script that waits")
    processes = {
        way: subprocess.Popen(
            [sys.executable, "-c", STRANDED, way], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for way in ways
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def outcome(process):
    """(status, stdout, stderr) of a process with a stranded worker."""
    stdout, stderr = process.communicate(timeout=240)
    if process.returncode == 77:
        pytest.skip("with this PyTorch gloo's threads let go of a collective's tensors before it is reported as done")
    return process.returncode, stdout, stderr


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="CPython 3.14 stops the thread instead of unwinding it")
def test_a_worker_of_gloo_that_waits_for_the_gil_kills_a_process_that_ends_as_ever(stranded):
    status, _, stderr = outcome(stranded["as ever"])
    assert (status, "terminate called without an active exception" in stderr) == (-signal.SIGABRT, True), stderr


@pytest.mark.parametrize("way", ["as a command", "as a script that waits"])
def test_and_none_that_ends_our_way(stranded, way):
    assert outcome(stranded[way]) == (3, "stranded\n", "")


ENDS = {  # what main does: (exit status, the last line on stderr)
    "pass": (0, ""),
    "return 0": (0, ""),
    "return 2": (2, ""),
    "sys.exit()": (0, ""),
    "sys.exit(3)": (3, ""),
    "sys.exit('no such model')": (1, "no such model"),
    "raise ValueError('too small')": (1, "ValueError: too small"),
    "raise KeyboardInterrupt": (130, "KeyboardInterrupt"),
    "atexit.register(lambda: 1 / 0)": (0, "ZeroDivisionError: division by zero"),
}
COMMAND = """
import atexit, ctypes, importlib.util, sys, threading

spec = importlib.util.spec_from_file_location("ending", "ds_zoadamu/ending.py")  # without PyTorch: in a tenth of the time
ending = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ending)

def thread():
    threading.main_thread().join()
    print("a thread that others wait for")

def main():
    atexit.register(print, "an exit handler")
    threading.Thread(target=thread).start()
    print("main")
    {action}

class Last:
    def __del__(self, write=print):
        write("finalised")

last = Last()
ending.run_command(main)
"""


def run(action, stdout=subprocess.PIPE):
    code = COMMAND.replace("{action}", action)
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("action", ENDS)
def test_status_output_threads_and_exit_handlers_of_a_command(action):
    process = run(action)
    last = process.stderr.splitlines()[-1] if process.stderr else ""
    assert (process.returncode, last) == ENDS[action]
    # Nothing here is flushed but by the end, and what only the interpreter's going would print is not there.
    assert process.stdout.splitlines() == ["main", "a thread that others wait for", "an exit handler"]


def test_output_that_cannot_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        process = run("pass", stdout=full)
    assert process.returncode == 1 and "No space left on device" in process.stderr
