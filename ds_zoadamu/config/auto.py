"""The DeepSpeed JSON with its "auto" values filled, as Hugging Face's Trainer fills them."""

import copy
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from ..rules import RULES
from ..rules.options import reject_unknown, set_at
from .learning_rate import check_warmup
from .sections import batch_of, value_at

DEFAULT_MICRO_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE = 5e-5
STEPS_OF_A_RUN = ("optimizer.params.total_steps", "scheduler.params.total_num_steps")
# In these DeepSpeed itself knows what "auto" means.
_OWN_AUTO_SECTIONS = ("data_types", "autotuning")
_WARMUPS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")


def fill(
    config: dict, overrides: Namespace | None, *, rule: str | None, world_size: int, hidden_size: int | None,
    num_examples: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A copy of a DeepSpeed configuration without "auto" values; ``rule`` is the zeroth-order one that it asks for.

    A value of "auto" takes its argument or the argument's default; in ``overrides``, of `finetune_parser` or some of it, None
    or absent stands for "not given". An argument that was given also fills a key that the JSON leaves out, and must agree with
    one that the JSON fixes. Without a command line there are as many steps as the JSON says or ``num_examples`` make, and
    ZeRO's bucket sizes are left to DeepSpeed where the model's hidden size is unknown.

    Raises ConfigError: an argument contradicts the JSON, or an "auto" that nothing fills.
    """
    config, in_library = copy.deepcopy(config), overrides is None
    if in_library and not has_auto(config):
        return config
    filler = _Filler(config, {} if in_library else vars(overrides))
    _fill_batches(filler, world_size)
    if in_library:
        filler.given = {"seed": 0, "max_steps": _steps_of_library(config, num_examples, world_size)}
    _fill_optimizer(filler, rule)
    _fill_scheduler(filler)
    for section in ("bf16", "fp16"):
        filler.fill(f"{section}.enabled", False, section)
    if hidden_size is not None:
        for key, size in bucket_sizes(hidden_size).items():
            filler.fill(f"zero_optimization.{key}", size)
    elif in_library and (zero := config.get("zero_optimization")):
        config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    if rule is not None:  # for what nobody reads no value would do
        reject_unknown("optimizer.params", filler.get("optimizer.params") or {}, RULES[rule].config_class.names())
    for path in _auto_paths(config):
        raise ConfigError(
            f'the DeepSpeed JSON has {path} = "auto", which nothing here fills; leave it out for its default, or give a value'
        )
    return config


def bucket_sizes(hidden_size: int) -> dict[str, int]:
    """What "auto" stands for in zero_optimization."""
    square = hidden_size * hidden_size
    return {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _steps_of_library(config: dict, num_examples: int | None, world_size: int) -> int | None:
    """The number of steps for "auto": what the JSON has for the run, else those of one epoch; None where nothing needs it."""
    asking = [path for path in STEPS_OF_A_RUN if value_at(config, path) == "auto"]
    given = [value_at(config, path) for path in STEPS_OF_A_RUN if isinstance(value_at(config, path), int)]
    if not asking or given:
        return max(given, default=None)
    if num_examples is None:
        raise ConfigError(
            f'{asking[0]} is "auto"; it is filled with the steps of an epoch where training_data has a length. Give the number '
            "of steps, or pass training_data"
        )
    batch = batch_of(config, world_size)
    return max(1, num_examples // (batch.train or batch.accumulation * world_size))


def _fill_batches(filler: "_Filler", world_size: int) -> None:
    filler.fill("train_micro_batch_size_per_gpu", DEFAULT_MICRO_BATCH_SIZE, "per_device_train_batch_size")
    accumulation = "gradient_accumulation_steps"
    filler.fill(accumulation, batch_of(filler.config, world_size).accumulation, accumulation)
    if (train := batch_of(filler.config, world_size).train) is not None:
        filler.fill("train_batch_size", train)


def _fill_optimizer(filler: "_Filler", rule: str | None) -> None:
    default_lr = DEFAULT_LEARNING_RATE if rule is None else RULES[rule].usual_lrs[0]
    filler.fill("optimizer.params.lr", default_lr, "learning_rate")
    filler.fill("optimizer.params.weight_decay", 0.0, "weight_decay")
    ignored, why = ("zo_eps", "perturbs nothing") if rule is None else ("max_grad_norm", "has no gradients to clip")
    if given := filler.given.get(ignored):
        raise ConfigError(f"--{ignored} {given}: {rule or filler.get('optimizer.type')} {why}; leave it out")
    filler.fill("optimizer.params.betas", [0.9, 0.999])
    filler.fill("optimizer.params.eps", 1e-8)
    if rule is not None:
        filler.fill("optimizer.params.zo_eps", 1e-3, "zo_eps")
        filler.fill("optimizer.params.total_steps", filler.given.get("max_steps"))
        seed = filler.given.get("seed", 0)
        filler.fill("optimizer.params.seed", seed, "seed" if seed else None)  # nobody can tell a 0 from no argument
        filler.fill("gradient_clipping", 0.0)
    else:
        filler.fill("gradient_clipping", 1.0, "max_grad_norm")


def _fill_scheduler(filler: "_Filler") -> None:
    steps, left_open = filler.given.get("warmup_steps"), filler.get("scheduler.params.warmup_num_steps") in (None, "auto")
    if "scheduler" not in filler.config:
        if steps is not None:
            raise ConfigError(
                '--warmup_steps is given but the DeepSpeed JSON has no "scheduler"; add one, for example WarmupDecayLR'
            )
        return
    filler.fill("scheduler.params.warmup_min_lr", 0.0)
    highest = "scheduler.params.warmup_max_lr"
    # Where the JSON has one, it takes the place of the optimizer's lr.
    filler.fill(highest, filler.get("optimizer.params.lr"), "learning_rate" if filler.get(highest) is not None else None)
    filler.fill("scheduler.params.total_num_steps", filler.given.get("max_steps"))
    if steps == 0 and left_open:  # DeepSpeed refuses it; 1 is what the Trainer takes for "none"
        filler.given["warmup_steps"] = 1
    filler.fill("scheduler.params.warmup_num_steps", 1, "warmup_steps")
    if not steps and left_open and filler.get("scheduler.params.warmup_num_steps") is not None:
        _leave_out_warmup(filler)
    check_warmup(filler.config)


def _leave_out_warmup(filler: "_Filler") -> None:
    """Begin a schedule behind its warm-up, where its first lr is the optimizer's.

    DeepSpeed takes 2 for a warm-up of 1 step, and warmup_min_lr for the first two steps of any: as many steps at lr 0. A
    scheduler that begins at iteration 0 leaves the optimizer's lr for step 1, and its iteration 1 ends a warm-up of 2 (with
    "warmup_type": "linear" it is half of one).
    """
    kind, lr = filler.get("scheduler.type"), filler.get("optimizer.params.lr")
    highest = lr if kind == "WarmupCosineLR" else filler.get("scheduler.params.warmup_max_lr")
    if kind in _WARMUPS and (highest == lr or (highest is None and kind == "WarmupLR")):
        path = "scheduler.params.last_batch_iteration"
        if filler.get(path) in (None, "auto"):
            filler.set(path, 0)


class _Filler:
    def __init__(self, config: dict, arguments: dict):
        self.config = config
        self.given = {name: value for name, value in arguments.items() if value is not None and value is not False}

    def get(self, path: str) -> Any:
        return value_at(self.config, path)

    def fill(self, path: str, default: Any, argument: str | None = None) -> None:
        """Fill "auto" with the argument or the default, and what is left out with the argument."""
        present, given = self.get(path), self.given.get(argument)
        if present == "auto":
            self.set(path, default if given is None else given)
        elif given is not None and present is None:
            self.set(path, given)
        elif given is not None and present != given:
            raise ConfigError(
                f"--{argument} {given} contradicts the DeepSpeed JSON, where {path} is {present}; "
                f'set it to "auto" there or leave out --{argument}'
            )

    def set(self, path: str, value: Any) -> None:
        set_at(self.config, path, value)


def has_auto(config: dict) -> bool:
    """Whether a DeepSpeed configuration has an "auto" value that DeepSpeed would not understand."""
    return any(_auto_paths(config))


def _auto_paths(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if path or key not in _OWN_AUTO_SECTIONS:
                yield from _auto_paths(value, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _auto_paths(value, f"{path}[{index}]")
    elif node == "auto":
        yield path


def hidden_size_of(model_config: Any) -> int | None:
    """The hidden size that a Transformers configuration tells; None where it does not, or is none."""
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    return getattr(text, "hidden_size", None)
