"""Exact sizes of a model's parameters, from its configuration on the meta device: no memory, no weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config.sections import DTYPES
from ..errors import ConfigError

MOMENTUM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "replay": 0, "none": 0}
"""Bytes of one momentum beside each trained weight; none: of a rule that has no momentum."""


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
    """The causal language model of a Transformers configuration on the meta device, in evaluation mode. Raises ConfigError."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
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


def momentum_bytes(
    sizes: Iterable[ParameterSize], rank: int, world_size: int, momentum: str, num_perturbations: int = 1
) -> int:
    """Bytes of momentum on one rank: of trained parameters, without padding, one for each perturbation. Rank 0 has the most."""
    numel = sum(size.real_numel(rank, world_size) for size in sizes if size.trained)
    return num_perturbations * MOMENTUM_BYTES[momentum] * numel


def buffer_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's buffers, which every rank holds in full."""
    return sum(b.numel() * b.element_size() for b in module.buffers())
