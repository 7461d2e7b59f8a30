"""PEFT adapters on models whose parameters are partitioned: put on, and begun.

A prefix begins with the keys and values that real tokens have in the model, as in Li and Liang (2021) and MeZO's released
scripts. For them the model runs once before there is an engine, with each module's parameters gathered for its turn.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from ..config.adapters import MISFITS, require_peft, with_adapter
from ..distributed import collective
from ..errors import ConfigError
from ..zero3.hf import zero3_known
from ..zero3.partition import is_partitioned


def task_type_of(model: torch.nn.Module) -> str:
    """PEFT's name for what a Transformers model does; of masked models the one under which PEFT hands all arguments on."""
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"


def adapted(model: torch.nn.Module, adapter: Any, *, seed: int, tokens: Sequence[int] = ()) -> torch.nn.Module:
    """A partitioned model with a new adapter, the same for any number of ranks. On all ranks.

    Args:
        model: of `load_model`.
        adapter: PEFT's configuration; of a prefix with as many virtual tokens as ``tokens``.
        seed: of what the adapter draws to begin with.
        tokens: the ids of those whose keys and values a prefix begins with.

    Raises ConfigError on all ranks for an adapter that does not fit the model.
    """
    dtype = next(model.parameters()).dtype
    with collective.together("adapted"):
        start = _keys_and_values(model, tokens) if tokens else None
        with collective.on_all_ranks(ConfigError):
            with zero3_known(model.hf_deepspeed_config), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = with_adapter(model, adapter, dtype)
            if start is not None:
                _begin_with(made, start)
    return made


def loaded(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    """A partitioned model with the adapter that a folder holds in PEFT's format, for evaluations. On all ranks.

    Raises ConfigError on all ranks where PEFT cannot read it, or it does not fit the model.
    """
    peft, dtype = require_peft("--adapter"), next(model.parameters()).dtype
    with collective.together("loaded"), collective.on_all_ranks(ConfigError):
        try:
            with zero3_known(model.hf_deepspeed_config):
                made = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
        except (OSError, *MISFITS) as error:
            message = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"the adapter of {folder!r} cannot be put on this model: {message}") from error
        for config in made.peft_config.values():
            config.inference_mode = False  # in which PEFT reads a prefix past its module, where nobody gathers it
        for param in made.parameters():
            if not is_partitioned(param):
                param.data = param.data.to(dtype)
    return made


def _begin_with(model: torch.nn.Module, start: torch.Tensor) -> None:
    """Set a new prefix, which is not partitioned yet. Raises ConfigError where the model's layers keep other keys."""
    weight = model.prompt_encoder[model.active_adapter].embedding.weight
    if weight.shape != start.shape:
        raise ConfigError(
            f"a prefix cannot be put on this model: its layers keep {start.shape[-1]} numbers a token, and PEFT's prefix has "
            f"{weight.shape[-1]}"
        )
    with torch.no_grad():
        weight.copy_(start)


def _keys_and_values(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """What the (decoder's) self-attention keeps of tokens alone, [tokens, layers x 2 x heads x size], in PEFT's order."""
    ids = torch.tensor([list(tokens)], device=get_accelerator().current_device_name())
    inputs = {"decoder_input_ids" if model.config.is_encoder_decoder else "input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["input_ids"] = ids
    with torch.no_grad(), _gathering(model):
        output = model(**inputs, use_cache=True)
    cache = output["cache"] if "cache" in output else output.past_key_values  # newer, older Transformers
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise collective.everywhere(
            ConfigError("a prefix cannot be put on this model: its layers keep no keys and values of the tokens before")
        )
    parts = [part[0].transpose(0, 1).flatten(1) for layer in layers for part in (layer.keys, layer.values)]
    return torch.cat(parts, dim=-1)


@contextmanager
def _gathering(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a partitioned model that no engine has yet runs forward: a module's own parameters are there for its turn."""
    device, open_ones, handles = get_accelerator().current_device_name(), {}, []

    def enter(module, *_):
        parameters = list(module.parameters(recurse=False))
        partitioned = any(map(is_partitioned, parameters))
        open_ones[module] = deepspeed.zero.GatheredParameters(parameters) if partitioned else nullcontext()
        open_ones[module].__enter__()

    def leave(module, *_):
        open_ones.pop(module).__exit__(None, None, None)

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))  # the engine would move them
        if any(True for _ in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
