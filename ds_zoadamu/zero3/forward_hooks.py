"""DeepSpeed's hooks around a forward of the whole model, without keeping the engine alive: DeepSpeed's own refer to it, and the
model, which DeepSpeed keeps for ever, to them. An engine that nobody has any more then gives up what it holds.
"""

import weakref
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict


def before_forward(engine: Any) -> torch.utils.hooks.RemovableHandle:
    """``_create_module_forward_pre_hook`` of an engine."""
    engine_ref = weakref.ref(engine)

    def begin(module: torch.nn.Module, inputs: tuple, kwargs: dict) -> Any:
        if (alive := engine_ref()) is not None:
            return alive._forward_prologue(inputs, kwargs)
        return _discover_external_parameters(module, True)

    return engine.module.register_forward_pre_hook(begin, prepend=False, with_kwargs=True)


def after_forward(engine: Any) -> torch.utils.hooks.RemovableHandle:
    """``_create_module_forward_post_hook`` of an engine."""
    engine_ref = weakref.ref(engine)

    def end(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if (alive := engine_ref()) is not None:
            alive._forward_epilogue()
        else:
            _discover_external_parameters(module, False)

    return engine.module.register_forward_hook(end)


def _discover_external_parameters(module: torch.nn.Module, on: bool) -> None:
    for part in module.modules():
        if isinstance(part._parameters, ZeROOrderedDict):
            part._parameters._in_forward = on
