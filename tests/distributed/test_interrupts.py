"""Ctrl-C and killed launchers, with real signals: one line, how to go on, and no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.harness import HANG, free_port, still_running
from tests.helpers.tiny_lm import save_model, write_data

pytestmark = pytest.mark.ranks

CONFIG = {
    "optimizer": {"type": "MeZO", "params": {"lr": 1e-6}},
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": 2,
}
# Without a GPU nobody names the accelerator either, as at a user's: DeepSpeed's launcher would say that it found none.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
_ENVIRONMENT |= {"DS_ACCELERATOR": "cpu"} if Path("/dev/nvidiactl").exists() else {}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    save_model(folder / "model")
    write_data(folder / "data")
    (folder / "ds.json").write_text(json.dumps(CONFIG))
    words = ["--model_name_or_path", folder / "model", "--data_dir", folder / "data", "--deepspeed_config", folder / "ds.json"]
    return [*map(str, words), "--num_train", "20", "--num_dev", "4", "--num_test", "4", "--max_steps", "1000000"]


class Run:
    """``ds_zoadamu finetune`` in a process group of its own, with everything that it has started."""

    def __init__(self, words, folder, *launcher):
        self.journal = folder / "out" / "journal.jsonl"
        self._files = [open(folder / name, "w+") for name in ("stdout", "stderr")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ds_zoadamu.cli", "finetune", *launcher, *words, "--output_dir", str(folder / "out")],
            stdout=self._files[0], stderr=self._files[1], start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
            env={**_ENVIRONMENT, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.processes = []

    def wait_for_steps(self, count=4):
        deadline = time.monotonic() + HANG
        while not self.journal.exists() or self.journal.read_bytes().count(b"\n") < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.stderr
            time.sleep(0.05)
        me = psutil.Process(self.process.pid)
        self.processes = [me, *me.children(recursive=True)]

    def end(self) -> int:
        status = self.process.wait(HANG)
        assert still_running(self.processes) == []
        return status

    @property
    def stderr(self):
        """Without the lines that say how far the run has come."""
        self._files[1].seek(0)
        return [line for line in self._files[1].read().splitlines() if " so far" not in line]

    @property
    def stdout(self):
        self._files[0].seek(0)
        return self._files[0].read()

    def go_on(self):
        return [
            f"ds_zoadamu finetune: interrupted; {self.journal} has every step that was taken, and the same command with "
            "--resume goes on behind them"
        ]


def test_ctrl_c_alone(words, tmp_path):
    run = Run(words, tmp_path)
    run.wait_for_steps()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130 and run.stderr == run.go_on()


@pytest.mark.parametrize("whom", ["the terminal's whole group", "the command alone", "kill -9 of the launcher"])
def test_two_ranks(words, tmp_path, whom):
    run = Run(words, tmp_path, "--num_gpus", "2", "--master_port", str(free_port()))
    run.wait_for_steps()
    command, launcher, *ranks = run.processes
    assert len(ranks) == 2
    if whom == "kill -9 of the launcher":
        launcher.kill()
        assert run.end() == 128 + signal.SIGKILL
        (line,) = run.stderr
        assert line.startswith("ds_zoadamu: a process of the run was ended by signal 9 (SIGKILL)")
        return
    if whom == "the command alone":
        command.send_signal(signal.SIGINT)
    else:
        os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130 and run.stderr == run.go_on()
    assert not any(words in run.stdout for words in ("[INFO]", "[WARNING]", "return code"))  # of the launcher


def test_ctrl_c_while_it_starts(words, tmp_path):
    run = Run(words, tmp_path)
    deadline = time.monotonic() + HANG
    while not _catches(run.process.pid):
        assert run.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert run.stderr == ["ds_zoadamu: interrupted while it started; the same command begins anew"]


def _catches(pid: int) -> bool:
    """Whether a process has a handler of SIGTERM, which Python itself has not."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:")).split()[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


LOST = """
import os, signal, sys, time
from ds_zoadamu.distributed import interrupts

class Loses:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

interrupts.arm()
interrupts.begin()
try:
    Loses()
    time.sleep(60)
except KeyboardInterrupt as error:
    interrupts.say(f"caught {interrupts.status()}")
"""


def test_an_interrupt_that_c_code_loses_comes_again():
    """A destructor cannot raise: what Python prints of it is left out."""
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, timeout=HANG)
    assert (done.stderr, done.returncode) == ("caught 143\n", 0)
