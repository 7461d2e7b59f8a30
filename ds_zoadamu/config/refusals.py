"""The DeepSpeed settings under which a zeroth-order step would be wrong, or that it would ignore."""

from ..errors import ConfigError
from .learning_rate import check_scheduler_section
from .offload import Offload
from .sections import check_stage, value_at

_OFF = (None, False, "", {}, [])
_NOWHERE = (None, "", "none")
_QUANTIZED = "is {!r}; quantized gathers would drown the perturbation: set it to false"
_UNSUPPORTED = "is true; it is not supported with a zeroth-order optimizer: remove it"
_PRECISION = _UNSUPPORTED + ' and choose the precision with "bf16" or "fp16"'
_ORDER = "is true; the order of micro-batches must not depend on the ranks: remove it"
_WRITER = "is set; checkpoints are written by the engine's own writer, whole or not at all: remove it"

# Path of a setting, the values that may stand there, and what a message says of another one.
_SETTINGS = (
    ("zero_optimization.offload_optimizer.device", _NOWHERE, "is {!r}; the momentum lies beside the weights, so remove this "
     "section and use offload_param to move both to the CPU or to NVMe"),
    ("zero_optimization.offload_param.device", (*_NOWHERE, "cpu", "nvme"), 'is {!r}; supported are "cpu", "nvme" and "none"'),
    ("zero_optimization.cpu_offload", _OFF, "is {!r}; it moves an optimizer's state, and the momentum lies beside the weights: "
     "remove it and use offload_param to move both"),
    ("zero_optimization.cpu_offload_param", _OFF, 'is {!r}; it is an old name: write "offload_param": {{"device": "cpu"}}'),
    ("zero_optimization.zero_quantized_weights", _OFF, _QUANTIZED),
    ("zero_optimization.zero_quantized_nontrainable_weights", _OFF, _QUANTIZED),
    ("zero_optimization.zero_quantized_gradients", _OFF, _QUANTIZED),
    ("zero_optimization.zero_hpz_partition_size", (1,), "is {!r}; hpZ gathers from a second copy that an update does not "
     "reach: set it to 1"),
    ("zero_optimization.zenflow", _OFF, "is set; it selects gradients, and there are none: remove it"),
    ("gradient_clipping", (0.0,), "is {!r}; there are no gradients to clip: remove it or set it to 0.0"),
    ("torch_autocast.enabled", _OFF, _PRECISION),
    ("hybrid_engine.enabled", _OFF, _UNSUPPORTED),
    ("compile.deepcompile", _OFF, _UNSUPPORTED),
    ("flops_profiler.enabled", _OFF, "is set; it takes one forward and one backward pass for a step; to see where a step's "
     "time goes use launch/finetune.py --profile_steps: remove it"),
    ("autotuning.enabled", _OFF, "is set; it ends the run after a few steps and tunes stages and batches of steps with "
     "backward passes: remove it"),
    ("weight_quantization", _OFF, "is set; quantized weights would drown the perturbation: remove it"),
    ("checkpoint.writer", _OFF, _WRITER),
    ("datastates_ckpt", _OFF, _WRITER),
    ("tensor_parallel.autotp_size", (0, 1), "is {}; parameters are split by ZeRO-3 only: remove it"),
    ("sequence_parallel_size", (0, 1), "is {}; it must be 1"),
    ("managed_gradient_accumulation", (None, True), "is false; train_batch accumulates by itself: remove it"),
    ("data_efficiency.enabled", _OFF, _ORDER),
)  # fmt: skip


def check_deepspeed_settings(config: dict) -> None:
    """Raises ConfigError for a DeepSpeed configuration that cannot work with a zeroth-order optimizer."""
    check_scheduler_section(config)
    check_stage(config, remedy="a zeroth-order step needs ZeRO-3 partitions: set it to 3, also for one rank")
    for path, allowed, message in _SETTINGS:
        if (value := value_at(config, path, allowed[0])) not in allowed:
            raise ConfigError(f"{path} {message.format(value)}")
    Offload.of(config)
