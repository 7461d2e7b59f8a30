"""A model on a task without training."""

from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import deepspeed

from ds_zoadamu.config import load
from ds_zoadamu.config.known import check_known
from ds_zoadamu.config.sections import check_stage
from ds_zoadamu.config.settings import check_precision, read_config
from ds_zoadamu.distributed.start import launched_rank, launched_world_size
from ds_zoadamu.distributed.waiting import current_limit, limit_waits
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.hf.models import load_model
from ds_zoadamu.tasks import InputError, TaskData, load_splits
from ds_zoadamu.tasks.demonstrations import with_demonstrations
from ds_zoadamu.tasks.probing import fitted, require_scikit_learn
from ds_zoadamu.tasks.splits import drawn
from ds_zoadamu.training.arguments import check_arguments
from ds_zoadamu.training.output import settings
from ds_zoadamu.training.plan import read_model_input
from ds_zoadamu.training.tuning import Tuning

# Only these matter without training; without a JSON each rank keeps its ZeRO-3 partition in fp32.
_SECTIONS = ("zero_optimization", "bf16", "fp16")
# Nothing is used again soon, and DeepSpeed's look for it takes a time that grows with the square of the number of modules.
_DEFAULT = {"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 0}}


def measure(args: Namespace) -> dict:
    """Runs what launch/evaluate.py's arguments say; returns the evaluation, the metric's baseline and what was evaluated.

    Raises:
        InputError, ConfigError: before a model is loaded or a file written.
    """
    _check(args)
    given = read_config(args.deepspeed_config) if args.deepspeed_config else _DEFAULT
    check_known(given)
    model_input = read_model_input(args)
    check_stage(given, f"{args.deepspeed_config}: ")
    given = {name: given[name] for name in _SECTIONS if name in given}
    given["train_micro_batch_size_per_gpu"] = args.per_device_eval_batch_size
    config = load(given, world_size=launched_world_size(), model_info=model_input, overrides=args)
    check_precision(config)
    task = model_input.task
    rows, training = _rows(args, model_input.data)
    examples, training = list(map(task.encode, rows)), list(map(task.encode, training))
    model = load_model(args.model_name_or_path, config, trust_remote_code=args.trust_remote_code)
    model = model_input.tuning.loaded(model)
    engine, *_ = deepspeed.initialize(model=model, config=config.deepspeed)
    limit_waits(current_limit())
    with ExitStack() as probed:
        how = _way(args, model_input.tuning)
        if args.linear_probing:
            probe = fitted(task, engine.module, training, args.per_device_eval_batch_size)
            how |= {"linear_probing": {"num_train": len(training), "num_tokens": len(probe.tokens), "C": probe.strength}}
            probed.enter_context(probe.on(engine.module))
        result = task.evaluate(engine.module, examples)
    asked = {"task": task.name, "model": args.model_name_or_path, "split": args.split, **how}
    figures = {**asked, **{name: text for name, text in task.details.items() if name != "objective"}, **result}
    if (baseline := task.main_metric.baseline) is not None:
        figures[baseline.name] = task.baseline(examples)
    if launched_rank() == 0:
        print(*(f"{name}={value:.4f}" if isinstance(value, float) else f"{name}={value}" for name, value in figures.items()))
        if args.output_file:
            write_json(Path(args.output_file), {**figures, **settings(args, config)})
    return figures


def _check(args: Namespace) -> None:
    """Raises InputError, ConfigError: arguments that cannot work."""
    check_arguments(args)
    if args.output_file and Path(args.output_file).exists() and not args.overwrite_output_file:
        raise InputError(f"--output_file {args.output_file} exists; give another name or --overwrite_output_file")
    if args.output_file and not Path(args.output_file).absolute().parent.is_dir():
        raise InputError(f"--output_file {args.output_file}: there is no such folder; make it first")
    if args.objective is not None:
        raise InputError(f"--objective {args.objective}: nothing is trained here; leave it out")
    for name in ("num_train", "examples_per_class"):
        if not args.linear_probing and getattr(args, name) is not None:
            raise InputError(f"--{name} is an option of --linear_probing; give that too, or leave it out")
    if args.linear_probing:
        require_scikit_learn()
        if args.demonstrations or args.split == "train":
            other = "--demonstrations" if args.demonstrations else "--split train, whose examples it fits"
            raise InputError(f"--linear_probing does not go with {other}; give one of the two")


def _way(args: Namespace, tuning: Tuning) -> dict:
    """How the model came to be able to do the task, for results."""
    if tuning.adapter is not None:
        how = tuning.details()
    else:
        ways = (("in_context", args.demonstrations), ("linear_probing", args.linear_probing), ("zero_shot", True))
        how = {"tuning": next(name for name, given in ways if given)}
    return how | ({"demonstrations": args.demonstrations} if args.demonstrations else {})


def _rows(args: Namespace, data: TaskData) -> tuple[list, list]:
    """What is evaluated, and what a probe is fitted to."""
    rows, training = drawn(data.rows(args.split, args.data_dir), args.num_test, seed=0), []
    if args.demonstrations:
        pool = data.rows("train", args.data_dir)
        rows = with_demonstrations(data, rows, pool, args.demonstrations, args.seed)
    if args.linear_probing:
        counts = {"num_train": args.num_train, "examples_per_class": args.examples_per_class}
        training = load_splits(data, args.data_dir, **counts, seed=args.seed)["train"]
    return rows, training
