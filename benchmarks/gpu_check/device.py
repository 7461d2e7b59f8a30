"""The GPU under test, or the CPU that stands for it in a dry run."""

import subprocess
import time
from collections.abc import Callable


class Failed(Exception):
    """A section did not do what it is for; the message becomes its row."""


class Device:
    """Clock, memory and name of the GPU."""

    name = "cuda"
    dry = False

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        self.properties = torch.cuda.get_device_properties(0)
        self.title = torch.cuda.get_device_name(0)
        self.capability = 10 * self.properties.major + self.properties.minor

    def seconds(self, function: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
        """Device time of each of ``repeats`` calls, by events."""
        for _ in range(warm_up):
            function()
        pairs = []
        for _ in range(repeats):
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            pairs.append((begin, end))
        self.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def synchronize(self) -> None:
        self.cuda.synchronize()

    def total_bytes(self) -> int:
        return self.properties.total_memory

    def peak_bytes(self, reset: bool = False) -> int:
        if reset:
            self.cuda.reset_peak_memory_stats()
        return self.cuda.max_memory_allocated()

    def cycles_per_second(self) -> float:
        """Of all multiprocessors together, at the highest clock."""
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
        mhz = float(subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0])
        return self.properties.multi_processor_count * mhz * 1e6


class DryDevice(Device):
    """The CPU in the GPU's place."""

    name = "cpu"
    dry = True
    title, capability = "dry run on the CPU: no figure means anything", 90

    def __init__(self):
        pass

    def seconds(self, function: Callable[[], object], repeats: int, warm_up: int = 2) -> list[float]:
        samples = []
        for _ in range(repeats):
            begin = time.perf_counter()
            function()
            samples.append(time.perf_counter() - begin)
        return samples

    def synchronize(self) -> None:
        pass

    def total_bytes(self) -> int:
        return 10**9

    def peak_bytes(self, reset: bool = False) -> int:
        return 0

    def cycles_per_second(self) -> float:
        return 1e12
