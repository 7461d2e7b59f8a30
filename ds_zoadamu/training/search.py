"""A cheap search for lr and zo_eps: short runs from the same weights, judged on the development set."""

import copy
import gc
import math
import time
from argparse import Namespace

from deepspeed import comm as dist

from ds_zoadamu.config import Config, load
from ds_zoadamu.console.progress import counted, say
from ds_zoadamu.distributed.start import launched_rank
from ds_zoadamu.errors import NonFiniteLossError, NonFiniteWeightsError
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.output import SEARCH, OutputDirectory, settings
from ds_zoadamu.training.plan import Plan, make_plan
from ds_zoadamu.training.steps import make_stepper


def find_lr(args: Namespace) -> list[dict]:
    """Tries all pairs of --find_lr_values and --find_eps_values; returns the trials, lowest development loss first.

    A trial's loss is infinite where training diverged, and the metric at its worst. Loss decides rather than the metric, which
    a short run moves by few examples. Costs evaluations of a step x max_steps x accumulation
    forwards a pair and one on the development set. Each trial loads
    the model afresh, so all start from the same weights.

    Raises:
        InputError, ConfigError: before a model is loaded or a file written.
    """
    output = OutputDirectory(args.output_dir, writes=launched_rank() == 0, overwrite=args.overwrite_output_dir)
    plan = make_plan(args)
    if plan.config.rule is None:
        raise InputError(f"--find_lr searches lr and zo_eps; the JSON's optimizer is {plan.config.optimizer}")
    rule = plan.config.make_rule()
    usual = plan.tuning.usual(type(rule))
    lrs, sizes = args.find_lr_values or usual.learning_rates, args.find_eps_values or (usual.zo_eps,)
    configs = [_with(plan.config, lr, zo_eps) for zo_eps in sizes for lr in lrs]
    forwards = len(rule.evaluations(1)) * args.max_steps * plan.config.batch.accumulation
    _print(
        f"{len(configs)} trials of {args.max_steps} steps, {forwards} forwards a rank each, "
        f"judged by the loss on {plan.num_examples['dev']} development examples"
    )
    output.begin()
    trials = []
    for config in counted(configs, "trials", "trial"):
        trials.append(_try(plan, config))
        _print(f"{len(trials)}/{len(configs)} {_row(trials[-1])}")
    trials.sort(key=lambda trial: trial["dev_loss"])
    output.write_json(SEARCH, {"trials": trials, **settings(args, plan.config)})
    header = f"{'lr':>10} {'zo_eps':>10} {'dev loss':>10} {plan.task.main_metric.name:>10} {'seconds':>10}"
    _print("\n".join([header, *map(_row, trials)]))
    return trials


def _try(plan: Plan, config: Config) -> dict:
    start, metric = time.perf_counter(), plan.task.main_metric
    loss, value = math.inf, metric.worst
    stepper = make_stepper(plan, config)
    try:
        for _ in range(plan.args.max_steps):
            stepper.step()
        score = plan.task.evaluate(stepper.model, plan.sets["dev"])
        loss, value = score["loss"] if math.isfinite(score["loss"]) else math.inf, score[metric.name]
    except NonFiniteWeightsError:
        raise
    except NonFiniteLossError:  # raised on all ranks alike
        pass
    stepper.close()
    del stepper
    gc.collect()  # engine and module refer to each other
    dist.barrier()
    scores = {"dev_loss": loss, f"dev_{metric.name}": value}
    return {"lr": config.options.lr, "zo_eps": config.options.zo_eps, **scores, "seconds": time.perf_counter() - start}


def _with(config: Config, lr: float, zo_eps: float) -> Config:
    """The configuration with another lr (also at the end of a scheduler's warm-up) and zo_eps. Raises ConfigError."""
    given = copy.deepcopy(config.deepspeed)
    given["optimizer"]["params"].update(lr=lr, zo_eps=zo_eps)
    if "warmup_max_lr" in given.get("scheduler", {}).get("params", {}):
        given["scheduler"]["params"]["warmup_max_lr"] = lr
    return load(given, world_size=config.world_size)


def _row(trial: dict) -> str:
    lr, zo_eps, loss, *_, seconds = trial.values()
    value = list(trial.values())[-2]  # the metric, which may be the loss
    shown = f"{loss:10.4f}" if math.isfinite(loss) else f"{'diverged':>10}"
    return f"{lr:10.3g} {zo_eps:10.3g} {shown} {value:10.4f} {seconds:10.1f}"


def _print(text: str) -> None:
    if launched_rank() == 0:
        say(text)
