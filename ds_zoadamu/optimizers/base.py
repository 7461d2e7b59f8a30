"""What every zeroth-order rule shares: options, the step counter, momentum storage, and one pass over the partitions a step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import kernels
from .._crash_points import reach
from ..chunks import chunks_on
from ..errors import ConfigError, unknown_keys_message
from ..kernels.types import Direction, Rounding, fp32
from ..noise import parameter_keys
from ..partition import Partition
from .options import RuleConfig

_GROUP_KEYS = {"params", "lr", "weight_decay"}
Keys = tuple[tuple[int, int], ...]
"""The noise keys of one parameter, one a direction."""


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """An optimizer whose step needs one scalar a direction, the projected gradient, and noise that it makes again from the
    seed.

    A rule is a subclass: ``config_class`` parses its options, ``direction`` says how a step's perturbation m_t is made out of
    noise and stored momentum, ``momentum_dtype`` what is stored, ``normalize`` whether m_t is divided by sqrt(v + sigma) in
    the update. A rule that this does not express overrides ``perturb_range_`` and ``update_range_``, which see flat tensors
    only. The engine calls ``bind`` once, then for every step ``perturb_into`` (as partitions are gathered), ``observe`` and
    ``step``. Parameter groups may have their own ``lr`` and ``weight_decay``.
    """

    config_class: type[RuleConfig] = RuleConfig
    normalize = False
    sigma = 0.0

    def __init__(self, params: Iterable, **options: Any):
        self.config = self.config_class.parse(options, where=type(self).__name__)
        self.step_count = 0
        self.overflow = (
            False  # DeepSpeed's word for "this step was skipped": it then counts it and leaves the lr scheduler alone
        )
        self._observed: tuple[float, ...] | None = None
        self._partitions: tuple[tuple[Partition, dict], ...] | None = None
        self._keys: dict[str, Keys] = {}
        self._direction: tuple[int, Direction] | None = None
        super().__init__(params, {"lr": self.config.lr, "weight_decay": self.config.weight_decay})

    # --- the rule

    def direction(self, step: int) -> Direction:
        """How the perturbation m_t of ``step`` is made. A pure function of the step and the options."""
        raise NotImplementedError

    def momentum_dtype(self, weight_dtype: torch.dtype) -> torch.dtype | None:
        """Of the momentum stored for each direction; None where none is stored."""
        return None

    def figures(self, step: int) -> dict[str, float]:
        """What of the rule is worth logging at ``step``, by name; ``effective_zo_eps`` is zo_eps times the standard deviation
        of m_t."""
        return {"effective_zo_eps": self.config.zo_eps}

    def perturb_range_(
        self,
        out: torch.Tensor,
        weight: torch.Tensor,
        momentum: torch.Tensor | None,
        direction: Direction,
        *,
        key: tuple[int, int],
        start: int,
        sign: int,
    ) -> None:
        """Write weight + sign * zo_eps * m_t into ``out``, for the flat elements from ``start`` of the parameter with this
        noise key. Tensors as for ``kernels.perturb_``."""
        kernels.perturb_(
            out,
            weight,
            momentum,
            direction,
            key=key,
            start=start,
            scale=fp32(sign * self.config.zo_eps),
            rounding=Rounding[self.config.perturbation_rounding.upper()],
        )

    def update_range_(
        self,
        weight: torch.Tensor,
        momenta: Sequence[torch.Tensor | None],
        direction: Direction,
        *,
        keys: Keys,
        start: int,
        lr: float,
        weight_decay: float,
        projected_grads: Sequence[float] | None,
    ) -> None:
        """One step on the flat elements from ``start`` of a parameter, in place; None as ``projected_grads`` skips the weights.

        All that a step does to an element, without partitions or ranks: a replay needs no more. ``momenta``, ``keys`` and
        ``projected_grads`` have one entry a direction; the directions are applied one after the other, each with lr / q, and
        the decay comes with the first. Tensors as for ``kernels.update_``.
        """
        for index, (momentum, key) in enumerate(zip(momenta, keys, strict=True)):
            kernels.update_(
                weight,
                momentum,
                direction,
                key=key,
                start=start,
                lr_grad=0.0 if projected_grads is None else fp32(lr * projected_grads[index] / len(keys)),
                lr_decay=fp32(lr * weight_decay) if index == 0 else 0.0,
                sigma=self.sigma,
                normalize=self.normalize,
                write_weight=projected_grads is not None,
                rounding=Rounding[self.config.update_rounding.upper()],
            )

    # --- one step over partitions, called by the engine

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
        self._keys = self.noise_keys(partition.name for partition, _ in bound)
        self._partitions = tuple(bound)
        for partition, _ in bound:
            dtype = self.momentum_dtype(partition.dtype)
            if dtype is not None:
                self.state[partition.param].update({name: partition.zeros_beside(dtype) for name in self._state_names()})

    def noise_keys(self, names: Iterable[str]) -> dict[str, Keys]:
        """The noise keys of parameters by name. Raises ValueError where two streams of noise would share one."""
        return parameter_keys(self.config.seed, names, self.config.num_perturbations)

    def new_momenta(self, length: int, weight_dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        """m_0 of ``length`` elements for each direction: zeros, or None where nothing is stored."""
        dtype, count = self.momentum_dtype(weight_dtype), self.config.num_perturbations
        if dtype is None:
            return (None,) * count
        return tuple(torch.zeros(length, dtype=dtype, device=device) for _ in range(count))

    def perturb_into(self, partition: Partition, out: torch.Tensor, sign: int, index: int = 0) -> None:
        """Write weight + sign * zo_eps * m_t of the next step into ``out`` (the partition's length, on the device of the
        gather), with m_t of the direction ``index``. Call it inside ``partition.loaded()``, as a gather does.
        """
        key, direction = self._keys[partition.name][index], self._next_direction()
        stored = partition.weight, self.momenta(partition)[index]
        # Offloaded, the arithmetic is done where the forward is. A swap buffer may be read into again once this returns.
        for part, (weight, momentum) in chunks_on(out.device, stored, writing=False, non_blocking=partition.resident):
            start = partition.start + part.start
            self.perturb_range_(out[part], weight, momentum, direction, key=key, start=start, sign=sign)

    def observe(self, projected_grads: Sequence[float] | None) -> None:
        """Hand over the projected gradients, one a direction, that the next ``step`` will use; None skips the step's change of
        the weights.
        """
        self._observed = () if projected_grads is None else tuple(projected_grads)
        self.overflow = projected_grads is None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every partition along the m_t that was evaluated. Needs ``observe`` first, as ``engine.train_batch`` does."""
        if closure is not None:
            raise TypeError("a zeroth-order step takes no closure; call engine.train_batch(batch)")
        if self._observed is None:
            raise RuntimeError("step() without a projected gradient; call engine.train_batch(batch), which evaluates and steps")
        projected_grads, self._observed = (None if self.overflow else self._observed), None
        direction = self._next_direction()
        for partition, group in self._bound():
            self._update(partition, group, direction, projected_grads)
            reach("mid_update", self.next_step)
        self.step_count += 1

    def _update(
        self, partition: Partition, group: dict, direction: Direction, projected_grads: tuple[float, ...] | None
    ) -> None:
        with partition.writable():
            stored = partition.weight, *self.momenta(partition)
            for part, (weight, *momenta) in chunks_on(partition.compute_device, stored, writing=True):
                self.update_range_(
                    weight,
                    momenta,
                    direction,
                    keys=self._keys[partition.name],
                    start=partition.start + part.start,
                    lr=float(group["lr"]),
                    weight_decay=float(group["weight_decay"]),
                    projected_grads=projected_grads,
                )

    def stored(self, partition: Partition) -> dict[str, torch.Tensor]:
        """What lasts between steps, as 1-D views without padding: {"weight": ...} and, where stored, {"momentum": ...} and for
        further directions {"momentum_1": ...}, ...

        Call it inside ``partition.loaded()`` to read them, ``partition.writable()`` to change them.
        """
        state = self.state.get(partition.param, {})
        return {"weight": partition.weight} | {name: state[name][: partition.length] for name in self._state_names() if state}

    def stored_dtypes(self, partition: Partition) -> dict[str, torch.dtype]:
        """The keys of ``stored`` with their dtypes, without reading anything."""
        momenta = zip(self._state_names(), self.momenta(partition), strict=True)
        return {"weight": partition.dtype} | {name: momentum.dtype for name, momentum in momenta if momentum is not None}

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that persist on this rank: {"weights", "momentum"}, padding included for the weights."""
        momenta = (m for p in self.partitions for m in self.momenta(p) if m is not None)
        return {
            "weights": sum(p.allocated_bytes for p in self.partitions),
            "momentum": sum(m.numel() * m.element_size() for m in momenta),
        }

    def coinciding_share(self, max_elements: int = 65536) -> float:
        """Share of a sample of this rank's elements whose two perturbed values are the same number at the next step.

        Such an element is moved along a direction that was not evaluated. 0 to 1; NaN where this rank holds no element.
        """
        partitions = [p for p in self.partitions if p.length]
        total = same = 0
        for partition in partitions[: max(1, max_elements // 256)]:
            sample = partition.head(max(1, max_elements // min(len(partitions), max_elements // 256)))
            plus, minus = (torch.empty(sample.length, dtype=sample.dtype, device=sample.compute_device) for _ in range(2))
            with sample.loaded():
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

    def _state_names(self) -> list[str]:
        return [f"momentum_{index}" if index else "momentum" for index in range(self.config.num_perturbations)]

    def momenta(self, partition: Partition) -> tuple[torch.Tensor | None, ...]:
        """The stored momentum of each direction, 1-D without padding, or None where none is stored."""
        state = self.state.get(partition.param, {})
        return tuple(state[name][: partition.length] if name in state else None for name in self._state_names())
