"""Everything a run needs, checked before a model is loaded or a file is written."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed.utils import logger
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ds_zoadamu.config import Config, load
from ds_zoadamu.config.auto import STEPS_OF_A_RUN, hidden_size_of
from ds_zoadamu.config.sections import check_stage, value_at
from ds_zoadamu.config.settings import check_precision, read_config
from ds_zoadamu.distributed.start import launched_rank, launched_world_size
from ds_zoadamu.rules import import_modules
from ds_zoadamu.tasks import (
    EncodedExample,
    Example,
    InputError,
    PromptCollator,
    PromptEncoder,
    Task,
    encoded_sha256,
    load_splits,
    majority_accuracy,
    model_max_length,
    padding_id,
)
from ds_zoadamu.training.arguments import check_arguments, task_from


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """How a task's examples reach a model.

    Attributes:
        hidden_size: of the model; None where its configuration does not say.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    collate: PromptCollator
    hidden_size: int | None

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Token ids of examples."""
        return [self.encoder.encode(example) for example in examples]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's checked input.

    Attributes:
        config: the DeepSpeed configuration; None where none is read.
        train, dev, test: token ids.
        dev_majority, test_majority: accuracy of the most frequent label.
    """

    args: Namespace
    config: Config | None
    model_input: ModelInput
    train: Sequence[EncodedExample]
    dev: Sequence[EncodedExample]
    test: Sequence[EncodedExample]
    dev_majority: float
    test_majority: float

    def task_identity(self) -> dict[str, str]:
        """What a run is trained and judged on, for the header of its journal: the metric, and SHA-256 of each encoded set."""
        sets = {"train": self.train, "dev": self.dev, "test": self.test}
        return {"metric": "accuracy", **{f"{name}_sha256": encoded_sha256(examples) for name, examples in sets.items()}}


def read_model_input(args: Namespace) -> ModelInput:
    """Reads the task, and the model's configuration and tokenizer without its weights.

    Raises:
        InputError: what is wrong with --task, --template, --label_words, --model_name_or_path or --max_length.
    """
    task = task_from(args)
    # Models with several parts keep the language model's sizes in a section of their own.
    config = _load(AutoConfig, args).get_text_config()
    tokenizer = _load(AutoTokenizer, args)
    vocab_size = getattr(config, "vocab_size", None)
    encoder = PromptEncoder(tokenizer, task, model_max_length(config, tokenizer, args.max_length), vocab_size)
    for line in encoder.warnings if launched_rank() == 0 else ():
        logger.warning(f"task {task.name!r}: {line}")
    return ModelInput(
        task=task,
        tokenizer=tokenizer,
        encoder=encoder,
        collate=PromptCollator(padding_id(tokenizer, vocab_size)),
        hidden_size=hidden_size_of(config),
    )


def make_plan(args: Namespace, ranks: int | None = None) -> Plan:
    """Reads and checks arguments, DeepSpeed JSON, task, data and tokenizer; writes nothing, loads no weights.

    Args:
        args: of `finetune_parser`.
        ranks: for how many ranks (default: those the launcher started).

    Raises:
        InputError, ConfigError: what is wrong, where, and the remedy.
    """
    check_arguments(args)
    import_modules(args.modules)
    if args.deepspeed_config is None:
        raise InputError("--deepspeed_config is missing; give a DeepSpeed JSON, for example one of ds_configs/")
    given = read_config(args.deepspeed_config)
    if "optimizer" not in given:
        raise InputError(
            f'{args.deepspeed_config} has no "optimizer"; add one, for example '
            '{"type": "ZOAdaMU", "params": {"lr": "auto", "total_steps": "auto"}}'
        )
    check_stage(given, f"{args.deepspeed_config}: ")
    model_input = read_model_input(args)
    config = load(given, world_size=ranks or launched_world_size(), model_info=model_input, overrides=args)
    check_steps(config, args.max_steps)
    check_precision(config)
    return encode_splits(args, config, model_input)


def encode_splits(args: Namespace, config: Config | None, model_input: ModelInput) -> Plan:
    """The plan of a run whose configuration is filled; reads the data.

    Raises:
        InputError: as `load_splits`.
    """
    data_seed = args.seed if args.data_seed is None else args.data_seed
    splits = load_splits(model_input.task, args.data_dir, num_train=args.num_train, num_dev=args.num_dev, seed=data_seed)
    for name, examples in (("training", splits.train), ("development", splits.dev)):
        absent = set(range(model_input.task.num_labels)) - {example.label for example in examples}
        if absent and launched_rank() == 0:
            words = ", ".join(repr(model_input.task.words[label]) for label in sorted(absent))
            logger.warning(f"no {name} example has the label of {words}: scores on that set say nothing of it")
    return Plan(
        args=args,
        config=config,
        model_input=model_input,
        train=model_input.encode(splits.train),
        dev=model_input.encode(splits.dev),
        test=model_input.encode(splits.test),
        dev_majority=majority_accuracy(splits.dev),
        test_majority=majority_accuracy(splits.test),
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
    try:
        # Without a value Transformers would ask on the terminal, on every rank.
        return kind.from_pretrained(path, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"--model_name_or_path {path}: its {what} is Python code in that folder; read it, and if you trust it give "
                "--trust_remote_code"
            ) from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"--model_name_or_path {path}: no {what} there: {reason}") from error
