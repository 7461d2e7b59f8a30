"""The journal of a trainer's run: opened when training begins, and where a run goes on."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..distributed import collective
from ..durability.published import ADAPTERS
from ..errors import JournalError, ReplayError
from .arguments import say
from .saving import save_for_trainer

NAME = "journal.jsonl"


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that the Trainer has written to its end; the same on all ranks."""
    numbered = []
    if collective.rank() == 0:
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdecimal() and _is_whole(folder):
                numbered.append((int(number), folder.name))
    found = collective.gather_json(max(numbered, default=None))[0]
    return None if found is None else Path(output_dir) / found[1]


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())  # the last file that the Trainer writes
    except (OSError, ValueError):
        return False
    return any(folder.glob("global_step*"))


class RunJournal(TrainerCallback):
    """Opens the journal of a run before its first step, or goes on with it behind the checkpoint that was loaded.

    Args: ``path``: of the journal, None: without one; ``task``: what makes the run this run, beside the engine's own.
    """

    def __init__(self, path: Path | None, task: dict[str, Any]):
        self.path, self.task = path, task
        self.resuming = False

    def exists(self) -> bool:
        return collective.gather_json(self.path is not None and self.path.exists())[0]

    def require_new(self) -> None:
        """Raises JournalError on all ranks where another run is in the journal's place."""
        if self.exists():
            raise collective.everywhere(
                JournalError(
                    f"journal {str(self.path)!r} exists: a run has written it. trainer.train(resume_from_checkpoint=True) goes "
                    "on with that run, also before its first checkpoint; or give this one another output_dir"
                )
            )

    def open(self, engine: Any, model: Any) -> None:
        """On all ranks, once the engine has the weights that training begins with."""
        if self.path is None:
            return
        adapters = self.path.parent / ADAPTERS if hasattr(model, "peft_config") else None
        if self.resuming and self.exists():
            due = engine.attach_journal(self.path, base=adapters, task=self.task)
            step = engine.optimizer.step_count
            say(
                f"resumed behind step {step}: {due} steps are taken from journal {str(self.path)!r} without forward passes",
                logging.WARNING,
            )
        elif engine.optimizer.step_count:
            say(f"there is no journal {str(self.path)!r} of the steps before: this run goes on without one")
        else:
            with collective.on_all_ranks(OSError):
                if collective.rank() == 0:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
            if adapters is not None:
                save_for_trainer(engine, model, adapters, [], None)
            try:
                engine.open_journal(self.path, base=adapters, task=self.task)
            except ReplayError as error:
                say(f"the run can be resumed from its journal, and not be rebuilt by ds_zoadamu replay: {error}")
                engine.open_journal(self.path, base=False, task=self.task)
