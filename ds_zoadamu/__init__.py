"""Zeroth-order fine-tuning with ZO-AdaMU on DeepSpeed ZeRO-3 partitions: forward passes only."""

import importlib

__version__ = "0.1.0"

# Resolved on first use: importing DeepSpeed takes seconds, and not everything needs it.
_EXPORTS = {
    "initialize": "initialization",
    "StepRecord": "zero3.records",
    "ZerothOrderEngine": "durability.engine",
    "ZOAdaMU": "zero3.optimizer",
    "MeZO": "zero3.optimizer",
    "FZOO": "zero3.optimizer",
    "Rule": "rules",
    "register": "rules",
    "anneal": "rules.schedules",
    "noise": "rules.noise",
    "signs": "rules.noise",
    "check_config": "config.settings",
    "weights_digest": "durability.digest",
    "frozen_digest": "durability.digest",
    "read_journal": "durability.journal",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "JournalError": "errors",
    "NonFiniteLossError": "errors",
    "NonFiniteWeightsError": "errors",
    "RankError": "errors",
    "ReplayError": "errors",
    "load_model": "hf.models",
    "save_pretrained": "hf.models",
    "zero3_known": "zero3.hf",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
