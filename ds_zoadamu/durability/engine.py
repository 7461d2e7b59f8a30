"""The engine that users get: what makes a run survive, journal, checkpoints and resume, as its methods."""

import logging
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..distributed import collective
from ..errors import CheckpointError, JournalError
from ..zero3.engine import ForwardOnlyEngine
from ..zero3.records import StepRecord
from . import checkpoint
from . import resume as resuming
from .checkpoint_owner import CheckpointOwner
from .checkpoint_store import Found
from .journal import Journal, Record
from .resume import Resumed


class ZerothOrderEngine(ForwardOnlyEngine):
    """A ForwardOnlyEngine whose runs are journaled, checkpointed and resumed. For an optimizer that is not zeroth-order the
    methods are DeepSpeed's own."""

    data_source: Any = None
    """The user's data iterator, where it has ``state_dict`` and ``load_state_dict``: noted by ``train_batch``, saved in
    checkpoints."""
    frozen_sha256s: dict[str, str] | None = None
    """SHA-256 of each frozen parameter, once ``digest.frozen_digests`` has worked them out."""
    _journal: Journal | None = None  # on rank 0
    journaling = False
    """Whether steps are recorded; on all ranks."""
    _weight_decays: tuple[float, ...] = ()
    loaded_checkpoint: Found | None = None
    """The checkpoint that the run goes on from."""

    @cached_property
    def _due(self) -> deque[Record]:
        """Records of an attached journal whose steps have not been taken yet."""
        return deque()

    @cached_property
    def _owner(self) -> CheckpointOwner:
        """Whose checkpoints this engine saves; on rank 0 it has locks."""
        return CheckpointOwner()

    def open_journal(
        self, path: str | Path, *, base: str | Path | bool | None = None, fsync_every: int = 1, task: dict | None = None
    ) -> None:
        """Write a record of every step to ``path`` from now on, before the step changes a partition. Call it on all ranks
        before step 1.

        Args: ``path``: of the new journal; ``base``: folder or hub name of the model the run starts from, whose files are
        hashed once (default: where the model says it was loaded from; False: it is in no files, and the run can be resumed, not
        replayed); ``fsync_every``: the journal is made durable every so many steps. With 1 not even a power failure loses a
        step; with more it may lose the last few, which are then taken again. A killed process loses none. ``task``: what else
        makes the run this run and the engine cannot see, names to strings or integers, such as {"data_sha256": ...}; the same
        on all ranks, and a resume must give the same.

        Raises JournalError on all ranks where the file exists, is being written by another run, or cannot be written;
        ReplayError where the run could not be rebuilt from the base: a parameter is not in its files, or in another shape.
        """
        self._require_zeroth_order("open_journal")
        with collective.together("open_journal"):
            self._hold_journal(resuming.start_journal(self, path, base, fsync_every, task))

    def resume(
        self,
        path: str | Path,
        checkpoint_dir: str | Path | None = None,
        *,
        base: str | Path | None = None,
        fsync_every: int = 1,
        data: Any = None,
        task: dict | None = None,
    ) -> Resumed:
        """Go on with the run of a journal, on any number of ranks: bit for bit as if it had not stopped. Call it on all ranks,
        on a new engine.

        Loads the newest whole checkpoint in ``checkpoint_dir``, if there is one, and applies the journal's later records
        without forward passes; without a checkpoint the engine must hold the weights the run started with. ``training_data`` of
        ``initialize`` goes on at the right place by itself. Ranks x gradient_accumulation_steps must be as it was.

        Args: ``path``, ``base``, ``fsync_every``, ``task``: as for ``open_journal``; ``data``: the user's own iterator at its
        beginning, which is moved to its place: by ``load_state_dict``, where the checkpoint has a state of it, and by drawing
        what the later steps have consumed.

        Raises JournalError, CheckpointError or ReplayError on all ranks where the journal is damaged or of another run. Nothing
        on the disk is changed then.
        """
        self._require_zeroth_order("resume")
        with collective.together("resume"):
            resumed, journal = resuming.resume(self, path, checkpoint_dir, base, fsync_every, data, task, self._owner)
            self._hold_journal(journal)
        return resumed

    def attach_journal(
        self, path: str | Path, *, base: str | Path | None = None, fsync_every: int = 1, task: dict | None = None
    ) -> int:
        """Go on with a journal on an engine that has loaded a checkpoint of its run, or that holds the weights the run began
        with. Call it on all ranks.

        Later records are not applied now: as many calls of ``train_batch`` take their steps from the journal in place of
        forward passes, so that whoever deals out data and counts steps stays in step. Returns how many there are; ``resume``
        applies them at once. Args and errors as for ``resume``.
        """
        self._require_zeroth_order("attach_journal")
        with collective.together("attach_journal"):
            records, journal = resuming.attach_journal(self, path, base, fsync_every, task)
            self._due = deque(records)
            self._hold_journal(journal)
        return len(records)

    def skip_to(self, step: int) -> None:
        """Count the steps up to ``step`` as taken without taking them, to measure a step in the middle of a schedule. On all
        ranks. An open journal goes on from there, and nothing can be rebuilt from it.
        """
        self.optimizer.step_count = step
        if self._journal is not None:
            self._journal.last_step = step

    def close_journal(self) -> None:
        """Make the journal durable and give up its lock; later steps are not recorded. On all ranks."""
        self._due.clear()
        journal, self._journal, self.journaling = self._journal, None, False
        self._owner.hold_journal(None)
        if journal is not None:
            journal.close()

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        *,
        save_total_limit: int | None = None,
    ) -> bool:
        """Save partitions, momentum, step, scheduler, counters and data position as ``save_dir/tag``, whole or not at all. On
        all ranks. ``save_dir`` then belongs to this run, and until ``destroy`` to this engine: no other may save there.

        Args: as for DeepSpeed's engine, and ``save_total_limit``: the most checkpoints of this run to keep in ``save_dir``, the
        oldest steps go. ``tag`` defaults to "global_step<N>"; ``client_state`` holds numbers, strings, bytes, small tensors,
        and lists, tuples, sets and dicts of them, and is loaded as it was saved. Frozen parameters are never stored.

        Raises CheckpointError on all ranks, for instance for a full disk or another run's folder; every earlier checkpoint is
        as it was. Returns True.
        """
        if not self._is_zeroth_order:
            return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        with collective.together("save_checkpoint"):
            with collective.on_all_ranks(JournalError):
                if self._journal is not None:
                    try:
                        self._journal.sync()  # a checkpoint must not know of steps that the journal may still lose
                    except OSError as e:
                        raise JournalError(f"journal {str(self._journal.path)!r} cannot be made durable: {e.strerror}") from e
            checkpoint.save(
                self,
                save_dir,
                tag,
                client_state or {},
                save_latest=save_latest,
                save_total_limit=save_total_limit,
                owner=self._owner,
            )
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> tuple[str | None, dict | None]:
        """Load a checkpoint of ``save_checkpoint``, saved on any number of ranks. On all ranks.

        Args: as for DeepSpeed's engine; without ``load_optimizer_states``, or with ``load_module_only``, the weights alone are
        loaded and the run begins anew. Returns (folder, client_state), or (None, None) where ``tag`` is None and there is no
        file ``latest``.

        Raises CheckpointError on all ranks for a missing, shortened or damaged file, another model, dtype or momentum mode, or
        other options; nothing has been changed then. An open journal is closed once the weights are loaded, and says so: a run
        goes back to its best step when it is over. To go on with a run use ``resume``, which keeps the two together.
        """
        if not self._is_zeroth_order:
            return super().load_checkpoint(
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        if custom_load_fn is not None:
            raise ValueError("custom_load_fn is not supported: partitions are loaded by name and range")
        weights_only = load_module_only or not load_optimizer_states
        with collective.together("load_checkpoint"):
            found = checkpoint.find_latest(load_dir, tag)
            if found is None:
                return None, None
            with collective.on_all_ranks(CheckpointError):
                client_state, data_state = checkpoint.client_state_of(found), checkpoint.data_state_of(found)
            checkpoint.load(self, found, weights_only=weights_only, with_lr_scheduler=load_lr_scheduler_states)
            self._close_after(found)
            if not weights_only:
                self._owner.go_on(found.manifest)
                self.loaded_checkpoint = found
            with collective.on_all_ranks(CheckpointError):
                if not weights_only and data_state is not None and self.data_source is not None:
                    self.data_source.load_state_dict(data_state)
        if not weights_only and data_state is not None and self.data_source is None:
            checkpoint.log_on_rank_0(
                logging.WARNING,
                f"checkpoint {str(found.path)!r} holds the state of a data iterator, and this engine has seen none: it begins "
                "anew. Set engine.data_source = ITERATOR before loading, or use engine.resume(..., data=ITERATOR)",
            )
        return str(found.path), client_state

    def _close_after(self, found: Found) -> None:
        """The weights are those of another step than the journal's last: it ends there."""
        if not self.journaling:
            return
        last = self.state().step if self._journal is None else self._journal.last_step
        self.close_journal()
        checkpoint.log_on_rank_0(
            logging.INFO,
            f"the journal is closed behind step {last}: checkpoint {str(found.path)!r} of step {found.step} was loaded. Later "
            "steps are not recorded",
        )

    # --- called by train_batch ------------------------------------------------------------------------------------------------

    def recorded_step(self) -> StepRecord | None:
        """The next step as an attached journal has it."""
        if not self._due:
            return None
        resuming.set_lrs(self, self._due[0])
        return resuming.step_record(self, self._due[0])

    def before_update(self, record: StepRecord, batch: Any, micro_batches: Sequence[Any]) -> None:
        """Write the record, or end on all ranks."""
        super().before_update(record, batch, micro_batches)
        if self._due:  # it is of the journal
            self._due.popleft()
            return
        if hasattr(batch, "state_dict") and hasattr(batch, "load_state_dict"):
            self.data_source = batch
        if not self.journaling:
            return
        # One more message a step, so that no rank changes its partitions for a step that is not in the journal.
        with collective.on_all_ranks(JournalError):
            if self._journal is not None:
                self._journal.append(self._journal_record(record))

    def _journal_record(self, record: StepRecord) -> Record:
        groups = self.optimizer.param_groups
        if tuple(group["weight_decay"] for group in groups) != self._weight_decays:
            raise JournalError(
                f"step {record.step}: weight_decay of a parameter group was changed; the journal's header fixes it for the run"
            )
        return Record(
            step=record.step,
            loss_plus=record.loss_plus,
            loss_minus=record.loss_minus,
            projected_grads=record.projected_grads,
            lrs=record.lrs,
            skipped=record.skipped,
            data_position=None if self.own_data is None else self.own_data.position,
        )

    def _hold_journal(self, journal: Journal | None) -> None:
        self._journal, self.journaling = journal, True
        self._owner.hold_journal(journal)
        self._weight_decays = tuple(group["weight_decay"] for group in self.optimizer.param_groups)

    def destroy(self) -> None:
        """DeepSpeed's, and the journal and the folders of checkpoints are given up."""
        self.close_journal()
        self._owner.release()
        super().destroy()

    def __del__(self) -> None:
        """An engine that nobody has any more gives up journal and folders; its model goes on as it is."""
        if self.__dict__.get("module") is None or not self._is_zeroth_order:
            super().__del__()
            return
        self.close_journal()
        self._owner.release()
