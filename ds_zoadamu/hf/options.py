"""The options of a rule without a DeepSpeed JSON, and the JSON that is made of them."""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError, shown
from ..rules import RULES, RuleConfig
from ..rules.options import reject_unknown


@dataclass(frozen=True)
class RuleOptions:
    """A rule by its name and the options that were given; what is left out is filled from the training arguments."""

    rule: str
    given: dict[str, Any]

    def section(self) -> dict[str, Any]:
        """The optimizer section of a DeepSpeed JSON."""
        known = RULES[self.rule].config_class.names()
        filled = {key: "auto" for key in ("lr", "weight_decay", "seed", "total_steps") if key in known}
        return {"type": self.rule, "params": filled | self.given}

    def config(self) -> dict[str, Any]:
        """A DeepSpeed JSON of stage 3, its sizes and its precision left to the training arguments."""
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {
                "stage": 3,
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "optimizer": self.section(),
        }


def ZOAdaMUConfig(**options: Any) -> RuleOptions:  # noqa: N802, named as the other configurations are
    """Options of ZO-AdaMU as in the JSON, all of them optional: ``ZOTrainer(..., zo=ZOAdaMUConfig(zo_eps=1e-3))``. Raises
    ConfigError for one that is not known or has a wrong value."""
    return _checked("ZOAdaMU", options)


def MeZOConfig(**options: Any) -> RuleOptions:  # noqa: N802
    """Options of MeZO, as ``ZOAdaMUConfig``."""
    return _checked("MeZO", options)


def FZOOConfig(**options: Any) -> RuleOptions:  # noqa: N802
    """Options of FZOO, as ``ZOAdaMUConfig``. A learning rate of 1e-3 and more is usual."""
    return _checked("FZOO", options)


def options_of(zo: Any) -> RuleOptions:
    """What a trainer was given as ``zo=``: of the functions above, a rule's own configuration, or an optimizer section. Raises
    ConfigError."""
    if isinstance(zo, RuleOptions):
        return zo
    if isinstance(zo, RuleConfig):
        by_class = {rule.config_class: name for name, rule in RULES.items()}
        if type(zo) in by_class:
            return RuleOptions(by_class[type(zo)], dataclasses.asdict(zo))
    if isinstance(zo, dict) and zo.get("type") in RULES:
        reject_unknown("zo", zo, {"type", "params"})
        return _checked(zo["type"], zo.get("params", {}))
    raise ConfigError(
        f"zo is {shown(zo)}; pass ZOAdaMUConfig(...) or MeZOConfig(...) of ds_zoadamu.hf, or an optimizer section: "
        f'{{"type": one of {", ".join(RULES)}, "params": {{...}}}}'
    )


def _checked(rule: str, given: dict[str, Any]) -> RuleOptions:
    config_class = RULES[rule].config_class
    reject_unknown("zo", given, config_class.names())
    for f in fields(config_class):
        if f.name in given and given[f.name] != "auto":
            f.metadata["check"]("zo", f.name, given[f.name])
    return RuleOptions(rule, dict(given))
