"""The order of the training data, dealt out by micro-batches: a pure function of the seed and the epoch, or that of a stream.

A position is (epoch, micro-batches of it over all ranks). It travels with each micro-batch that a loader hands out, so that the
position of a step is that of the micro-batches it has taken, however many more have been handed out ahead of it.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
import torch

from ..errors import ConfigError
from ..files.safetensors_io import raw_bytes

Position = tuple[int, int]


class _Epochs:
    """Which epoch an iteration goes through: each the next one, but the one of a restored position until a step has gone on
    from there. A look at the first batch must not cost the rest of an epoch."""

    def __init__(self) -> None:
        self.next = 0
        self._restored: Position | None = None

    def begin(self) -> Position:
        """The position at which an iteration that begins now does so."""
        epoch, first = self._restored or (self.next, 0)
        self.next = epoch + 1
        return epoch, first

    def choose(self, epoch: int) -> None:
        """Let the next iteration go through ``epoch``; from the restored position where that is its epoch."""
        if self._restored is None or epoch != self._restored[0]:
            self.next, self._restored = epoch, None

    def restore(self, position: Position) -> None:
        self.next, self._restored = position[0], position

    def leave(self) -> None:
        """The restored position has been gone on from."""
        self._restored = None


class MicroBatchSampler(torch.utils.data.Sampler[list[int]]):
    """Index lists of this rank's micro-batches, so that a step sees the same micro-batches on any number of ranks.

    An epoch is a permutation of the examples cut into micro-batches of ``micro_batch_size``. A step takes the next
    ``world_size * accumulation`` of them; the one numbered a * world_size + r inside the step is accumulation a of rank r.
    With world_size * accumulation constant the global order is therefore the same. What does not fill a whole step is left
    out of the epoch; the next epoch is permuted anew.

    Raises ConfigError where the data is smaller than one step.
    """

    def __init__(self, num_examples: int, micro_batch_size: int, accumulation: int, rank: int, world_size: int, seed: int):
        self.num_examples = num_examples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epochs = _Epochs()
        self.begun: Position = (0, 0)
        """Where the iteration that was begun last did so."""
        examples_a_step = micro_batch_size * accumulation * world_size
        self._micro_batches = num_examples // examples_a_step * accumulation * world_size
        if self._micro_batches == 0:
            raise ConfigError(
                f"training_data has {num_examples} examples, one step takes {examples_a_step} (train_micro_batch_size_per_gpu "
                f"{micro_batch_size} x gradient_accumulation_steps {accumulation} x {world_size} ranks); lower one of them"
            )

    def __len__(self) -> int:
        return self._micro_batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation that the next ``iter`` uses; each ``iter`` counts one up by itself."""
        self.epochs.choose(epoch)

    def restore(self, position: Position) -> Position:
        """Let the next ``iter`` go on behind a ``position``, of a run on any number of ranks with world_size * accumulation
        as here; returns it, as the beginning of the next epoch where it is the end of one.
        """
        epoch, consumed = position
        if self.ends_epoch(position):
            epoch, consumed = epoch + 1, 0
        self.epochs.restore((epoch, consumed))
        return epoch, consumed

    def ends_epoch(self, position: Position) -> bool:
        """Whether nothing of its epoch is left behind a position."""
        return position[1] >= self._micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = self.begun = self.epochs.begin()
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15 * (epoch + 1)) % 2**63)
        order = torch.randperm(self.num_examples, generator=generator)
        for begin in range(first, self._micro_batches, self.world_size):
            number = begin + self.rank
            yield order[number * self.micro_batch_size : (number + 1) * self.micro_batch_size].tolist()


@dataclass
class _Waiting:
    """A micro-batch that no step has taken yet; ``refs``: to its tensors, ``prints``: of what they held when it was handed
    out."""

    iteration: int
    position: Position
    refs: list[weakref.ref]
    prints: set[int]
    evaluated: bool = False

    def likeness(self, ids: set[int], prints: set[int]) -> int:
        """How many of its tensors a batch has, itself or as copies."""
        return max(sum((leaf := ref()) is not None and id(leaf) in ids for ref in self.refs), len(self.prints & prints))


