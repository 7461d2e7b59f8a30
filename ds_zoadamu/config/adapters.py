"""PEFT's configurations of adapters, and models with an adapter: they are frozen, and the adapter alone is trained."""

from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files.json_files import read_json

MISFITS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError)
"""What PEFT raises where an adapter does not fit a model."""


def read_adapter(folder: str) -> Any:
    """The PEFT configuration of an adapter, from ``folder/adapter_config.json``; no weights are read.

    Raises ConfigError: peft is not installed, the file cannot be read, or PEFT does not know what it describes.
    """
    path = Path(folder) / "adapter_config.json"
    given = read_json(path, f"--adapter: {path}", remedy="; name the adapter's folder")
    if not isinstance(given, dict) or "peft_type" not in given:
        raise ConfigError(f'--adapter: {path} has no "peft_type", so its kind is unknown; add it, for example "LORA"')
    peft = require_peft("--adapter")
    if given["peft_type"] not in list(peft.PeftType):
        known = ", ".join(kind.value for kind in peft.PeftType)
        raise ConfigError(f"--adapter: {path}: peft_type is {given['peft_type']!r}; PEFT {peft.__version__} knows {known}")
    try:
        adapter = peft.PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--adapter: {path} is not a configuration that PEFT reads: {error}") from error
    adapter.inference_mode = False  # as saved by PEFT it is true, which would freeze the adapter
    return adapter


def with_adapter(module: torch.nn.Module, adapter: Any, dtype: torch.dtype, option: str = "--adapter") -> torch.nn.Module:
    """``module`` wrapped by PEFT, everything but the adapter frozen, and the adapter in ``dtype``.

    PEFT would keep a 16-bit model's adapter in fp32; DeepSpeed casts it where it casts the model. Raises ConfigError for an
    adapter that does not fit the model, with the ``option`` that asks for it.
    """
    peft = require_peft(option)
    try:
        wrapped = peft.get_peft_model(module, adapter, autocast_adapter_dtype=False)
    except MISFITS as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{option}: a {adapter.peft_type.value} adapter cannot be put on this model: {message}") from error
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    if not trained:
        raise ConfigError(f"{option}: a {adapter.peft_type.value} adapter leaves nothing to train in this model")
    for param in trained:
        param.data = param.data.to(dtype)
    return wrapped


def require_peft(what: str) -> Any:
    """The module `peft`. Raises ConfigError, with what needs it, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f'{what} needs peft; install it with: pip install "ds_zoadamu[peft]"') from error
    return peft
