"""Zeroth-order update rules: mathematics over ranges of elements and a few scalars. No rank, no partition, no DeepSpeed."""

from .fzoo import FZOO, FZOOConfig
from .mezo import MeZO, MeZOConfig
from .options import RuleConfig
from .registry import RULES, import_modules, make_rule, origin, register
from .rule import Elements, Evaluation, Rule, Storage, Update
from .zo_adamu import ZOAdaMU, ZOAdaMUConfig
from .zo_adamu_gradient import ZOAdaMUGradient
from .zo_adaptive import ZOAdaptive

register(ZOAdaMU)
register(MeZO)
register(FZOO)
register(ZOAdaptive)
register(ZOAdaMUGradient)

__all__ = [
    "FZOO",
    "RULES",
    "Elements",
    "Evaluation",
    "FZOOConfig",
    "MeZO",
    "MeZOConfig",
    "Rule",
    "RuleConfig",
    "Storage",
    "Update",
    "ZOAdaMU",
    "ZOAdaMUConfig",
    "ZOAdaMUGradient",
    "ZOAdaptive",
    "import_modules",
    "make_rule",
    "origin",
    "register",
]
