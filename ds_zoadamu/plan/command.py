"""`ds_zoadamu plan`: does a model fit, with which settings, how long is a step."""

import argparse
import math

from ..config.adapters import read_adapter
from ..config.sections import value_at
from ..config.settings import read_config
from ..distributed.start import launched_rank
from ..errors import ConfigError
from .choose import Choice, Request, choose
from .configs import load_for_plan, matching_config, write_config
from .gathers import GatherSettings
from .memory import GB, Model
from .models import load_config
from .report import full_report
from .step_time import HARDWARE, Hardware, StepTime, estimate_step

_MAX_MEMORY_GB = 4096  # the largest single GPU has a few hundred; more is another unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command. Numbers are read as text, so that their errors are ours."""
    parser.add_argument(
        "--model", help="facebook/opt-125m ... facebook/opt-175b (built in), a folder with config.json, or a hub name"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="train a PEFT adapter only: folder with its adapter_config.json (needs peft)"
    )
    parser.add_argument("--gpus", default="1", help="number of GPUs, of one machine (default: %(default)s)")
    parser.add_argument("--gpu-memory", help="of each GPU, decimal GB (default: that of --gpu)")
    parser.add_argument(
        "--gpu", default="a100-80gb", help=f"whose published figures to use: {', '.join(HARDWARE)} (default: %(default)s)"
    )
    parser.add_argument("--config", help="DeepSpeed JSON to plan for; without it the plan starts from its own")
    parser.add_argument(
        "--batch", help="sequences in a micro-batch of each GPU (default: the JSON's, else the largest power of two that fits)"
    )
    parser.add_argument("--seq", default="2048", help="tokens in a sequence (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights where the JSON leaves it open"
    )
    parser.add_argument(
        "--steps",
        default="20000",
        help="total_steps where the JSON leaves it open: decides replay's window (default: %(default)s)",
    )
    parser.add_argument(
        "--host-memory", help="of the machine, decimal GB; given, weights and momentum in host memory are considered"
    )
    parser.add_argument("--reserve", help="GB of each GPU for what cannot be counted (default: 5 %% of it)")
    parser.add_argument("--write", metavar="FILE", help="write the matching DeepSpeed JSON")
    parser.add_argument(
        "--rehearse", action="store_true", help="under the launcher: random weights at reduced depth, two steps, measured bytes"
    )
    parser.add_argument("--rehearse-layers", default="2", help="layers of that model (default: %(default)s)")
    parser.add_argument(
        "--table", action="store_true", help="print the largest OPT for each method on 1 to 8 GPUs (the paper's Table 5)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw bytes a GPU over model size for each method (the paper's Figure 3)"
    )
    group = parser.add_argument_group("hardware figures, in place of the published ones")
    group.add_argument("--tflops", help="dense 16-bit matrix arithmetic, 1e12 a second")
    group.add_argument("--efficiency", help="share of the arithmetic that is reached (default: 0.5, an assumption)")
    group.add_argument("--link-gb", help="GB a second that a GPU receives from the others")
    group.add_argument("--link-efficiency", help="share of that which is reached (default: 0.7, an assumption)")
    group.add_argument("--drive-gb", help="GB a second of the NVMe drive, for all GPUs together (default: 7, an assumption)")
    group.add_argument("--instructions", help="32-bit instructions, 1e12 a second")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for. 0: done and it fits; 3: it does not fit. Raises ConfigError for what the user can put right."""
    length = integer("--seq", args.seq, 2, 2**20)
    if args.table:
        from .table import table

        print(table(length))
    if args.plot:
        from .plot import draw

        draw(args.plot, integer("--gpus", args.gpus, 1, 65536), _capacity(args), length)
        print(f"drawn: {args.plot}")
    if args.model is None:
        if args.table or args.plot:
            return 0
        raise ConfigError("--model is missing; give for example --model facebook/opt-13b, or --table")
    given = None if args.config is None else read_config(args.config)
    model, request, choice, hardware = make_plan(args, given)
    if args.rehearse:
        return _rehearse(args, given, model, request, choice)
    print(full_report(model, request, choice, step_time(model, request, choice, hardware), hardware))
    if args.write:
        if not choice.fits:
            raise ConfigError(f"--write {args.write}: not written, since the plan does not fit")
        write_config(args.write, matching_config(given, model, choice))
        print(f"written: {args.write}")
    return 0 if choice.fits else 3


def _rehearse(args: argparse.Namespace, given: dict | None, model: Model, request: Request, choice: Choice) -> int:
    """0: weights and momentum are as planned on this rank, to the byte; 3: they are not."""
    from .rehearse import rehearse

    result = rehearse(args, given, model, request, choice, integer("--rehearse-layers", args.rehearse_layers, 1, 10_000))
    if launched_rank() == 0:
        print(result.text(), flush=True)
    return 0 if result.exact else 3


def make_plan(args: argparse.Namespace, given: dict | None) -> tuple[Model, Request, Choice, Hardware]:
    """Everything the command works out, from its arguments and the JSON of --config. Raises ConfigError."""
    hardware = _hardware(args)
    world_size = integer("--gpus", args.gpus, 1, 65536)
    capacity = _capacity(args)
    batch = None if args.batch is None else integer("--batch", args.batch, 1, 2**20)
    model_config = load_config(args.model)
    config = load_for_plan(
        given,
        args.config,
        world_size=world_size,
        model_info=model_config,
        steps=integer("--steps", args.steps, 1, 2**32 - 1),
        dtype=args.dtype,
        micro_batch=batch,
    )
    given_batch = value_at(given, "train_micro_batch_size_per_gpu")
    if batch is None and isinstance(given_batch, int):
        batch = given_batch
    rule = config.make_rule()
    storages = rule.storages()
    if any(value_at(given, f"optimizer.params.{path}") is not None for s in storages.values() for path in s.options):
        storages = {}  # the JSON says which
    request = Request(
        world_size=world_size,
        capacity=capacity,
        length=integer("--seq", args.seq, 2, 2**20),
        micro_batch=batch,
        accumulation=config.batch.accumulation,
        offload=config.offload.device != "none",
        drive=config.offload if config.offload.on_nvme else None,
        host_memory=None if args.host_memory is None else int(gigabytes("--host-memory", args.host_memory, 1e6) * GB),
        reserve=None if args.reserve is None else int(number("--reserve", args.reserve, 0.0, capacity / GB) * GB),
        settings=GatherSettings.from_config(config),
        rule=rule,
        storages=storages,
    )
    adapter = None if args.adapter is None else read_adapter(args.adapter)
    model = Model.build(args.model, model_config, config.precision, adapter)
    config.offload.check_partition_sizes(((size.name, size.numel) for size in model.sizes), world_size)
    return model, request, choose(model, request), hardware


def step_time(model: Model, request: Request, choice: Choice, hardware: Hardware) -> StepTime:
    """Of what `make_plan` gives."""
    text = model.module.config.get_text_config()
    return estimate_step(
        model, choice.plan, hardware, accumulation=request.accumulation,
        layers=getattr(text, "num_hidden_layers", 0), hidden=getattr(text, "hidden_size", 0), offload=choice.offload,
    )  # fmt: skip


def _hardware(args: argparse.Namespace) -> Hardware:
    key = str(args.gpu).lower()
    if key not in HARDWARE:
        raise ConfigError(
            f"--gpu {args.gpu}: not known; known are {', '.join(HARDWARE)}; choose the nearest and override its figures"
        )
    names = {"tflops": 1e5, "efficiency": 1.0, "link_gb": 1e5, "link_efficiency": 1.0, "drive_gb": 1e5, "instructions": 1e5}
    given = {name: getattr(args, name) for name in names}
    return HARDWARE[key].with_overrides(
        **{n: None if v is None else number("--" + n.replace("_", "-"), v, 0.0, names[n], above=True) for n, v in given.items()}
    )


def _capacity(args: argparse.Namespace) -> int:
    if args.gpu_memory is None:
        return int(_hardware(args).memory_gb * GB)
    return int(gigabytes("--gpu-memory", args.gpu_memory, _MAX_MEMORY_GB) * GB)


def gigabytes(option: str, text: str, high: float) -> float:
    """A plain number of decimal GB. Raises ConfigError for a unit behind it, and for a number that can only be bytes or MB."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(
            f"{option} {text}: give a plain number of decimal GB (10^9 bytes), for example {option} 80; 80 GiB are 85.9"
        ) from None
    if math.isfinite(value) and value > high:
        raise ConfigError(
            f"{option} {text}: that is {value:g} GB, more than {high:g}; the unit is decimal GB (10^9 bytes), "
            f"for example {option} 80"
        )
    return number(option, text, 0.0, high, above=True)


def number(option: str, text: str, low: float, high: float, *, above: bool = False) -> float:
    """A number in [low, high], or (low, high] with ``above``. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{option} {text}: must be a number") from None
    if not low <= value <= high or (above and value == low):
        raise ConfigError(f"{option} {text}: must be {'>' if above else '>='} {low:g} and <= {high:g}")
    return value


def integer(option: str, text: str, low: int, high: int) -> int:
    """An integer in [low, high]. Raises ConfigError."""
    try:
        value = int(str(text))
    except ValueError:
        raise ConfigError(f"{option} {text}: must be an integer") from None
    if not low <= value <= high:
        raise ConfigError(f"{option} {text}: must be >= {low} and <= {high}")
    return value
