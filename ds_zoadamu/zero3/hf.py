"""Tells Transformers of ZeRO-3 where it must know of it, and nowhere else.

Transformers keeps one DeepSpeed configuration for the whole process (``HfDeepSpeedConfig``, behind a weak reference). While it
is of stage 3, ``generate`` keeps ranks in step, and every ``from_pretrained`` and ``from_config`` builds into partitions, which
no model can use that is not given to an engine. So it is set inside the methods of partitioned models that ask for it, and
while such a model is loaded. The only module that touches that reference. Checked against Transformers 5.24.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations import deepspeed as integration

_METHODS = ("generate", "resize_token_embeddings")


@contextmanager
def zero3_known(config: dict | HfDeepSpeedConfig) -> Iterator[HfDeepSpeedConfig]:
    """Inside, Transformers and PEFT know of the partitions; whatever they knew before is put back behind it.

    ``config``: a DeepSpeed configuration of stage 3, or a model's ``hf_deepspeed_config``.
    """
    before = integration._hf_deepspeed_config_weak_ref
    try:
        known = config if isinstance(config, HfDeepSpeedConfig) else HfDeepSpeedConfig(config)
        integration.set_hf_deepspeed_config(known)
        yield known
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def attach(module: torch.nn.Module, config: dict | HfDeepSpeedConfig) -> None:
    """From now on ``generate`` and ``resize_token_embeddings`` of every Transformers model within ``module`` know of ZeRO-3."""
    models = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    if not models:
        return
    with zero3_known(config) as known:
        for model in models:
            model.hf_deepspeed_config = known
            for name in _METHODS:
                if hasattr(type(model), name):
                    # Bound to its model by itself, so that a deep copy of the model has its own.
                    setattr(model, name, types.MethodType(_knowing(getattr(type(model), name)), model))


def detach(module: torch.nn.Module) -> None:
    """Undo ``attach``."""
    for model in module.modules():
        if isinstance(model, PreTrainedModel):
            for name in ("hf_deepspeed_config", *_METHODS):
                model.__dict__.pop(name, None)


def _knowing(method: Callable) -> Callable:
    @functools.wraps(method)
    def knowing(model: PreTrainedModel, *args, **kwargs):
        with zero3_known(model.hf_deepspeed_config):
            return method(model, *args, **kwargs)

    return knowing
