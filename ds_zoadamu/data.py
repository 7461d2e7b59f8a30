"""The order of the training data: a pure function of the seed and the epoch, dealt out by micro-batches."""

from collections.abc import Iterator

import torch

from .errors import ConfigError


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
        self.epoch = 0
        self.position = (0, 0)
        """What was handed out last: the epoch, and how many of its micro-batches, over all ranks."""
        self._first = 0
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
        if epoch != self.epoch:
            self.epoch, self._first = epoch, 0

    def restore(self, position: tuple[int, int]) -> None:
        """Let the next ``iter`` go on behind a ``position``, of a run on any number of ranks with world_size * accumulation
        as here.
        """
        epoch, consumed = position
        if consumed >= self._micro_batches:
            epoch, consumed = epoch + 1, 0
        self.epoch, self._first, self.position = epoch, consumed, (epoch, consumed)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first, self._first = self.epoch, self._first, 0
        generator = torch.Generator().manual_seed((self.seed + 0x9E3779B97F4A7C15 * (epoch + 1)) % 2**63)
        order = torch.randperm(self.num_examples, generator=generator)
        self.epoch += 1
        for begin in range(first, self._micro_batches, self.world_size):
            self.position = (epoch, begin + self.world_size)
            number = begin + self.rank
            yield order[number * self.micro_batch_size : (number + 1) * self.micro_batch_size].tolist()


def repeat(dataloader: torch.utils.data.DataLoader) -> Iterator:
    """Micro-batches without end, epoch after epoch."""
    while True:
        yield from dataloader
