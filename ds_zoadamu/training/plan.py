"""Everything a run needs, checked before a model is loaded or a file is written."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed.utils import logger
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ds_zoadamu.config import Config, load
from ds_zoadamu.config.auto import STEPS_OF_A_RUN, hidden_size_of
from ds_zoadamu.config.known import check_known
from ds_zoadamu.config.sections import check_stage, value_at
from ds_zoadamu.config.settings import check_precision, read_config
from ds_zoadamu.distributed.start import launched_rank, launched_world_size
from ds_zoadamu.files import hub
from ds_zoadamu.hf.kinds import ModelKind, language_part
from ds_zoadamu.rules import import_modules
from ds_zoadamu.tasks import InputError, Task, TaskData, load_splits
from ds_zoadamu.training.arguments import check_arguments, task_from
from ds_zoadamu.training.tuning import Tuning, tuning_from


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """A task bound to a model, and what else is known of the model without its weights.

    Attributes:
        data: the task without the model.
        hidden_size: of the model; None where its configuration does not say.
        tuning: what of the model is trained.
        kind: of the model.
    """

    data: TaskData
    task: Task
    tokenizer: PreTrainedTokenizerBase
    hidden_size: int | None
    tuning: Tuning
    kind: ModelKind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's checked input.

    Attributes:
        config: the DeepSpeed configuration; None where none is read.
        tuning: what of the model is trained.
        kind: of the model.
        sets: "train", "dev" and "test": encoded examples.
    """

    args: Namespace
    config: Config | None
    task: Task
    tokenizer: PreTrainedTokenizerBase
    tuning: Tuning
    kind: ModelKind
    sets: Mapping[str, Sequence[Any]]

    @property
    def num_examples(self) -> dict[str, int]:
        """Of each set."""
        return {name: len(examples) for name, examples in self.sets.items()}

    def task_identity(self) -> dict[str, str]:
        """What a run is trained and judged on, for the header of its journal: the metric, and SHA-256 of each encoded set."""
        digests = {f"{name}_sha256": self.task.digest(examples) for name, examples in self.sets.items()}
        further = self.task.identity([example for examples in self.sets.values() for example in examples])
        return {"metric": self.task.main_metric.name, **digests, **further, **self.tuning.identity()}

    def baseline(self, split: str) -> float | None:
        """The value of the metric's baseline on "dev" or "test"; None where there is none."""
        return self.task.baseline(self.sets[split]) if self.task.main_metric.baseline else None


def read_model_input(args: Namespace) -> ModelInput:
    """Reads the task, and the model's configuration and tokenizer without its weights.

    Raises:
        ConfigError: the model is of no kind, see `model_kind`.
        InputError: what is wrong with --task, --template, --label_words, --model_name_or_path or --max_length.
    """
    import_modules(args.modules)
    config = _load(AutoConfig, args)
    kind, part = language_part(config)
    data, tuning = task_from(args, kind), tuning_from(args, config, kind)
    tokenizer = _load(AutoTokenizer, args)
    sizes = {"max_length": args.max_length, "batch_size": args.per_device_eval_batch_size}
    task = data.bind(tokenizer, tuning.room_left(config), **sizes)
    for line in task.warnings if launched_rank() == 0 else ():
        logger.warning(f"task {task.name!r}: {line}")
    known = {"hidden_size": hidden_size_of(part), "tuning": tuning, "kind": kind}
    return ModelInput(data=data, task=task, tokenizer=tokenizer, **known)


def make_plan(args: Namespace, ranks: int | None = None) -> Plan:
    """Reads and checks arguments, DeepSpeed JSON, task, data and tokenizer; writes nothing, loads no weights.

    Args:
        args: of `finetune_parser`.
        ranks: for how many ranks (default: those the launcher started).

    Raises:
        InputError, ConfigError: what is wrong, where, and the remedy.
    """
    check_arguments(args)
    if args.deepspeed_config is None:
        raise InputError("--deepspeed_config is missing; give a DeepSpeed JSON, for example one of ds_configs/")
    given = read_config(args.deepspeed_config)
    check_known(given)
    if "optimizer" not in given:
        raise InputError(
            f'{args.deepspeed_config} has no "optimizer"; add one, for example '
            '{"type": "ZOAdaMU", "params": {"lr": "auto", "total_steps": "auto"}}'
        )
    check_stage(given, f"{args.deepspeed_config}: ")
    model_input = read_model_input(args)
    overrides = model_input.tuning.overrides(args, given)
    config = load(given, world_size=ranks or launched_world_size(), model_info=model_input, overrides=overrides)
    check_steps(config, args.max_steps)
    check_precision(config)
    check_gradient(config, model_input.task)
    return encode_splits(args, config, model_input)


