"""A plugin of Axolotl: its own trainer, data and command line, with zeroth-order steps. Checked against Axolotl 0.19.

plugins:
  - ds_zoadamu.integrations.axolotl.ZOPlugin
zo:
  type: ZOAdaMU         # or MeZO
  zo_eps: 0.001         # and the rule's other options, as in a DeepSpeed JSON
"""

import copy
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, field_validator

from ..config.settings import read_config
from ..errors import ConfigError, shown
from ..hf.options import RuleOptions, options_of
from ..rules import RULES

_NOT_BUILT = ("rl", "reward_model", "process_reward_model", "relora", "fsdp", "fsdp_config")


class ZOOptions(BaseModel):
    """The section ``zo:``: the rule's name, and its options, which the rule itself checks."""

    model_config = ConfigDict(extra="allow")

    type: str = "ZOAdaMU"


class ZOArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    zo: ZOOptions | None = None

    @field_validator("zo", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        rule_options(value)
        return value


class ZOPlugin(BasePlugin):
    """Axolotl's trainer with forward passes only, on the DeepSpeed configuration of ``deepspeed:`` or one that is made here."""

    def register(self, cfg: Any) -> None:
        """Puts the rule into ``cfg["deepspeed"]``, before Axolotl has checked ``cfg``. Raises ConfigError."""
        for name in _NOT_BUILT:
            if cfg.get(name):
                raise ConfigError(f"{name} is {shown(cfg[name])}; the plugin is for plain causal language models: leave it out")
        options, given = rule_options(cfg.get("zo")), cfg.get("deepspeed")
        config = copy.deepcopy(read_config(dict(given) if isinstance(given, dict) else given)) if given else options.config()
        section = config.setdefault("optimizer", options.section())
        if cfg.get("zo") and section != options.section():
            raise ConfigError('zo: and the "optimizer" of the DeepSpeed JSON both name a rule: keep one of them')
        cfg["deepspeed"] = config

    def get_input_args(self) -> str:
        return f"{__name__}.{ZOArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type:
        from .axolotl_trainer import ZOAxolotlTrainer

        return ZOAxolotlTrainer


def rule_options(zo: Any) -> RuleOptions:
    """The rule of a section ``zo:``. Numbers such as 1e-3, which YAML takes for text, are numbers. Raises ConfigError."""
    if zo is not None and not isinstance(zo, dict):
        raise ConfigError(f"zo is {shown(zo)}; it must be a section with type and options of a rule")
    given = {key: _number(value) for key, value in dict(zo or {}).items()}
    if (rule := given.pop("type", "ZOAdaMU")) not in RULES:
        raise ConfigError(f"zo.type is {shown(rule)}; known: {', '.join(RULES)}")
    return options_of({"type": rule, "params": given})


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    try:
        return float(value) if isinstance(value, str) and value != "auto" else value
    except ValueError:
        return value
