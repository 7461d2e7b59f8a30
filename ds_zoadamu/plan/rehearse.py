"""A rehearsal on the real machine: the model at reduced depth with random weights, under the very JSON, two steps; measured
beside planned bytes.

deepspeed --num_gpus 8 --module ds_zoadamu.plan --model facebook/opt-175b --gpus 8 --config ds.json --rehearse
"""

import argparse
import contextlib
import copy
import ctypes
from dataclasses import dataclass, replace

from ..config import Config
from ..config.adapters import read_adapter, with_adapter
from ..config.settings import check_precision
from ..console.progress import counted
from ..distributed.start import ensure_launched, launched_rank, launched_world_size
from ..errors import ConfigError
from ..zero3 import nvme
from .choose import Choice, Request, plan_for
from .configs import load_for_plan, matching_config
from .memory import GB, MemoryPlan, Model
from .models import load_config
from .sizes import buffer_bytes, momentum_bytes, state_bytes, weight_bytes

_M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on are mapped one by one


@dataclass(frozen=True)
class Rehearsal:
    """Bytes on this rank: planned by item, and ``measured``: weights (frozen ones too), momentum, buffers, and the peak of the
    allocator (GPU) or of resident memory (CPU)."""

    ITEMS = ("weights", "momentum", "buffers")

    plan: MemoryPlan
    expected: dict[str, int]
    measured: dict[str, int]
    peak_kind: str
    losses: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Weights, momentum and buffers are what was planned, to the byte."""
        return all(self.measured[key] == self.expected[key] for key in self.ITEMS)

    def text(self) -> str:
        """The comparison, one line an item."""
        losses = ", ".join(f"{loss:.4f}" for loss in self.losses)
        lines = [f"rehearsal: {len(self.losses)} steps, losses {losses}", f"{'':10s} {'planned GB':>12s} {'measured GB':>12s}"]
        for key in self.ITEMS:
            lines.append(f"{key:10s} {self.expected[key] / GB:12.6f} {self.measured[key] / GB:12.6f}")
        planned, peak = self.plan.counted, self.measured["peak"]
        lines.append(
            f"{'peak':10s} {planned / GB:12.6f} {peak / GB:12.6f}  {peak / planned - 1:+.1%} "
            f"({self.peak_kind}; the reserve is not in it)"
        )
        return "\n".join(lines)


def reduced(config, layers: int):
    """A copy of a model's configuration with at most ``layers`` layers. Raises ConfigError where the family names them
    otherwise."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if not hasattr(text, "num_hidden_layers"):
        raise ConfigError(
            f"--rehearse: {type(text).__name__} has no num_hidden_layers; rehearse another model of the same width"
        )
    for name in ("num_hidden_layers", "num_decoder_layers", "decoder_layers"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(layers, getattr(text, name)))
    if isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


def rehearse(
    args: argparse.Namespace, given: dict | None, model: Model, request: Request, choice: Choice, layers: int, steps: int = 2
) -> Rehearsal:
    """Build, step and measure; on all ranks of a launcher. Raises ConfigError where their number is not ``--gpus``."""
    from deepspeed.accelerator import get_accelerator

    world_size = launched_world_size()
    if world_size != request.world_size:
        raise ConfigError(
            f"--rehearse: --gpus is {request.world_size} and {world_size} ranks were launched; start it with "
            f"deepspeed --num_gpus {request.world_size} --module ds_zoadamu.plan ..."
        )
    model_config = reduced(load_config(args.model), layers)
    config = load_for_plan(  # the JSON that --write would write
        matching_config(given, model, choice), args.config, world_size=world_size, model_info=model_config,
        steps=int(args.steps), dtype=model.dtype, micro_batch=None,
    )  # fmt: skip
    adapter = None if args.adapter is None else read_adapter(args.adapter)
    small = Model.build(args.model, model_config, config.precision, adapter)
    here = replace(request, gloo=get_accelerator().device_name() == "cpu")  # on a CPU gathers go through gloo
    plan = plan_for(small, here, choice.plan.rule, choice.plan.micro_batch, choice.offload)
    expected = {
        "weights": weight_bytes(small.sizes, world_size, small.itemsize),
        "momentum": momentum_bytes(small.sizes, launched_rank(), world_size, state_bytes(plan.rule, small.torch_dtype)),
        "buffers": small.buffers,
    }
    measured, kind, losses = _measure(model_config, adapter, config, plan, steps)
    return Rehearsal(plan, expected, measured, kind, losses)


def _measure(
    model_config, adapter, config: Config, plan: MemoryPlan, steps: int
) -> tuple[dict[str, int], str, tuple[float, ...]]:
    import torch
    from deepspeed.accelerator import get_accelerator

    from ..hf.kinds import model_kind
    from ..initialization import initialize
    from ..zero3.hf import zero3_known
    from ..zero3.partition import stored_weight_bytes
    from ..zero3.peak_memory import PeakMemory
    from ..zero3.start import init_distributed

    ensure_launched()
    init_distributed()
    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        _return_freed_blocks()
    check_precision(config)
    nvme.prepare(config)  # Transformers partitions the model before an engine could check
    before = PeakMemory().report()["resident_baseline"]
    rehearsal = counted(range(steps + 1), "rehearsal", "part")  # the start, and each step
    next(rehearsal)
    with zero3_known(config.deepspeed):  # Transformers builds into partitions
        model = model_kind(model_config).auto.from_config(model_config, dtype=config.dtype)
        if adapter is not None:
            model = with_adapter(model, adapter, config.dtype)
    engine = initialize(model=model, config=config)[0]
    generator = torch.Generator().manual_seed(0)
    vocab = model_config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (plan.micro_batch, plan.length), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0  # with padding the mask cannot be skipped: the larger case, which is the one planned
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    held = {
        "weights": stored_weight_bytes(engine.module),
        "momentum": engine.memory_bytes()["momentum"],
        "buffers": buffer_bytes(engine.module),
    }
    accumulation = engine.gradient_accumulation_steps()
    memory = PeakMemory()  # the peak counts from here on: random initialisation is no part of the real job
    losses = tuple(engine.train_batch(iter([batch] * accumulation)) for _ in rehearsal)
    numbers = memory.report()
    if on_cpu:
        return (
            {**held, "peak": numbers["resident_peak"] - before},
            "resident memory on the CPU, of the model and its steps; planned with gloo's own buffers",
            losses,
        )
    return {**held, "peak": numbers["accelerator_peak"]}, "peak of the allocator", losses


def _return_freed_blocks() -> None:
    """Have glibc give every freed block of 64 KiB or more back, so that resident memory is memory in use.

    It would keep some of up to 32 MB, which is no part of the plan. Another C library is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
