"""What every zeroth-order rule shares: options, the step counter, momentum storage, and one pass over the partitions a step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import kernels
from .._crash_points import reach
from ..config import ZOAdaMUConfig
from ..errors import ConfigError, unknown_keys_message
from ..kernels.types import Direction, Rounding, fp32
from ..noise import parameter_keys
from ..partition import Partition

_GROUP_KEYS = {"params", "lr", "weight_decay"}
_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """An optimizer whose step needs one scalar, the projected gradient, and noise that it makes again from the seed.

    A rule is a subclass with ``direction`` and ``normalize``. The engine calls ``bind`` once, then for every step
    ``perturb_into`` (as partitions are gathered), ``observe`` and ``step``. Parameter groups may have their own ``lr`` and
    ``weight_decay``.
    """

    normalize: bool

    def __init__(self, params: Iterable, config: ZOAdaMUConfig):
        self.config = config
        self.schedule = config.schedule
        self.step_count = 0
        self.overflow = (
            False  # DeepSpeed's word for "this step was skipped": it then counts it and leaves the lr scheduler alone
        )
        self._observed: float | None = None
        self._partitions: tuple[tuple[Partition, dict], ...] | None = None
        self._keys: dict[str, tuple[int, int]] = {}
        self._direction: tuple[int, Direction] | None = None
        super().__init__(params, {"lr": config.lr, "weight_decay": config.weight_decay})

    def direction(self, step: int) -> Direction:
        """How the perturbation m_t of ``step`` is made. A pure function of the step and the options."""
        raise NotImplementedError

    @property
    def next_step(self) -> int:
        """t of the step that comes next, 1 for the first."""
        return self.step_count + 1

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """This rank's parts of the parameters that are trained."""
        return tuple(partition for partition, _ in self._bound())

    def add_param_group(self, group: dict[str, Any]) -> None:
        if unknown := set(group) - _GROUP_KEYS:
            raise ConfigError(unknown_keys_message("parameter group", unknown, _GROUP_KEYS))
        for key in ("lr", "weight_decay"):
            value = group.get(key, self.defaults[key])
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"parameter group: {key} is {value!r}; it must be a finite number >= 0")
        super().add_param_group(group)

    def bind(self, partitions: Sequence[Partition]) -> None:
        """Take the partitions of all trained parameters and allocate their momentum, zero.

        Raises ConfigError where a parameter of a group is not among the model's, and where two names share a noise key.
        """
        by_param = {id(p.param): p for p in partitions}
        bound = []
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                if id(param) not in by_param:
                    raise ConfigError(
                        f"parameter group {index} holds a parameter that is not one of the model's; pass model.parameters()"
                    )
                bound.append((by_param[id(param)], group))
        if not bound:
            raise ConfigError("no parameter to train: every parameter of the optimizer has requires_grad=False")
        self._keys = parameter_keys(self.config.seed, [partition.name for partition, _ in bound])
        self._partitions = tuple(bound)
        for partition, _ in bound:
            dtype = self.momentum_dtype(partition.weight.dtype)
            if dtype is not None:
                self.state[partition.param]["momentum"] = torch.zeros(
                    partition.length, dtype=dtype, device=partition.weight.device
                )

    def perturb_into(self, partition: Partition, out: torch.Tensor, sign: int) -> None:
        """Write weight + sign * zo_eps * m_t of the next step into ``out`` (the partition's length, on the device of the
        gather).
        """
        weight, momentum = partition.weight, self._momentum(partition)
        if weight.device != out.device:  # offloaded: the arithmetic is done where the forward is
            weight = weight.to(out.device, non_blocking=True)
            momentum = None if momentum is None else momentum.to(out.device, non_blocking=True)
        kernels.perturb_(
            out,
            weight,
            momentum,
            self._next_direction(),
            key=self._keys[partition.name],
            start=partition.start,
            scale=fp32(sign * self.config.zo_eps),
            rounding=Rounding[self.config.perturbation_rounding.upper()],
        )

    def observe(self, projected_grad: float | None) -> None:
        """Hand over the projected gradient that the next ``step`` will use; None skips the step's change of the weights."""
        self._observed = math.nan if projected_grad is None else projected_grad
        self.overflow = projected_grad is None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every partition along the m_t that was evaluated. Needs ``observe`` first, as ``engine.train_batch`` does."""
        if closure is not None:
            raise TypeError("a zeroth-order step takes no closure; call engine.train_batch(batch)")
        if self._observed is None:
            raise RuntimeError("step() without a projected gradient; call engine.train_batch(batch), which evaluates and steps")
        projected_grad, self._observed = self._observed, None
        direction = self._next_direction()
        for partition, group in self._bound():
            self._update(partition, group, direction, projected_grad)
            reach("mid_update", self.next_step)
        self.step_count += 1

    def _update(self, partition: Partition, group: dict, direction: Direction, projected_grad: float) -> None:
        weight, momentum = partition.weight, self._momentum(partition)
        device = partition.compute_device
        on_device = weight if weight.device == device else weight.to(device)
        momentum_on_device = None if momentum is None else momentum.to(device)
        self.update_range_(
            on_device,
            momentum_on_device,
            direction,
            key=self._keys[partition.name],
            start=partition.start,
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            projected_grad=None if self.overflow else projected_grad,
        )
        if on_device is not weight:
            weight.copy_(on_device)
            if momentum is not None:
                momentum.copy_(momentum_on_device)

    def update_range_(
        self,
        weight: torch.Tensor,
        momentum: torch.Tensor | None,
        direction: Direction,
        *,
        key: tuple[int, int],
        start: int,
        lr: float,
        weight_decay: float,
        projected_grad: float | None,
    ) -> None:
        """One step on the flat elements from ``start`` of the parameter with this noise key, in place; None skips the weights.

        All that a step does to an element, without partitions or ranks: a replay needs no more. Tensors as for
        ``kernels.update_``.
        """
        kernels.update_(
            weight,
            momentum,
            direction,
            key=key,
            start=start,
            lr_grad=0.0 if projected_grad is None else fp32(lr * projected_grad),
            lr_decay=fp32(lr * weight_decay),
            sigma=fp32(self.config.sigma),
            normalize=self.normalize,
            write_weight=projected_grad is not None,
            rounding=Rounding[self.config.update_rounding.upper()],
        )

    def momentum_dtype(self, weight_dtype: torch.dtype) -> torch.dtype | None:
        """Of the stored momentum; None where none is stored."""
        return _TORCH_DTYPES.get(self.config.momentum.dtype)

    def stored(self, partition: Partition) -> dict[str, torch.Tensor]:
        """What lasts between steps, as 1-D views without padding: {"weight": ...} and, where stored, {"momentum": ...}."""
        momentum = self._momentum(partition)
        return {"weight": partition.weight} | ({} if momentum is None else {"momentum": momentum})

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that persist on this rank: {"weights", "momentum"}, padding included for the weights."""
        momenta = (self._momentum(p) for p in self.partitions)
        return {
            "weights": sum(p.allocated_bytes for p in self.partitions),
            "momentum": sum(m.numel() * m.element_size() for m in momenta if m is not None),
        }

    def coinciding_share(self, max_elements: int = 65536) -> float:
        """Share of a sample of this rank's elements whose two perturbed values are the same number at the next step.

        Such an element is moved along a direction that was not evaluated. 0 to 1; NaN where this rank holds no element.
        """
        partitions = [p for p in self.partitions if p.length]
        total = same = 0
        for partition in partitions[: max(1, max_elements // 256)]:
            sample = partition.head(max(1, max_elements // min(len(partitions), max_elements // 256)))
            plus, minus = (
                torch.empty(sample.length, dtype=sample.weight.dtype, device=sample.compute_device) for _ in range(2)
            )
            self.perturb_into(sample, plus, +1)
            self.perturb_into(sample, minus, -1)
            total += sample.length
            same += int((plus == minus).sum())
        return same / total if total else math.nan

    def _next_direction(self) -> Direction:
        """``direction(next_step)``, worked out once a step and not once a partition."""
        if self._direction is None or self._direction[0] != self.next_step:
            self._direction = (self.next_step, self.direction(self.next_step))
        return self._direction[1]

    def _bound(self) -> tuple[tuple[Partition, dict], ...]:
        if self._partitions is None:
            raise RuntimeError(
                f"{type(self).__name__} is not bound to partitions; pass it to ds_zoadamu.initialize(optimizer=...)"
            )
        return self._partitions

    def _momentum(self, partition: Partition) -> torch.Tensor | None:
        momentum = self.state.get(partition.param, {}).get("momentum")
        return None if momentum is None else momentum[: partition.length]
