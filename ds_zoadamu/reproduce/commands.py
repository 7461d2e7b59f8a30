"""The commands of a table's runs: ``finetune`` for a method that trains, ``evaluate`` for the others."""

import copy
from argparse import Namespace
from pathlib import Path

from ds_zoadamu.benchmark.grid import Point
from ds_zoadamu.benchmark.outcomes import EVALUATION
from ds_zoadamu.benchmark.plans import threads_of
from ds_zoadamu.benchmark.runs import Run
from ds_zoadamu.config import shipped
from ds_zoadamu.config.settings import read_config
from ds_zoadamu.reproduce.cells import Cell, micro_batches
from ds_zoadamu.reproduce.published import Method
from ds_zoadamu.rules import RULES

_SHARED = ("max_length", "per_device_eval_batch_size", "num_test")
_SWITCHES = ("bf16", "fp16", "trust_remote_code")
_EVERY_STEPS = 500  # steps between checkpoints: what a killed run replays at most


class Commands:
    """Plans runs.

    Args:
        args: of `with_budget`.
    """

    def __init__(self, args: Namespace):
        self._args = args
        self.output = Path(args.output_dir)
        self.threads = args.threads or threads_of(args.ranks)

    def run(self, cell: Cell, seed: int, point: Point | None = None) -> Run:
        """The run of a cell with a seed; of a method that trains also with an lr and zo_eps of its grid."""
        train = point is not None
        name = (f"{point.label}-steps{cell.max_steps}-" if train else "") + f"seed{seed}"
        words = [*self._shared(cell), *(self._training(cell, seed, point) if train else self._measuring(cell, seed))]
        return Run(
            folder=self.output / "runs" / cell.task / cell.method.name / name,
            command="finetune" if train else "evaluate",
            arguments=tuple(words), ranks=self._args.ranks, threads=self.threads, title=f"{cell.title}: {name}",
            output=("--output_dir", "out") if train else ("--output_file", f"out/{EVALUATION}"),
            resumes=cell.method.zeroth_order,
        )  # fmt: skip

    def config_path(self, method: Method) -> Path:
        """Where the DeepSpeed JSON of a method lies."""
        return self.output / "configs" / f"{method.name}.json"

    def _shared(self, cell: Cell) -> list[str]:
        args = self._args
        words = [word for module in args.modules for word in ("--import", module)]
        words += ["--model_name_or_path", args.model, "--task", cell.task]
        words += ["--data_dir", str(cell.data_dir)] if cell.data_dir else []
        words += [word for name in _SHARED for word in _option(name, getattr(args, name))]
        return words + [f"--{name}" for name in _SWITCHES if getattr(args, name)]

    def _training(self, cell: Cell, seed: int, point: Point) -> list[str]:
        args, settings = self._args, cell.settings
        micro, accumulation = micro_batches(args, settings.batch_size)
        words = [
            "--deepspeed",
            "--deepspeed_config",
            str(self.config_path(cell.method)),
            *self._examples(cell, "num_train", "num_dev"),
        ]
        words += ["--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(accumulation)]
        words += [*point.arguments, "--max_steps", str(cell.max_steps), "--seed", str(seed)]
        words += [] if cell.method.tuning == "full" else [f"--{cell.method.tuning}"]
        words += ["--weight_decay", repr(settings.weight_decay)] if settings.weight_decay else []
        words += _option("objective", cell.objective) + _option("eval_steps", args.eval_steps)
        return words + (["--resume", "--save_steps", str(_EVERY_STEPS)] if cell.method.zeroth_order else [])

    def _measuring(self, cell: Cell, seed: int) -> list[str]:
        method = cell.method
        words = ["--overwrite_output_file"]  # of a run that was stopped before its folder got its name
        if method.demonstrations:
            words += ["--demonstrations", str(method.demonstrations), "--seed", str(seed)]
        if method.linear_probing:
            words += ["--linear_probing", *self._examples(cell, "num_train"), "--seed", str(seed)]
        return words

    def _examples(self, cell: Cell, *names: str) -> list[str]:
        if cell.examples_per_class is not None:
            return ["--examples_per_class", str(cell.examples_per_class)]
        return [word for name in names for word in _option(name, getattr(self._args, name))]


def config_of(method: Method) -> dict:
    """The DeepSpeed JSON of a method that trains: constant lr without gradients, a decaying one for Adam, as published."""
    if not method.zeroth_order:
        adam = read_config(shipped.path_of("cpu-small_adamw"))
        decay = read_config(shipped.path_of("cpu-small_zoadamu"))["scheduler"]
        return {**adam, "scheduler": decay}
    config = copy.deepcopy(read_config(shipped.path_of("cpu-small_zoadamu")))
    del config["scheduler"]
    # Without a backward pass nothing is used again soon, and looking for it takes DeepSpeed a time that grows with the square
    # of the number of modules, in every forward: generating with LoRA is many times slower.
    config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    options = dict(method.optimizer)
    kind, params = options.pop("type"), config["optimizer"]["params"]
    known = RULES[kind].config_class.names()
    if kind != "ZOAdaMU":
        del params["momentum"]  # that dtype is not for every rule
    params = {name: value for name, value in params.items() if name in known}
    config["optimizer"] = {"type": kind, "params": {**params, **options}}
    return config


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name}", str(value)]
