"""The torch optimizer that holds a rule over ZeRO-3 partitions: step counter, stored state, one pass over the partitions a
step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import ConfigError, unknown_keys_message
from ..files.crash_points import reach
from ..rules import FZOO as FZOORule
from ..rules import Elements, Evaluation, Rule, Update
from ..rules import MeZO as MeZORule
from ..rules import ZOAdaMU as ZOAdaMURule
from ..rules.options import check_shrinking, decay, learning_rate
from .chunks import chunks_on
from .partition import Partition

_GROUP_KEYS = {"params", "lr", "weight_decay"}


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A rule over the partitions of this rank. Its step needs one scalar a direction, the projected gradient, and noise that it
    makes again from the seed.

    The engine calls ``bind`` once, then for every step ``perturb_into`` (as partitions are gathered), ``observe`` and
    ``step``. Parameter groups may have their own ``lr`` and ``weight_decay``.
    """

    def __init__(self, params: Iterable, rule: Rule):
        self.rule = rule
        self.scalars = rule.first_scalars()
        """What the rule carries from step to step."""
        self.step_count = 0
        self.overflow = (
            False  # DeepSpeed's word for "this step was skipped": it then counts it and leaves the lr scheduler alone
        )
        self._observed: tuple[float, ...] | None = None
        self._partitions: tuple[tuple[Partition, dict], ...] | None = None
        self._elements: dict[str, Elements] = {}
        self._direction: tuple[int, Any] | None = None
        super().__init__(params, {"lr": rule.config.lr, "weight_decay": rule.config.weight_decay})

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
        lr = learning_rate("parameter group", "lr", group.get("lr", self.defaults["lr"]))
        weight_decay = decay("parameter group", "weight_decay", group.get("weight_decay", self.defaults["weight_decay"]))
        check_shrinking("parameter group", lr, weight_decay)
        super().add_param_group(group)

    def bind(self, partitions: Sequence[Partition]) -> None:
        """Take the partitions of all trained parameters and allocate their state, zero.

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
        keys = self.rule.keys(partition.name for partition, _ in bound)
        self._elements = {p.name: Elements(p.name, p.shape, keys[p.name], p.start, p.stop) for p, _ in bound}
        self._partitions = tuple(bound)
        for partition, _ in bound:
            if state := self.rule.state(partition.dtype):
                self.state[partition.param].update({n: partition.zeros_beside(dtype) for n, dtype in state.items()})

    def elements(self, partition: Partition) -> Elements:
        """Which elements a partition holds, as the rule sees them."""
        return self._elements[partition.name]

    def perturb_into(self, partition: Partition, out: torch.Tensor, evaluation: Evaluation) -> None:
        """Write the weights at which the next step's ``evaluation`` takes the loss into ``out`` (the partition's length, on the
        device of the gather). Call it inside ``partition.loaded()``, as a gather does.
        """
        direction, elements = self._next_direction(), self._elements[partition.name]
        reads = self.rule.reads(evaluation)
        state = {name: tensor for name, tensor in self.stored_state(partition).items() if name in reads}
        # Offloaded, the arithmetic is done where the forward is. A swap buffer may be read into again once this returns.
        tensors = partition.weight, *state.values()
        for part, (weight, *values) in chunks_on(out.device, tensors, writing=False, non_blocking=partition.resident):
            here = dict(zip(state, values, strict=True))
            self.rule.perturb_(out[part], weight, here, elements.part(part), direction, evaluation)

    def observe(self, projected_grads: Sequence[float] | None) -> None:
        """Hand over the projected gradients, one a direction, that the next ``step`` will use; None skips the step's change of
        the weights.
        """
        self._observed = () if projected_grads is None else tuple(projected_grads)
        self.overflow = projected_grads is None

    def figures(self, projected_grads: Sequence[float] | None, lr: float) -> dict[str, float]:
        """What the rule logs of the next step, which takes these projected gradients; None: it is skipped."""
        grads = None if projected_grads is None else tuple(projected_grads)
        return self.rule.figures(Update(self.next_step, self._next_direction(), lr, 0.0, grads, self.scalars))

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
            lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
            self._update(partition, Update(self.next_step, direction, lr, weight_decay, projected_grads, self.scalars))
            reach("mid_update", self.next_step)
        self.scalars = self.rule.next_scalars(self.scalars, projected_grads)
        self.step_count += 1

    def _update(self, partition: Partition, update: Update) -> None:
        elements = self._elements[partition.name]
        with partition.writable():
            state = self.stored_state(partition)
            tensors = partition.weight, *state.values()
            for part, (weight, *values) in chunks_on(partition.compute_device, tensors, writing=True):
                self.rule.update_(weight, dict(zip(state, values, strict=True)), elements.part(part), update)

    def stored_state(self, partition: Partition) -> dict[str, torch.Tensor]:
        """The rule's state of a partition by name: 1-D views without padding."""
        return {name: tensor[: partition.length] for name, tensor in self.state.get(partition.param, {}).items()}

    def stored(self, partition: Partition) -> dict[str, torch.Tensor]:
        """What lasts between steps, as 1-D views without padding: {"weight": ...} and the rule's state, as {"momentum": ...}.

        Call it inside ``partition.loaded()`` to read them, ``partition.writable()`` to change them.
        """
        return {"weight": partition.weight} | self.stored_state(partition)

    def stored_dtypes(self, partition: Partition) -> dict[str, torch.dtype]:
        """The keys of ``stored`` with their dtypes, without reading anything."""
        return {"weight": partition.dtype} | self.rule.state(partition.dtype)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that persist on this rank: {"weights", "momentum"}, padding included for the weights."""
        state = (tensor for p in self.partitions for tensor in self.stored_state(p).values())
        return {
            "weights": sum(p.allocated_bytes for p in self.partitions),
            "momentum": sum(tensor.numel() * tensor.element_size() for tensor in state),
        }

    def coinciding_share(self, max_elements: int = 65536) -> float:
        """Share of a sample of this rank's elements whose values are the same number in two evaluations of a direction at the
        next step, or in one and in the weight itself where a direction has one.

        Such an element is moved along a direction that was not evaluated. 0 to 1; NaN where this rank holds no element.
        """
        first, *others = (one for one in self.rule.evaluations(self.next_step) if one.direction is not None)
        second = next((one for one in others if one.direction == first.direction), None)
        partitions = [p for p in self.partitions if p.length]
        total = same = 0
        for partition in partitions[: max(1, max_elements // 256)]:
            sample = partition.head(max(1, max_elements // min(len(partitions), max_elements // 256)))
            plus, minus = (torch.empty(sample.length, dtype=sample.dtype, device=sample.compute_device) for _ in range(2))
            with sample.loaded():
                self.perturb_into(sample, plus, first)
                minus.copy_(sample.weight) if second is None else self.perturb_into(sample, minus, second)
            total += sample.length
            same += int((plus == minus).sum())
        return same / total if total else math.nan

    def _next_direction(self) -> Any:
        """``rule.direction(next_step)``, worked out once a step and not once a partition."""
        if self._direction is None or self._direction[0] != self.next_step:
            self._direction = (self.next_step, self.rule.direction(self.next_step, self.scalars))
        return self._direction[1]

    def _bound(self) -> tuple[tuple[Partition, dict], ...]:
        if self._partitions is None:
            raise RuntimeError(
                f"the optimizer of {self.rule.name} is not bound to partitions; pass it to ds_zoadamu.initialize(optimizer=...)"
            )
        return self._partitions


def ZOAdaMU(params: Iterable, **options: Any) -> ZerothOrderOptimizer:  # noqa: N802, named as torch's optimizers are
    """An optimizer with the rule ZO-AdaMU. ``params`` as for any torch optimizer; options as in the JSON, ``lr`` and
    ``total_steps`` required. Raises ConfigError.

    Example:
        optimizer = ds_zoadamu.ZOAdaMU(model.parameters(), lr=1e-6, zo_eps=1e-3, total_steps=20_000)
        engine, *_ = ds_zoadamu.initialize(model=model, optimizer=optimizer, config=config)
    """
    return ZerothOrderOptimizer(params, ZOAdaMURule(**options))


def MeZO(params: Iterable, **options: Any) -> ZerothOrderOptimizer:  # noqa: N802
    """An optimizer with the rule MeZO, as ``ZOAdaMU``; ``lr`` is required."""
    return ZerothOrderOptimizer(params, MeZORule(**options))


def FZOO(params: Iterable, **options: Any) -> ZerothOrderOptimizer:  # noqa: N802
    """An optimizer with the rule FZOO, as ``ZOAdaMU``; ``lr`` is required."""
    return ZerothOrderOptimizer(params, FZOORule(**options))
