"""The model card of a trainer's run: what the Trainer writes, with what is known of the run beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..distributed import collective
from ..durability.digest import weights_digest
from ..durability.published import CARD, JOURNAL
from ..files.safetensors_io import write_durably
from ..hub import card
from ..zero3.memory import stored_bytes
from ..zero3.peak_memory import PeakMemory
from .kinds import pipeline_of


class RunCard:
    """What of a run goes into its card; nothing before ``begin``. ``journal``: its path, or None."""

    def __init__(self, journal: Path | None):
        self._journal, self._run = journal, None
        self._memory: PeakMemory | None = None
        self._peak: dict[str, int] = {}

    def begin(self) -> None:
        """Training begins: peak memory counts from here on."""
        self._memory, self._run = PeakMemory(), None

    def end(self) -> None:
        """Training ends: so much memory it took."""
        self._peak = self._memory.report()

    def note(self, engine: Any, model: Any) -> None:
        """Take down what the weights are that are now to be saved. On all ranks."""
        if not self._peak or engine is None:
            return
        digest = weights_digest(engine)
        ranks = collective.gather_json({**self._peak, **stored_bytes(engine)})
        adapters = getattr(model, "peft_config", None)
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
        self._run = card.Run(
            journal=self._journal.read_bytes() if self._journal is not None and self._journal.exists() else None,
            step=engine.optimizer.step_count,
            weights_sha256=digest,
            memory=ranks,
            settings={"ranks": collective.world_size()},
            base_model=card.hub_name(base),
            adapters=adapters is not None,
            pipeline=pipeline_of(model.get_base_model() if adapters is not None else model),
        )

    def complete(self, folder: Path, repo: str | None) -> None:
        """Add what was noted to the card that a trainer has written into a folder. On one rank. Raises OSError."""
        if self._run is not None:
            text = (folder / CARD).read_text(encoding="utf-8")
            write_durably(folder / CARD, card.with_run(text, self._run, repo).encode())

    def write(self, folder: Path, logs: Sequence[dict[str, Any]]) -> None:
        """A card in a folder with the model, and the journal, unless there is one that a user has written. On one rank. Raises
        OSError.
        """
        if self._run is None:
            return
        path = folder / CARD
        if path.exists() and not card.is_ours(path.read_text(encoding="utf-8")):
            return
        text = card.new_card(self._run, folder.absolute().name, _scores(logs))
        write_durably(path, text.encode())
        if self._run.journal is not None and folder.absolute() / JOURNAL != self._journal:
            write_durably(folder / JOURNAL, self._run.journal)


def _scores(logs: Sequence[dict[str, Any]]) -> list[card.Score]:
    """The metrics of the last evaluation, beside those of the first."""
    evaluations = [log for log in logs if "eval_loss" in log]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    names = [n for n in last if n.startswith("eval_") and not n.endswith(("_runtime", "_per_second", "_time"))]
    before = first if len(evaluations) > 1 and first.get("step") == 0 else {}
    return [card.Score(n.removeprefix("eval_"), last[n], before.get(n), split="evaluation") for n in names]
