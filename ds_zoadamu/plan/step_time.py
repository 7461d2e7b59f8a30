"""Seconds a step, from stated hardware figures. An estimate before the first run, good to a factor and not to a digit."""

from dataclasses import dataclass, replace

from .memory import MemoryPlan, Model
from .sizes import state_bytes, weight_bytes

NOISE_INSTRUCTIONS = 130
"""GPU instructions for one element's two normal numbers, counted from kernels/reference.py: half a Philox-4x32-10 (10 rounds of
2 wide products, 4 xors, 2 key sums: 40 of 80), and the polynomials of ln, sin and cos, the root and the recurrence (about
90)."""
SIGN_INSTRUCTIONS = 5
"""For one element's byte of signs, a sixteenth of a Philox-4x32-10."""
OTHER_INSTRUCTIONS = 30
"""For one element beside its noise: loads, rounding, store."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU's published figures and the shares of them that a run is assumed to reach.

    memory_gb: decimal. tflops: dense 16-bit matrix arithmetic. link_gb: GB a second that a GPU receives from the others of its
    machine. instructions: 1e12 32-bit instructions a second (cores x boost clock). host_gb: GB a second from host memory.
    drive_gb: GB a second of the NVMe drive, for all GPUs together.
    """

    name: str
    memory_gb: float
    tflops: float
    link_gb: float
    instructions: float
    host_gb: float
    # Assumptions, not figures of a vendor; --efficiency and --link-efficiency set them.
    efficiency: float = 0.5
    link_efficiency: float = 0.7
    drive_gb: float = 7.0  # of one PCIe 4 x4 drive, which the GPUs share

    def with_overrides(self, **given: float | None) -> "Hardware":
        """With the figures that are not None."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})


HARDWARE = {
    # NVIDIA A100 data sheet (SXM): 312 TFLOPS, NVLink 600 GB/s in both directions together, 6912 cores x 1.41 GHz, PCIe 4 x16.
    "a100-80gb": Hardware(name="A100-80GB", memory_gb=80, tflops=312, link_gb=300, instructions=9.7, host_gb=32),
    # NVIDIA V100 data sheet (SXM2): 125 TFLOPS in fp16 (no bf16), NVLink 300 GB/s together, 5120 cores x 1.53 GHz, PCIe 3 x16.
    "v100-32gb": Hardware(name="V100-32GB", memory_gb=32, tflops=125, link_gb=150, instructions=7.8, host_gb=16),
    # NVIDIA H100 and H200 data sheets (SXM): 989 TFLOPS dense, NVLink 900 GB/s together, 16896 cores x 1.98 GHz, PCIe 5 x16.
    "h100-80gb": Hardware(name="H100-80GB", memory_gb=80, tflops=989, link_gb=450, instructions=33.4, host_gb=64),
    "h200-141gb": Hardware(name="H200-141GB", memory_gb=141, tflops=989, link_gb=450, instructions=33.4, host_gb=64),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by cause. ``overlapped``: gathers hidden behind arithmetic as well as can be; ``total``: not hidden
    at all."""

    forward: float
    gather: float
    noise: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.gather + self.noise + self.host

    @property
    def overlapped(self) -> float:
        return max(self.forward, self.gather + self.host) + self.noise


def estimate_step(
    model: Model,
    plan: MemoryPlan,
    hardware: Hardware,
    *,
    accumulation: int = 1,
    layers: int = 0,
    hidden: int = 0,
    offload: bool = False,
) -> StepTime:
    """Seconds of a step of the plan's rule: a forward of each micro-batch and evaluation, their gathers, and noise for each
    perturbed element and for the update along each direction.

    Args: ``layers``, ``hidden``: for the arithmetic of attention; 0 leaves it out.
    """
    tokens, evaluations = plan.micro_batch * plan.length, plan.rule.evaluations(1)
    passes = accumulation * len(evaluations)
    along = [evaluation.direction for evaluation in evaluations if evaluation.direction is not None]
    # 2 flop for each weight and token; scores and their sum over the values: 4 hidden length for each token and layer.
    flop = passes * tokens * (2 * model.numel + 4 * layers * hidden * plan.length)
    received = passes * plan.traffic_numel * model.itemsize * (plan.world_size - 1) / plan.world_size
    trained = sum(size.real_numel(0, plan.world_size) for size in model.sizes if size.trained)
    passes_of_update = 1 if plan.rule.signs else len(set(along))
    elements = accumulation * len(along) * plan.perturbed_numel + passes_of_update * trained
    from_host = 0.0
    if offload:
        moved = _moved_from_host(model, plan, accumulation, trained)
        if plan.on_drive:
            from_host = plan.world_size * moved * _share_on_drive(model, plan) / (hardware.drive_gb * 1e9)
        else:
            from_host = moved / (hardware.host_gb * 1e9 * hardware.link_efficiency)
    return StepTime(
        forward=flop / (hardware.tflops * 1e12 * hardware.efficiency),
        gather=received / (hardware.link_gb * 1e9 * hardware.link_efficiency),
        noise=elements
        * ((SIGN_INSTRUCTIONS if plan.rule.signs else NOISE_INSTRUCTIONS) * plan.rule.noise_steps() + OTHER_INSTRUCTIONS)
        / (hardware.instructions * 1e12 * hardware.efficiency),
        host=from_host,
    )


def _moved_from_host(model: Model, plan: MemoryPlan, accumulation: int, trained: int) -> float:
    """Bytes that a rank reads and writes in a step where its partitions are offloaded.

    A gather reads the partitions, frozen ones too, and what its evaluation needs of the state; the update reads and writes
    those that are trained, with all their state.
    """
    rule, dtype = plan.rule, model.torch_dtype
    evaluations = rule.evaluations(1)
    weights = len(evaluations) * plan.traffic_numel / plan.world_size * model.itemsize
    state = plan.perturbed_numel * sum(state_bytes(rule, dtype, evaluation) for evaluation in evaluations)
    return accumulation * (weights + state) + 2 * trained * (model.itemsize + state_bytes(rule, dtype))


def _share_on_drive(model: Model, plan: MemoryPlan) -> float:
    """Of the stored bytes; small partitions stay in memory."""
    weights = plan.world_size * weight_bytes(model.sizes, plan.world_size, model.itemsize)
    return plan.on_drive / (weights + state_bytes(plan.rule, model.torch_dtype) * model.trained_numel)
