"""Ways of tuning: which parameters a run trains, and the settings it has where nobody gives others."""

import argparse
import copy
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ds_zoadamu.config.adapters import read_adapter, require_peft, with_adapter
from ds_zoadamu.config.sections import value_at
from ds_zoadamu.config.settings import zeroth_order_type
from ds_zoadamu.errors import shown
from ds_zoadamu.hf import adapters
from ds_zoadamu.hf.kinds import CAUSAL, ModelKind, language_part
from ds_zoadamu.rules import RULES, Rule
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.output import INITIAL

_EACH = {"lora": ("lora_rank", "lora_alpha", "lora_target_modules"), "prefix": ("prefix_tokens",)}
"""The options of each way."""


@dataclass(frozen=True)
class Usual:
    """lr and zo_eps of zeroth-order steps where nobody gives others, and the grid that --find_lr tries.

    Source: the settings of MeZO's and ZO-AdaMU's papers.
    """

    learning_rate: float
    zo_eps: float
    learning_rates: tuple[float, ...]


USUAL = {
    "lora": Usual(1e-4, 1e-2, (1e-5, 5e-5, 1e-4, 1e-3, 1e-2)),
    "prefix": Usual(1e-2, 1e-1, (1e-4, 1e-3, 5e-3, 1e-2, 5e-2)),
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What of a model is trained.

    Attributes:
        name: "full", "lora" or "prefix"; PEFT's name of an adapter that is there.
        adapter: PEFT's configuration; None: all parameters are trained.
        settings: as results have them.
        folder: of an adapter that is there.
    """

    name: str = "full"
    adapter: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None

    def usual(self, rule: type[Rule]) -> Usual:
        """What a run of this rule takes where nobody gives another value. A rule with learning rates of its own, as FZOO's are
        the length of a step, has them whatever is trained.
        """
        zo_eps = USUAL[self.name].zo_eps if self.name in USUAL else 1e-3
        if self.name not in USUAL or rule.usual_lrs != Rule.usual_lrs:
            return Usual(rule.usual_lrs[0], zo_eps, rule.usual_lrs)
        return USUAL[self.name]

    @property
    def num_tokens(self) -> int:
        """Positions that a prefix takes of the model's."""
        return getattr(self.adapter, "num_virtual_tokens", 0)

    def require_full(self, who: str) -> None:
        """Raises InputError, naming who trains all parameters, where an adapter is asked for."""
        if self.adapter is not None:
            raise InputError(f"--{self.name}: {who} trains all parameters; leave it out")

    def base(self, output: Path) -> Path | None:
        """The folder of what a journal's run begins with, where that is not the model itself."""
        return None if self.adapter is None else output / INITIAL

    def identity(self) -> dict[str, str]:
        """What makes a run on the same examples another one, for the header of its journal."""
        return {} if self.adapter is None else {"tuning": self.name, **{n: str(v) for n, v in self.settings.items()}}

    def details(self) -> dict:
        """For results."""
        return {"tuning": self.name, **self.settings}

    def room_left(self, config: Any) -> Any:
        """A model's configuration with the positions that are left for texts. Raises InputError where there are none."""
        if (positions := getattr(language_part(config)[1], "max_position_embeddings", None)) is None or not self.num_tokens:
            return config
        if positions <= self.num_tokens:
            raise InputError(
                f"a prefix of {self.num_tokens} tokens leaves no room for texts: the model has {positions} positions"
            )
        config = copy.deepcopy(config)
        language_part(config)[1].max_position_embeddings = positions - self.num_tokens
        return config

    def overrides(self, args: Namespace, given: Mapping) -> Namespace:
        """The arguments, with the usual lr and zo_eps where neither they nor the DeepSpeed JSON say anything."""
        filled = copy.copy(args)
        if self.adapter is not None and (rule := zeroth_order_type(given)) is not None:
            usual = self.usual(RULES[rule])
            if args.learning_rate is None and value_at(given, "optimizer.params.lr") == "auto":  # a JSON without is refused
                filled.learning_rate = usual.learning_rate
            if args.zo_eps is None and value_at(given, "optimizer.params.zo_eps") in (None, "auto"):
                filled.zo_eps = usual.zo_eps
        return filled

    def adapted(self, model: torch.nn.Module, tokenizer, seed: int) -> torch.nn.Module:
        """A partitioned model as it is trained. On all ranks. Raises ConfigError."""
        if self.adapter is None:
            return model
        vocab_size, count = model.config.get_text_config().vocab_size, self.num_tokens
        tokens = real_tokens(tokenizer, vocab_size, count, seed) if count else ()
        return adapters.adapted(model, copy.deepcopy(self.adapter), seed=seed, tokens=tokens)

    def loaded(self, model: torch.nn.Module) -> torch.nn.Module:
        """A partitioned model with the adapter of `folder`, if any. On all ranks. Raises ConfigError."""
        return model if self.folder is None else adapters.loaded(model, self.folder)


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """--lora, --prefix and their options."""
    group = parser.add_argument_group("way of tuning (default: all parameters); needs peft")
    which = group.add_mutually_exclusive_group()
    for name, text in (("lora", "low-rank additions to linear layers"), ("prefix", "keys and values before the text")):
        usual = USUAL[name]
        text += (
            f" alone are trained; of zeroth-order steps lr is {usual.learning_rate:g} and zo_eps {usual.zo_eps:g} where "
            "neither JSON nor arguments give others (FZOO keeps its own lr)"
        )
        which.add_argument(f"--{name}", action="store_true", help=text)
    group.add_argument("--lora_rank", type=int, help="columns of the additions (default: 8)")
    group.add_argument("--lora_alpha", type=float, help="the additions are multiplied by alpha / rank (default: 16)")
    names = "names of the layers with additions (default: queries and values, as PEFT knows them for the architecture)"
    group.add_argument("--lora_target_modules", nargs="+", metavar="NAME", help=names)
    tokens = "pairs of keys and values a layer, begun with those of as many tokens that the seed draws (default: 5)"
    group.add_argument("--prefix_tokens", type=int, help=tokens)
    group.add_argument("--merge", action="store_true", help="with --lora also write OUT/merged: the model with its additions")


def tuning_from(args: Namespace, config: Any, kind: ModelKind) -> Tuning:
    """The way of tuning that arguments ask for, tried on a model without weights.

    Args:
        args: of `finetune_parser` or `evaluate_parser`.
        config: of the Transformers model.
        kind: of the model.

    Raises:
        InputError: options that do not go together; layers that the model does not have.
        ConfigError: peft is missing; an adapter that does not fit the model.
    """
    name = next((way for way in _EACH if getattr(args, way, False)), "full")
    for way, options in _EACH.items():
        for option in options:
            if way != name and getattr(args, option, None) is not None:
                raise InputError(f"--{option} is an option of --{way}; give that too, or leave it out")
    if getattr(args, "merge", False) and name != "lora":
        why = "keys and values before a text are no weights of the model" if name == "prefix" else "there is nothing to merge"
        raise InputError(f"--merge goes with --lora: {why}; leave it out")
    if (folder := getattr(args, "adapter", None)) is not None:
        adapter = read_adapter(folder)
        return Tuning(name=adapter.peft_type.value.lower(), adapter=adapter, settings={"adapter": folder}, folder=folder)
    if name == "full":
        return Tuning()
    if name == "prefix" and kind is not CAUSAL:
        raise InputError(
            f"--prefix: {config.model_type!r} is a {kind.name} model; PEFT's prefix works for causal ones: use --lora"
        )
    peft = require_peft(f"--{name}")
    with torch.device("meta"):
        model = kind.auto.from_config(config, trust_remote_code=args.trust_remote_code)
    task_type = adapters.task_type_of(model)
    if name == "prefix":
        count = 5 if args.prefix_tokens is None else args.prefix_tokens
        adapter, settings = peft.PrefixTuningConfig(task_type=task_type, num_virtual_tokens=count), {"prefix_tokens": count}
    else:
        rank, alpha = (default if given is None else given for given, default in ((args.lora_rank, 8), (args.lora_alpha, 16.0)))
        if alpha == 0:
            raise InputError("--lora_alpha must be above 0, got 0: the additions would have no effect")
        adapter = peft.LoraConfig(task_type=task_type, r=rank, lora_alpha=alpha, target_modules=_targets(args, model))
        settings = {"lora_rank": rank, "lora_alpha": alpha, "lora_target_modules": sorted(adapter.target_modules)}
    with_adapter(model, copy.deepcopy(adapter), torch.float32, f"--{name}")
    return Tuning(name=name, adapter=adapter, settings=settings)


def real_tokens(tokenizer, vocab_size: int, count: int, seed: int) -> list[int]:
    """The ids of tokens that are no special ones, drawn by a seed."""
    special = set(tokenizer.all_special_ids)
    known = [number for number in range(min(len(tokenizer), vocab_size)) if number not in special]
    return random.Random(seed).choices(known, k=count)


def _targets(args: Namespace, model: torch.nn.Module) -> Sequence[str]:
    """The layers with additions. Raises InputError with the names that there are."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    modules = (
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
    )
    there, kind = tuple(dict.fromkeys(modules)), model.config.model_type
    asked = args.lora_target_modules or KNOWN.get(kind)
    if not asked:
        raise InputError(
            f"--lora: PEFT knows no query and value layers of {kind!r}; name some with --lora_target_modules, of "
            f"{', '.join(there)}"
        )
    if unknown := [name for name in asked if name not in there]:
        raise InputError(f"--lora_target_modules: the model has no linear layer {shown(unknown[0])}; it has {', '.join(there)}")
    return list(asked)
