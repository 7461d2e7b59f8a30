"""What must be equal between contenders, checked before anything runs."""

import itertools
from argparse import Namespace
from collections.abc import Sequence

from deepspeed.accelerator import get_accelerator

from ds_zoadamu.benchmark.arguments import shared_arguments
from ds_zoadamu.benchmark.contenders import LOMO, Contender
from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.config import Config, load
from ds_zoadamu.config.auto import DEFAULT_MICRO_BATCH_SIZE
from ds_zoadamu.config.settings import check_precision
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError, Metric
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.lomo import check_lomo
from ds_zoadamu.training.plan import ModelInput, check_gradient, encode_splits, read_model_input

_EQUAL = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "precision")


def check_settings(args: Namespace, contenders: Sequence[Contender], grids: dict[str, list[Point]]) -> tuple[dict, Metric]:
    """Checks task, data, model and every contender's filled configuration; loads no weights, writes nothing.

    Returns:
        batch (the settings that are equal for all), num_examples, the values of the metric's baseline; and the metric.

    Raises:
        InputError, ConfigError: what is wrong, in which contender, and the remedy.
    """
    run_args = finetune_args(args, max_steps=args.max_steps or 1)
    model_input = read_model_input(run_args)
    metric = model_input.task.main_metric
    _check_target(args.target, metric)
    filled = {c.name: _filled(args, c, grids[c.name], model_input) for c in contenders if c.config is not None}
    batch = _equal({name: _batch_settings(config) for name, config in filled.items()}) or _plain_batch(args)
    if any(c.name == LOMO for c in contenders):
        check_lomo(batch["gradient_accumulation_steps"], batch["precision"], model_input.task)
    plan = encode_splits(finetune_args(args, max_steps=1, seed=args.seeds[0]), None, model_input)
    if batch["train_batch_size"] > plan.num_examples["train"]:
        raise InputError(
            f"--num_train {plan.num_examples['train']} is less than one step's {batch['train_batch_size']} examples"
        )
    common = {"batch": batch, "num_examples": plan.num_examples}
    if metric.baseline is not None:
        common[metric.baseline.name] = {split: plan.baseline(split) for split in ("dev", "test")}
    return common, metric


def _check_target(target: float | None, metric: Metric) -> None:
    if target is None or (metric.improves(target, metric.worst) and not metric.improves(target, metric.best)):
        return
    beyond, most = ("above", "at most") if metric.higher_is_better else ("below", "at least")
    raise InputError(f"--target must be {beyond} {metric.worst:g} and {most} {metric.best:g} ({metric.name}), got {target}")


def finetune_args(args: Namespace, point: Point | None = None, **more: object) -> Namespace:
    """launch/finetune.py's own reading of a run's arguments."""
    words = [*shared_arguments(args), *(point.arguments if point else []), "--output_dir", args.output_dir]
    for name, value in more.items():
        words += [f"--{name}", str(value)]
    return finetune_parser().parse_args(words)


def _filled(args: Namespace, contender: Contender, points: Sequence[Point], model_input: ModelInput) -> Config:
    """The configuration of the last point; all of them and all seeds are checked."""
    try:
        for seed, steps, point in itertools.product(args.seeds, _lengths(args), points):
            run_args = finetune_args(args, point, max_steps=steps, seed=seed)
            config = load(contender.config, world_size=args.ranks, model_info=model_input, overrides=run_args)
        check_gradient(config, model_input.task)
        if get_accelerator().is_synchronized_device():  # a CPU; this process keeps off a GPU, where each run asks for itself
            check_precision(config)
    except (InputError, ConfigError) as error:
        raise type(error)(f"{contender.name}: {error}") from error
    return config


def _lengths(args: Namespace) -> set[int]:
    """Steps of a run and of a trial, as far as they are known before the profiles."""
    steps = args.max_steps or 1000
    return {steps, args.trial_steps or max(1, steps // 4)}


def _batch_settings(config: Config) -> dict:
    batch = config.batch
    return dict(zip(_EQUAL, (batch.train, batch.micro, batch.accumulation, config.precision), strict=True))


def _equal(settings: dict[str, dict]) -> dict | None:
    """The settings that all share; None where there are none. Raises InputError."""
    differences = []
    for key in _EQUAL:
        values = {name: each[key] for name, each in settings.items()}
        if len(set(values.values())) > 1:
            differences.append(f"{key} is " + ", ".join(f"{value} in {name}" for name, value in values.items()))
    if differences:
        raise InputError(
            "contenders differ in what must be equal: "
            + "; ".join(differences)
            + '. Make them equal, or "auto" in every JSON and give --per_device_train_batch_size, '
            "--gradient_accumulation_steps, --bf16 or --fp16"
        )
    return next(iter(settings.values()), None)


def _plain_batch(args: Namespace) -> dict:
    """Where no contender has a JSON."""
    micro, accumulation = args.per_device_train_batch_size or DEFAULT_MICRO_BATCH_SIZE, args.gradient_accumulation_steps or 1
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return dict(zip(_EQUAL, (micro * accumulation * args.ranks, micro, accumulation, precision), strict=True))
