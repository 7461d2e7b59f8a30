"""Adapters in PEFT's own format, to and from partitions, and LoRA merged into the model."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..distributed import collective
from ..zero3.partition import whole_shape

FILE = "adapter_model.safetensors"


def is_adapted(model: Any) -> bool:
    """Whether PEFT has wrapped the model."""
    return hasattr(model, "peft_config")


def write_adapter(model: Any, folder: Path, writes: bool) -> None:
    """Write the active adapter's configuration and tensors into a folder that is there; gathered parameter by parameter. On all
    ranks, of which one ``writes``. Raises OSError on all of them."""
    import peft

    adapter = model.active_adapter
    config, tensors = model.peft_config[adapter], {}
    if _is_stored_plainly(config):
        for key, parameter in _parameters_in_file(model).items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if writes:
                    tensors[key] = parameter.detach().to("cpu", copy=True).contiguous()
    else:  # what is stored may be made of several parameters
        with deepspeed.zero.GatheredParameters([p for name, p in model.named_parameters() if _is_adapter(name, p, adapter)]):
            # On all ranks: a module that runs on one alone would make their gathers differ.
            stored = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
            if writes:
                tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in stored.items()}
    with collective.on_all_ranks(OSError):
        if writes:
            trained_with, config.inference_mode = config.inference_mode, True  # as PEFT saves it
            try:
                config.save_pretrained(folder)
            finally:
                config.inference_mode = trained_with
            try:
                save_file(tensors, folder / FILE, metadata={"format": "pt"})
            except SafetensorError as error:  # safetensors' own for a full disk, without the path
                raise OSError(f"{folder / FILE} cannot be written: {error}") from error


def load_adapter(model: Any, folder: Path, reads: bool) -> None:
    """Overwrite the active adapter with that of a folder that `write_adapter` wrote. On all ranks, of which one ``reads``.

    Raises ValueError on all of them before a weight is changed: a tensor is missing there or has another shape.
    """
    parameters, tensors = _parameters_in_file(model), {}
    with collective.on_all_ranks(ValueError):
        if reads:
            try:
                with safe_open(folder / FILE, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{folder / FILE} cannot be read: {error}") from error
            for key, parameter in parameters.items():
                there = tuple(tensors[key].shape) if key in tensors else None
                if there != whole_shape(parameter):
                    found = "no such tensor" if there is None else f"one of shape {there}"
                    raise ValueError(f"{folder / FILE} has {found}: {key!r} of shape {whole_shape(parameter)}")
    for key, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if reads:
                parameter.data.copy_(tensors[key])


def merge(model: Any) -> torch.nn.Module:
    """The Transformers model with its LoRA adapter added to its weights, layer by layer in the partitions; the adapter is gone
    then. On all ranks."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
                module.merge()
    return model.unload()


def _is_stored_plainly(config: Any) -> bool:
    """Whether each tensor in a file is a parameter."""
    return config.peft_type.value == "LORA" or (config.peft_type.value == "PREFIX_TUNING" and not config.prefix_projection)


def _is_adapter(name: str, parameter: torch.nn.Parameter, adapter: str) -> bool:
    return parameter.requires_grad or adapter in name.split(".")


def _parameters_in_file(model: Any) -> dict[str, torch.nn.Parameter]:
    """The active adapter's parameters by the names that PEFT stores them under."""
    import peft

    adapter = model.active_adapter
    if model.peft_config[adapter].is_prompt_learning:
        return {"prompt_embeddings": model.prompt_encoder[adapter].embedding.weight}
    parameters = dict(model.named_parameters())
    # Which parameter becomes which tensor is PEFT's to say: each goes in as its number.
    numbers = {name: torch.tensor(number) for number, name in enumerate(parameters)}
    stored = peft.get_peft_model_state_dict(model, state_dict=numbers, adapter_name=adapter, save_embedding_layers=False)
    names = list(parameters)
    return {key: parameters[names[int(number)]] for key, number in stored.items()}
