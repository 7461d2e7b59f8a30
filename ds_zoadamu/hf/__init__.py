"""Transformers, PEFT, TRL and accelerate on partitions: models loaded and saved, and their trainers with zeroth-order steps."""

import importlib

# Resolved on first use: importing Transformers takes seconds, and TRL may not be there.
_EXPORTS = {
    "ZOTrainer": "trainer",
    "ZOTrainerMixin": "trainer",
    "ZOSFTTrainer": "trl",
    "ZODPOTrainer": "trl",
    "ZOAdaMUConfig": "options",
    "MeZOConfig": "options",
    "FZOOConfig": "options",
    "zeroth_order": "accelerate",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
