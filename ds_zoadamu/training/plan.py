"""Everything a run needs, checked before a model is loaded or a file is written."""

import os
import socket
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig, AutoTokenizer

from ds_zoadamu.config import check_config, read_config
from ds_zoadamu.tasks import (
    EncodedExample,
    InputError,
    PromptCollator,
    PromptEncoder,
    Task,
    load_splits,
    majority_accuracy,
    model_max_length,
)
from ds_zoadamu.training.arguments import check_arguments, task_from
from ds_zoadamu.training.auto_config import fill_auto


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's checked input.

    Attributes:
        config: the DeepSpeed configuration without "auto".
        train, dev, test: token ids.
        dev_majority, test_majority: accuracy of the most frequent label.
    """

    args: Namespace
    task: Task
    config: dict
    tokenizer: object
    collate: PromptCollator
    train: Sequence[EncodedExample]
    dev: Sequence[EncodedExample]
    test: Sequence[EncodedExample]
    dev_majority: float
    test_majority: float


def make_plan(args: Namespace, config: dict | None = None) -> Plan:
    """Reads and checks arguments, DeepSpeed JSON, task, data and tokenizer; writes nothing, loads no weights.

    Args:
        args: of `finetune_parser` (or with the same names).
        config: used in place of the JSON that `args.deepspeed_config` names.

    Raises:
        InputError, ConfigError: what is wrong, where, and the remedy.
    """
    check_arguments(args)
    task = task_from(args)
    if config is None:
        config = read_config(args.deepspeed_config)
    model_config = _load(AutoConfig, args.model_name_or_path)
    # Models with several parts keep the language model's sizes in a section of their own.
    text_config = model_config.get_text_config()
    config = fill_auto(config, args, world_size=world_size(), hidden_size=getattr(text_config, "hidden_size", None))
    check_config(config)
    tokenizer = _load(AutoTokenizer, args.model_name_or_path)
    encoder = PromptEncoder(tokenizer, task, model_max_length(text_config, tokenizer, args.max_length))
    data_seed = args.seed if args.data_seed is None else args.data_seed
    splits = load_splits(task, args.data_dir, num_train=args.num_train, num_dev=args.num_dev, seed=data_seed)
    # Padding is masked, so any id will do where a tokenizer has none for it.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Plan(
        args=args,
        task=task,
        config=config,
        tokenizer=tokenizer,
        collate=PromptCollator(pad),
        train=[encoder.encode(example) for example in splits.train],
        dev=[encoder.encode(example) for example in splits.dev],
        test=[encoder.encode(example) for example in splits.test],
        dev_majority=majority_accuracy(splits.dev),
        test_majority=majority_accuracy(splits.test),
    )


def world_size() -> int:
    """Number of ranks, known from the launcher before the process group exists; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's rank, known from the launcher before the process group exists."""
    return int(os.environ.get("RANK", "0"))


def ensure_launched() -> None:
    """Without a launcher, describes a group of one rank in the environment, as the launcher would for one device."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _load(kind, path: str):
    try:
        return kind.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path {path}: no {kind.__name__[4:].lower()} there: {error}") from error
