"""Whose a folder of checkpoints is: one run's, and one engine's at a time.

Two marks tell a run's checkpoints from another's: the manifest's ``run_id``, which a run keeps when it is loaded or resumed,
and, where both have a journal, the journal's checksum at the checkpoint's step: runs of the same settings differ there as soon
as a loss does. Checkpoints with neither, of earlier versions, are nobody's: they are loaded as ever, never removed, and do not
keep a run away.
"""

import uuid
from pathlib import Path

from ..errors import CheckpointError
from ..files.locks import LockedFile
from .checkpoint_store import LOCK, Found, find_all
from .journal import Journal


class CheckpointOwner:
    """An engine's part, on rank 0: the run it is of, and its locks on the folders it has saved to, held until ``release``."""

    def __init__(self) -> None:
        self.run_id: str | None = None
        self.journal: Journal | None = None
        """While it is open."""
        self._locks: dict[Path, LockedFile] = {}

    def hold_journal(self, journal: Journal | None) -> None:
        """The run has this journal now, or none any more."""
        self.journal = journal
        if journal is not None and self.run_id is None:
            self.run_id = journal.checksum_at(0)

    def go_on(self, manifest: dict) -> None:
        """The engine goes on with the run of a checkpoint."""
        self.release()
        self.run_id = manifest.get("run_id")

    def owns(self, found: Found) -> bool | None:
        """Whether a checkpoint is of this run; None where that cannot be known."""
        checksum = found.manifest["journal_checksum"]
        if self.journal is not None and checksum is not None:
            return self.journal.checksum_at(found.step) == checksum
        run_id = found.manifest.get("run_id")
        return None if run_id is None else run_id == self.run_id

    def claim(self, directory: Path) -> None:
        """Make a folder if there is none, and keep every other writer away from it. ``directory`` has no links in it.

        Raises OSError, or CheckpointError for a folder that another writer has or that holds another run's checkpoints.
        """
        if self.run_id is None:
            self.run_id = uuid.uuid4().hex[:16]
        for path, lock in list(self._locks.items()):
            if not lock.is_at_its_place():  # the folder was removed
                self._locks.pop(path).release()
        if directory in self._locks:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._locks[directory] = self._lock(directory)
        try:
            self._check_owned(directory)
        except BaseException:
            self._locks.pop(directory).release()
            raise

    def _check_owned(self, directory: Path) -> None:
        for found in find_all(directory):
            if self.owns(found) is False:
                raise CheckpointError(
                    f"checkpoint folder {str(directory)!r} holds checkpoint {found.tag!r} (step {found.step}) of another run; "
                    "give this run a folder of its own, or load that checkpoint or resume its journal to go on with that run"
                )

    @staticmethod
    def _lock(directory: Path) -> LockedFile:
        try:
            lock = LockedFile(directory / LOCK)
            if lock.is_at_its_place():
                return lock
        except BlockingIOError:
            pass
        raise CheckpointError(
            f"checkpoint folder {str(directory)!r} is being written by another run or engine; give each run a folder of its "
            "own, or end the other one first (an engine of this process: engine.destroy())"
        )

    def release(self) -> None:
        """Give up all folders."""
        while self._locks:
            self._locks.popitem()[1].release()