class _HandedOut:
    """The micro-batches that a loader has handed out and no step has taken yet, with their positions.

    They are known again by their tensors, and copies, as on another device, by what the tensors hold. One that was changed as
    well is taken for the oldest one of the iteration that the steps are in, or else of those that were gone through to their
    end and of the newest one; never for one that was evaluated.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._iterations = 0
        self._ended: set[int] = set()
        self._current: int | None = None
        self.guessed = False
        """Whether a changed copy was taken for one of several."""

    def begin(self) -> int:
        """A number for an iteration of the loader."""
        self._iterations += 1
        return self._iterations

    def end(self, iteration: int) -> None:
        """An iteration has handed out all that it has."""
        self._ended.add(iteration)

    def add(self, iteration: int, batch: Any, position: Position) -> None:
        leaves = list(_leaves(batch))
        self._waiting.append(_Waiting(iteration, position, [weakref.ref(leaf) for leaf in leaves], _prints(leaves)))

    def remove(self, batch: Any) -> tuple[Position | None, bool]:
        """The position of a micro-batch, None for a strange one; it and what was handed out before it is waited for no more.
        And whether the iteration that the steps were in was left for its sake."""
        index = self._find(batch)
        if index is None:
            index = self._find_copy(batch)
        if index is None:
            return None, False
        found, before = self._waiting[index], self._current
        del self._waiting[: index + 1]  # in place: another thread may be handing out ahead
        self._current = found.iteration
        return found.position, before not in (None, found.iteration, *self._ended)

    def note_evaluated(self, batch: Any) -> None:
        """An evaluation has used a micro-batch; a step may still take it."""
        index = self._find(batch)
        if index is None:
            return
        self._waiting[index].evaluated = True
        for number in range(index, -1, -1):  # those that are gone cannot come any more
            waiting = self._waiting[number]
            if waiting.evaluated and all(ref() is None for ref in waiting.refs):
                del self._waiting[number]

    def _find(self, batch: Any) -> int | None:
        ids = {id(leaf) for leaf in _leaves(batch)}
        for index, waiting in enumerate(self._waiting):
            if waiting.refs and all((leaf := ref()) is not None and id(leaf) in ids for ref in waiting.refs):
                return index
        return None

    def _find_copy(self, batch: Any) -> int | None:
        leaves = list(_leaves(batch))
        ids, prints = {id(leaf) for leaf in leaves}, _prints(leaves)
        likenesses = [waiting.likeness(ids, prints) for waiting in self._waiting]
        best = max(likenesses, default=0)
        alike = [index for index, likeness in enumerate(likenesses) if likeness == best]
        chosen = self._oldest(alike)
        if best == 0:
            self.guessed |= chosen is not None and self._oldest([index for index in alike if index > chosen]) is not None
            return chosen
        index = alike[0] if chosen is None else chosen
        self.guessed |= len(alike) > 1 and best < len(self._waiting[index].prints)
        return index

    def _oldest(self, indices: list[int]) -> int | None:
        for iterations in ({self._current}, self._ended | {self._iterations}):  # not one that was left after a look
            for index in indices:
                waiting = self._waiting[index]
                if waiting.iteration in iterations and not waiting.evaluated:
                    return index
        return None


def _leaves(batch: Any) -> Iterator[Any]:
    """The tensors and arrays of a batch."""
    if isinstance(batch, (torch.Tensor, numpy.ndarray)):
        yield batch
    elif hasattr(batch, "items"):
        for _, value in batch.items():
            yield from _leaves(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _leaves(value)


_PRINTED = 1 << 14  # elements of a tensor that its print is of, at most: images have millions


def _prints(leaves: Iterable[Any]) -> set[int]:
    """A number for what each tensor or array holds, the same for a copy of it."""
    prints = set()
    for leaf in leaves:
        step = max(1, math.prod(leaf.shape) // _PRINTED)
        if isinstance(leaf, numpy.ndarray):
            data = leaf.reshape(-1)[::step].tobytes()
        elif leaf.layout is torch.strided and not leaf.is_meta and not leaf.is_quantized:
            data = bytes(raw_bytes(leaf.detach().reshape(-1)[::step]))
        else:
            continue
        prints.add(hash((tuple(leaf.shape), data)))
    return prints


_LEFT = (
    "a step has taken a micro-batch of a new iteration of the training data while the one before had not ended: each iteration "
    "begins the next epoch, and a resume would go on in the one that was left. Keep one iterator: batches = iter(dataloader), "
    "then engine.train_batch(batches) for each step"
)
_GUESSED = (
    "a step was given a micro-batch that is none of the training data's, nor a copy of one, while several of those wait for a "
    "step: it is taken for the oldest. If micro-batches were left out, a resume will take other data than this run: change "
    "micro-batches in collate_fn or in place, or leave none out"
)


class TrainingData:
    """What the two loaders share: which position the steps have come to."""

    position: Position = (0, 0)
    """Of the last micro-batch that a step has taken."""

    def __init__(self, epochs: _Epochs):
        self._handed_out, self._epochs, self._told = _HandedOut(), epochs, set()

    def identity(self) -> dict | None:
        """What of the data belongs to the identity of a run."""
        raise NotImplementedError

    def restore(self, position: Position) -> None:
        """Go on behind a position with the next iteration, and with every further one until a step has taken something."""
        raise NotImplementedError

    def take(self, micro_batches: Sequence[Any]) -> list[str]:
        """A step has taken these. Returns, once each, warnings of what makes a resume take other data than the run would."""
        warnings = []
        for micro_batch in micro_batches:
            last, (position, left) = self.position, self._handed_out.remove(micro_batch)
            if position is not None:
                self.position = position
                self._epochs.leave()
            if left and not self._ends_epoch(last):
                warnings.append(_LEFT)
        if self._handed_out.guessed:
            warnings.append(_GUESSED)
        new = [warning for warning in dict.fromkeys(warnings) if warning not in self._told]
        self._told.update(new)
        return new

    def _ends_epoch(self, position: Position) -> bool:
        """Whether a position is known to be the end of its epoch."""
        return False

    def note_evaluated(self, micro_batch: Any) -> None:
        """An evaluation has used a micro-batch, of here or not; a step may still take it."""
        self._handed_out.note_evaluated(micro_batch)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, an evaluation may go through all of the data: the steps' epochs are counted as if it had not."""
        before = vars(self._epochs).copy()
        try:
            yield
        finally:
            vars(self._epochs).update(before)

    def _hand_out(self, batches: Iterable[Any], begin: Callable[[], Position], world_size: int) -> Iterator[Any]:
        """The batches of an iteration, noted with their positions. ``begin``: asked with the first one for where it began."""
        iteration, place = self._handed_out.begin(), None
        for number, batch in enumerate(batches, start=1):
            epoch, first = place = place or begin()
            self._handed_out.add(iteration, batch, (epoch, first + number * world_size))
            yield batch
        self._handed_out.end(iteration)
        self._epochs.leave()


