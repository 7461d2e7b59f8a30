"""Exact sizes of a model's parameters, from its configuration on the meta device: no memory, no weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config.sections import DTYPES
from ..errors import ConfigError
from ..rules import Evaluation, Rule


@dataclass(frozen=True)
class ParameterSize:
    """One parameter of ``numel`` elements; tied ones count once, under their first name. ``trained``: it has requires_grad."""

    name: str
    numel: int
    trained: bool = True

    def partition_numel(self, world_size: int) -> int:
        """Elements that each rank allocates: ZeRO-3 pads to a multiple of the ranks."""
        return -(-self.numel // world_size)

    def real_numel(self, rank: int, world_size: int) -> int:
        """Elements of that partition which are not padding. The momentum has exactly these."""
        part = self.partition_numel(world_size)
        return max(0, min(part, self.numel - rank * part))


def meta_model(config, dtype: str = "bf16") -> torch.nn.Module:
    """The language model of a Transformers configuration on the meta device, in evaluation mode. Raises ConfigError."""
    from ..hf.kinds import model_kind

    auto = model_kind(config).auto
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"the model cannot be built from its configuration ({type(config).__name__}): {str(error).splitlines()[0]}"
        ) from error


def parameter_sizes(module: torch.nn.Module) -> tuple[ParameterSize, ...]:
    """The sizes of a module's parameters in the order of ``named_parameters()``. Not for one that is partitioned already."""
    return tuple(ParameterSize(name, p.numel(), p.requires_grad) for name, p in module.named_parameters())


def weight_bytes(sizes: Iterable[ParameterSize], world_size: int, itemsize: int) -> int:
    """Bytes of weights on every rank, padding included."""
    return itemsize * sum(size.partition_numel(world_size) for size in sizes)


def state_bytes(rule: Rule, dtype: torch.dtype, evaluation: Evaluation | None = None) -> int:
    """Bytes of a rule's state beside each trained weight of this dtype; with ``evaluation``, of what that reads of it."""
    state = rule.state(dtype)
    reads = state if evaluation is None else () if evaluation.direction is None else rule.reads(evaluation)
    return sum(stored.itemsize for name, stored in state.items() if name in reads)


def momentum_bytes(sizes: Iterable[ParameterSize], rank: int, world_size: int, itemsize: int) -> int:
    """Bytes of stored state on one rank: of trained parameters, without padding. Rank 0 has the most. ``itemsize``: as of
    ``state_bytes``."""
    return itemsize * sum(size.real_numel(rank, world_size) for size in sizes if size.trained)


def buffer_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's buffers, which every rank holds in full."""
    return sum(b.numel() * b.element_size() for b in module.buffers())
