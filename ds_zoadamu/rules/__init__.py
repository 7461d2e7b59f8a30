"""Zeroth-order update rules: mathematics over ranges of elements and a few scalars. No rank, no partition, no DeepSpeed."""

from .mezo import MeZO
from .options import RuleConfig
from .registry import RULES, import_modules, make_rule, origin, register
from .rule import Elements, Evaluation, Rule, Storage, Update
from .zo_adamu import ZOAdaMU, ZOAdaMUConfig
from .zo_adamu_gradient import ZOAdaMUGradient
from .zo_adaptive import ZOAdaptive

register(ZOAdaMU)
register(MeZO)
register(ZOAdaptive)
register(ZOAdaMUGradient)

__all__ = [
    "RULES",
    "Elements",
    "Evaluation",
    "MeZO",
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