class MicroBatchLoader(TrainingData, torch.utils.data.DataLoader):
    """A DataLoader over a ``MicroBatchSampler``, also with workers that read ahead."""

    def __init__(self, dataset: Any, sampler: MicroBatchSampler, **options: Any):
        TrainingData.__init__(self, sampler.epochs)
        torch.utils.data.DataLoader.__init__(self, dataset, batch_sampler=sampler, **options)

    def identity(self) -> dict:
        return {"num_examples": self.batch_sampler.num_examples, "seed": self.batch_sampler.seed}

    def restore(self, position: Position) -> None:
        self.position = self.batch_sampler.restore(position)

    def _ends_epoch(self, position: Position) -> bool:
        return self.batch_sampler.ends_epoch(position)

    def __iter__(self) -> Iterator[Any]:
        sampler = self.batch_sampler
        # A generator: the sampler begins, in here or in the workers' reading ahead, with the first batch that is asked for.
        yield from self._hand_out(super().__iter__(), lambda: sampler.begun, sampler.world_size)


class MicroBatchStream(TrainingData):
    """Micro-batches of an iterable of examples in its own order, dealt out as those of ``MicroBatchSampler``.

    Every rank reads the whole of it, so it must be the same on all, and keeps its share. Each pass is an epoch; a
    ``set_epoch`` of the data is called before it. A position is come to by reading what lies before it.
    """

    def __init__(
        self, data: Iterable, collate_fn: Callable, micro_batch_size: int, accumulation: int, rank: int, world_size: int
    ):
        self.dataset = data
        self._collate, self._micro_batch_size = collate_fn, micro_batch_size
        self._accumulation, self._rank, self._world_size = accumulation, rank, world_size
        super().__init__(_Epochs())

    def identity(self) -> None:
        return None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter``; each ``iter`` counts one up by itself."""
        self._epochs.choose(epoch)

    def restore(self, position: Position) -> None:
        self.position = tuple(position)
        self._epochs.restore(self.position)

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self._epochs.begin()
        yield from self._hand_out(self._micro_batches(epoch, first), lambda: (epoch, first), self._world_size)

    def _micro_batches(self, epoch: int, first: int) -> Iterator[Any]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        size, a_step = self._micro_batch_size, self._accumulation * self._world_size
        examples, any_step = islice(self.dataset, first * size, None), first > 0
        while len(step := list(islice(examples, a_step * size))) == a_step * size:
            for number in range(self._rank, a_step, self._world_size):
                yield self._collate(step[number * size : (number + 1) * size])
            any_step = True
        if not any_step:
            raise ConfigError(
                f"training_data ended after {len(step)} examples, one step takes {a_step * size} "
                f"(train_micro_batch_size_per_gpu {size} x gradient_accumulation_steps {self._accumulation} x "
                f"{self._world_size} ranks); lower one of them"
            )


def is_stream(data: Any) -> bool:
    """Whether training data can be gone through and has no examples by number, such as an IterableDataset."""
    if isinstance(data, torch.utils.data.IterableDataset):
        return True
    return hasattr(data, "__iter__") and not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def length_of(data: Any) -> int | None:
    """Number of examples; None where the data does not know it."""
    try:
        return len(data)
    except TypeError:  # also of a __len__ that asks others who have none
        return None


def check_training_data(data: Any) -> None:
    """Raises ConfigError, with a remedy, for what cannot be training data. None stands for none."""
    if data is None:
        return
    kind, reason = type(data).__name__, None
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        reason = "pass a data set: an object with __len__ and __getitem__, or an iterable of examples"
    elif isinstance(data, Mapping):
        reason = f"it has the parts {', '.join(map(str, list(data)[:5]))}; pass one of them, such as data['train']"
    elif isinstance(data, (torch.Tensor, numpy.ndarray)):
        reason = "wrap it: torch.utils.data.TensorDataset(torch.as_tensor(data))"
    elif hasattr(data, "dataset") and hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        reason = "it makes batches already; pass its dataset, or leave training_data out and give iter(it) to train_batch"
    elif hasattr(data, "__next__"):
        reason = "it can be gone through only once; pass a list, or an object whose __iter__ begins anew"
    elif not is_stream(data) and length_of(data) is None:
        reason = "it has no __len__; give it one, or make it a torch.utils.data.IterableDataset"
    elif not is_stream(data) and len(data) == 0:
        reason = "it is empty"
    elif getattr(data, "_distributed", None) is not None:  # of Hugging Face's split_dataset_by_node
        reason = "it is this rank's part already; pass the whole, which is dealt out to the ranks here"
    if reason is not None:
        raise ConfigError(f"training_data is a {kind}: {reason}")


def repeat(dataloader: Iterable) -> Iterator:
    """Micro-batches without end, epoch after epoch. Raises ValueError where two epochs in a row have none."""
    empty = 0
    while empty < 2:  # one may have none: a stream that goes on behind its last step
        empty += 1
        for batch in dataloader:
            empty = 0
            yield batch
    raise ValueError("the data has no micro-batch for a whole epoch; pass data that can be gone through again")
