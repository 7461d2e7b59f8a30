"""How a run ended, as its folder tells."""

import json
from dataclasses import dataclass
from pathlib import Path

from ds_zoadamu.training.output import METRICS, PROFILE, RESULTS

OUTCOME, LOG, EVALUATION = "outcome.json", "log.txt", "evaluation.json"
FINISHED, OUT_OF_MEMORY, DIVERGED = "finished", "out of memory", "diverged"
FAILED, REFUSED = "failed", "refused"
"""What the next command tries again. Refused: with one line, before anything was done."""
_REFUSED_STATUS = 2
# What PyTorch on CPU and on GPU, Python, and the launcher of a rank that the kernel killed say.
_MEMORY_SIGNS = ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError")


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "finished", "out of memory", "diverged", "refused" or "failed".
        reason: the last words of a run that did not finish.
        results: of results.json, profile.json or evaluation.json; empty without one.
        metrics: lines of metrics.jsonl.
    """

    status: str
    reason: str
    commit: str
    results: dict
    metrics: list[dict]


def read_outcome(folder: Path) -> Outcome | None:
    """Of the run in a folder; None where it has not ended."""
    if not (folder / OUTCOME).exists():
        return None
    about, out = json.loads((folder / OUTCOME).read_text()), folder / "out"
    found = next((out / name for name in (RESULTS, PROFILE, EVALUATION) if (out / name).exists()), None)
    metrics = (out / METRICS).read_text().splitlines() if (out / METRICS).exists() else []
    return Outcome(
        status=about["status"],
        reason=about["reason"],
        commit=about["commit"],
        results=json.loads(found.read_text()) if found else {},
        metrics=[json.loads(line) for line in metrics],
    )


def judge(status_code: int, log: str, folder: Path) -> tuple[str, str]:
    """(status, reason) of a run that has ended, from its exit status, what it printed, and its results."""
    if status_code == 0:
        results = folder / "out" / RESULTS
        losses = json.loads(results.read_text())["loss"] if results.exists() else {}
        for name, step in (("test_last", "last"), ("test_after", "best")):
            if losses.get(name, 0.0) is None:  # JSON has no NaN: a loss that is not finite was written as null
                return DIVERGED, f"the loss at the {step} step is not finite"
        return FINISHED, ""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for status, signs in ((DIVERGED, ("NonFiniteLossError",)), (OUT_OF_MEMORY, _MEMORY_SIGNS)):
        if telling := [line for line in lines if any(sign in line for sign in signs)]:
            return status, telling[-1]
    telling = [line for line in lines if "rror" in line] or lines or [f"exit status {status_code}"]
    return REFUSED if status_code == _REFUSED_STATUS else FAILED, telling[0]
