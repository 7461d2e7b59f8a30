"""Peak memory of this process, resident and on the accelerator."""

import re
from contextlib import suppress
from pathlib import Path

from deepspeed.accelerator import get_accelerator


class PeakMemory:
    """Bytes of memory that this process took since the object was made.

    Resident memory is the kernel's count (VmRSS, VmHWM); its high-water mark is reset at the start where the kernel
    allows it, else the peak includes what came before.
    """

    def __init__(self):
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # "5" resets the high-water mark, see proc(5)
        self._baseline = _status_bytes("VmRSS")
        self._accelerator = get_accelerator() if get_accelerator().device_name() != "cpu" else None
        if self._accelerator is not None:
            self._accelerator.reset_peak_memory_stats()

    def report(self) -> dict[str, int]:
        """resident_baseline, resident_peak, resident_growth and, on an accelerator, accelerator_peak; bytes."""
        peak = _status_bytes("VmHWM")
        numbers = {"resident_baseline": self._baseline, "resident_peak": peak, "resident_growth": peak - self._baseline}
        if self._accelerator is not None:
            numbers["accelerator_peak"] = self._accelerator.max_memory_allocated()
        return numbers


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0
