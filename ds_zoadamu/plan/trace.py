"""One forward pass on the meta device: in which order modules run, and how many bytes of activations live meanwhile."""

import weakref
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError


@dataclass(frozen=True)
class Event:
    """A module begins (``enter``) or ends. ``live``: activation bytes at that moment; ``peak``: the most until the next
    event."""

    enter: bool
    module: int
    live: int
    peak: int


@dataclass(frozen=True)
class ForwardTrace:
    """A forward of one micro-batch with its loss, without gradients.

    events: in order; their ``module`` indexes ``parameters``, which holds each module's own parameters as indices into
    named_parameters(). exact: False where the model does not run on the meta device; then the modules are in the order of their
    definition, and activations are 0.
    """

    events: tuple[Event, ...]
    parameters: tuple[tuple[int, ...], ...]
    batch: int
    length: int
    exact: bool = True

    @property
    def activation_peak(self) -> int:
        """The most bytes of activations, logits and loss that live at once."""
        return max((event.peak for event in self.events), default=0)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside, as long as they live. Views share their storage and count once."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._known = {self._key(t) for t in (*module.parameters(), *module.buffers())}

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.live
        return peak


class _AsOnAGpu(TorchFunctionMode):
    """What differs between the meta device and a GPU: fused attention keeps no scores, and a mask with padding cannot be
    skipped."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False  # "is the mask all ones?": no, so it is made, the larger case
        return func(*args, **(kwargs or {}))


def _own_parameters(module: torch.nn.Module, index_of: dict[int, int]) -> tuple[int, ...]:
    return tuple(sorted({index_of[id(p)] for p in module._parameters.values() if p is not None}))


def trace_forward(module: torch.nn.Module, batch: int, length: int) -> ForwardTrace:
    """Run ``module`` (on the meta device) on ``batch`` sequences of ``length`` tokens with labels, and note what happens.

    Raises ConfigError where the length is more than the model has positions for.
    """
    config = getattr(module, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ConfigError(f"--seq {length}: the model has {limit} positions; choose --seq <= {limit}")
    index_of = {id(p): i for i, (_, p) in enumerate(module.named_parameters())}
    modules = list(module.modules())
    parameters = tuple(_own_parameters(m, index_of) for m in modules)
    marks: list[tuple[bool, int, int, int]] = []
    counter = _LiveBytes(module)

    def mark(enter: bool, number: int):
        def hook(*_):
            marks.append((enter, number, counter.live, counter.take_peak()))

        return hook

    try:
        with ExitStack() as stack:
            for number, m in enumerate(modules):
                stack.callback(m.register_forward_pre_hook(mark(True, number)).remove)
                stack.callback(m.register_forward_hook(mark(False, number)).remove)
            with torch.no_grad(), _AsOnAGpu(), counter:
                ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
                # A decoder of its own is given as many. use_cache: the engine's forward keeps no keys and values either.
                decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
                module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone(), use_cache=False, **decoder)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return ForwardTrace(_by_definition(module, modules), parameters, batch, length, exact=False)
    last = counter.take_peak()
    peaks = [peak for *_, peak in marks[1:]] + [last]
    return ForwardTrace(tuple(Event(*m[:3], peak) for m, peak in zip(marks, peaks, strict=True)), parameters, batch, length)


def _by_definition(module: torch.nn.Module, modules: list[torch.nn.Module]) -> tuple[Event, ...]:
    number_of = {id(m): i for i, m in enumerate(modules)}

    def walk(m):
        yield Event(True, number_of[id(m)], 0, 0)
        for child in m.children():
            yield from walk(child)
        yield Event(False, number_of[id(m)], 0, 0)

    return tuple(walk(module))
