"""What is known of a step and of a run beside the partitions: plain values, the same on all ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step of training, the same on all ranks.

    ``loss`` is the mean of ``loss_plus`` and ``loss_minus``, ``projected_grads`` their difference over 2 zo_eps; with several
    perturbations a step the losses are means over them, and ``projected_grads`` has one entry each. ``lrs``: one a parameter
    group. ``figures``: what the rule logs, by name (ZO-AdaMU: alpha, beta1, beta2, effective_zo_eps).
    """

    step: int
    loss: float
    loss_plus: float
    loss_minus: float
    projected_grads: tuple[float, ...]
    lrs: tuple[float, ...]
    skipped: bool
    figures: dict[str, float]

    def line(self) -> str:
        """As steps_per_print prints it."""
        grads = ",".join(f"{grad:.6g}" for grad in self.projected_grads)
        figures = " ".join(f"{name}={value:.4g}" for name, value in self.figures.items())
        return f"step={self.step} loss={self.loss:.6g} projected_grad={grads} lr={self.lrs[0]:.4g} {figures}"

    def monitored(self) -> Iterator[tuple[str, float]]:
        """(name, value) for DeepSpeed's monitor."""
        yield "train_loss", self.loss
        for index, grad in enumerate(self.projected_grads):
            yield f"projected_grad_{index}" if index else "projected_grad", grad
        yield from self.figures.items()


@dataclass(frozen=True)
class RunState:
    """Where a run is, without partitions: what a checkpoint holds of it, and what a resume works out from a journal.

    ``step``, ``global_steps``, ``global_samples``, ``skipped_steps``: counts; ``skipped_in_a_row``: the last steps' losses that
    were not finite; ``rule_scalars``: what the rule carries on the host; ``lrs``: one a parameter group; ``lr_scheduler``: its
    ``state_dict()``, or None to leave it alone; ``data_position``: (epoch, micro-batches of all ranks within it), or None where
    the user deals out the data.
    """

    step: int
    global_steps: int
    global_samples: int
    skipped_steps: int
    skipped_in_a_row: int
    rule_scalars: tuple[float, ...]
    lrs: tuple[float, ...]
    lr_scheduler: Any
    data_position: tuple[int, int] | None
