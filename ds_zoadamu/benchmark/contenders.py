"""Who takes part: DeepSpeed JSONs by name, the plain MeZO loop, and LOMO."""

import copy
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

from ds_zoadamu.config.sections import check_stage
from ds_zoadamu.config.settings import read_config, zeroth_order_type
from ds_zoadamu.rules import RULES
from ds_zoadamu.rules.zo_adamu import MOMENTUM_DTYPES
from ds_zoadamu.tasks import InputError

PLAIN, LOMO = "plain-mezo", "lomo"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Contender:
    """A name and the DeepSpeed JSON behind it; None for the plain MeZO loop and for LOMO, which need none."""

    name: str
    config: dict | None

    @property
    def plain(self) -> bool:
        return self.config is None and self.name == PLAIN

    @property
    def zeroth_order(self) -> bool:
        return self.plain or (self.config is not None and zeroth_order_type(self.config) is not None)

    @property
    def optimizer(self) -> str:
        """What reports call it."""
        return {PLAIN: "plain MeZO", LOMO: "LOMO"}[self.name] if self.config is None else self.config["optimizer"]["type"]

    @property
    def command(self) -> str:
        """The module that runs it."""
        return f"ds_zoadamu.training.{'finetune' if self.config is not None else 'plain' if self.plain else 'lomo'}_command"


def choose_contenders(args: Namespace, configs: Path) -> list[Contender]:
    """The contenders that --configs and --contenders ask for.

    Args:
        configs: folder of the built-in JSONs.

    Raises:
        InputError, ConfigError: no contender, an unknown name, a JSON that cannot be read, an unknown optimizer.
    """
    given = _given(args.configs)
    if args.contenders is None and args.configs is not None:
        names = [*given, PLAIN]
    else:
        names = [name for name in _built_in(configs) if name != LOMO] if args.contenders is None else args.contenders
    if not names:
        raise InputError("--contenders is empty; name at least one, or leave it out for all")
    if len(set(names)) < len(names):
        raise InputError(f"--contenders names one twice: {', '.join(names)}")
    known: Mapping[str, dict | None] = {**_built_in(configs), **given}
    for name in names:
        if name not in known:
            raise InputError(f"unknown contender {name!r}; known: {', '.join(known)}; give others with --configs NAME=FILE")
    return [_checked(Contender(name, known[name])) for name in names]


def _given(entries: list[str] | None) -> dict[str, dict]:
    if entries == []:
        raise InputError(
            "--configs has no value; give NAME=FILE for each DeepSpeed JSON, or leave it out for the built-in ones"
        )
    found: dict[str, dict] = {}
    for entry in entries or ():
        name, separator, path = entry.partition("=")
        if not separator or not _NAME.fullmatch(name):
            raise InputError(f"--configs {entry!r}: write NAME=FILE, NAME of letters, digits, '.', '_' and '-'")
        if name in found or name in (PLAIN, LOMO):
            raise InputError(f"--configs: the name {name!r} is taken; give another")
        found[name] = read_config(path)
    return found


def _built_in(folder: Path) -> dict[str, dict | None]:
    zoadamu = read_config(folder / "cpu-small_zoadamu.json")
    contenders: dict[str, dict | None] = {}
    for dtype in MOMENTUM_DTYPES:
        config = contenders[f"zoadamu-{dtype}"] = copy.deepcopy(zoadamu)
        config["optimizer"]["params"]["momentum"] = {"dtype": dtype}
    contenders["mezo"] = read_config(folder / "cpu-small_mezo.json")
    adamw = read_config(folder / "cpu-small_adamw.json")
    contenders["adamw"] = {**adamw, "scheduler": zoadamu["scheduler"]}  # a decaying lr helps it as well
    return {**contenders, PLAIN: None, LOMO: None}


def _checked(contender: Contender) -> Contender:
    """Raises InputError for an optimizer that nobody knows or whose settings would not follow the benchmark's."""
    if contender.config is None:
        return contender
    name, config = contender.name, contender.config
    section = config.get("optimizer")
    kind = section.get("type") if isinstance(section, dict) else None
    if zeroth_order_type({"optimizer": {"type": kind}}) is None and str(kind).lower() not in DEEPSPEED_OPTIMIZERS:
        known = [*RULES, *DEEPSPEED_OPTIMIZERS]
        raise InputError(f"{name}: optimizer.type is {kind!r}; known: {', '.join(known)}")
    check_stage(config, f"{name}: ")
    if contender.zeroth_order:
        params = section.get("params", {})
        for key in ("seed", *({"total_steps"} & params.keys())):
            value = params.get(key)
            if value != "auto":
                raise InputError(
                    f'{name}: optimizer.params.{key} is {value!r}, the benchmark gives every run its own; set it to "auto"'
                )
    elif "gradient_clipping" not in config:
        raise InputError(f'{name}: gradient_clipping is missing, DeepSpeed would clip at 1.0; set it, or "auto" for 1.0')
    return contender