def encode_splits(args: Namespace, config: Config | None, model_input: ModelInput) -> Plan:
    """The plan of a run whose configuration is filled; reads the data.

    Raises:
        InputError: as `load_splits`.
    """
    task, data_seed = model_input.task, args.seed if args.data_seed is None else args.data_seed
    sizes = {name: getattr(args, name) for name in ("num_train", "num_dev", "num_test", "examples_per_class")}
    rows = load_splits(model_input.data, args.data_dir, **sizes, seed=data_seed)
    check_one_step(config, rows, args.data_dir)
    sets = {name: list(map(task.encode, part)) for name, part in rows.items()}
    for name, split in (("training", "train"), ("development", "dev")) if launched_rank() == 0 else ():
        for line in task.remarks(name, sets[split]):
            logger.warning(line)
    known = {"tokenizer": model_input.tokenizer, "tuning": model_input.tuning, "kind": model_input.kind}
    return Plan(args=args, config=config, task=task, sets=sets, **known)


def check_one_step(config: Config | None, rows: Mapping[str, Sequence[Any]], data_dir: str | None) -> None:
    """Refuses a training set that is smaller than one step.

    Raises:
        InputError: says also where the other rows went.
    """
    if config is None or config.batch.train is None or config.batch.train <= len(rows["train"]):
        return
    train, dev, batch = len(rows["train"]), len(rows["dev"]), config.batch
    where = f"--data_dir {data_dir}" if data_dir else "the data set"
    raise InputError(
        f"{where}: of the rows of its training split {train} are for training and {dev} for development, and one step takes "
        f"{batch.train} (--per_device_train_batch_size {batch.micro} x "
        f"--gradient_accumulation_steps {batch.accumulation} x {config.world_size} ranks): lower one of them or --num_dev, or "
        "give more rows"
    )


def check_gradient(config: Config, task: Task) -> None:
    """Refuses to train without a gradient by an optimizer that needs one.

    Raises:
        InputError: names --objective and the optimizer.
    """
    if config.rule is None and not task.differentiable:
        raise InputError(
            f"--objective {task.details['objective']} has no gradient, and {config.optimizer} needs one: take a zeroth-order "
            "optimizer, or another objective"
        )


def check_steps(config: Config, max_steps: int) -> None:
    """Refuses a run that is longer than the schedule of its configuration, at whose end the lr may be 0.

    Raises:
        InputError: names --max_steps and the setting.
    """
    for path in STEPS_OF_A_RUN:
        planned = value_at(config.deepspeed, path)
        if isinstance(planned, int) and max_steps > planned:
            raise InputError(
                f'--max_steps {max_steps} is more than the {planned} steps of {path} in the DeepSpeed JSON; set that to "auto" '
                "or to the length of the run"
            )


def _load(kind, args: Namespace):
    path, what = args.model_name_or_path, kind.__name__[4:].lower()
    folder = Path(path).expanduser()
    if not folder.is_dir() and not hub.is_hub_name(path):
        raise InputError(f"--model_name_or_path {path}: {hub.not_here(path)}")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise InputError(
            f"--model_name_or_path {path} is the folder of an adapter; give its base there, and the folder as --adapter of "
            "evaluate"
        )
    offline = None if folder.is_dir() else hub.out_of_reach()
    try:
        # Without a value Transformers would ask on the terminal, on every rank.
        return kind.from_pretrained(path, trust_remote_code=args.trust_remote_code, local_files_only=offline is not None)
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"--model_name_or_path {path}: its {what} is Python code in that folder; read it, and if you trust it give "
                "--trust_remote_code"
            ) from error
        if offline is not None:
            raise InputError(
                f"--model_name_or_path {path}: it is no folder here, the hub cannot be asked ({offline}), and its cache here "
                f"has no {what} of that name; give a folder, or load the model once where there is a network"
            ) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        place = "no {} there" if folder.is_dir() else "it is no folder here, and the hub gave no {} of that name"
        raise InputError(f"--model_name_or_path {path}: {place.format(what)}: {reason}") from error
