"""What a trainer writes as its model: parameter by parameter, beside its place first, so that nothing else there is touched."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..distributed import collective
from .adapter_files import is_adapted
from .models import save_pretrained

_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def save_for_trainer(engine: Any, model: torch.nn.Module, directory: str | Path, companions: list[Any], args: Any) -> None:
    """Write a model as ``Trainer.save_model`` does: whole, or only the adapters of a PEFT model. On all ranks.

    ``engine``: that has the model's partitions, None before there is one; ``companions``: what has a ``save_pretrained`` of its
    own, as a tokenizer; ``args``: noted beside. Checkpoints and other files in ``directory`` stay. Raises OSError.
    """
    directory, writes = Path(directory).absolute(), collective.rank() == 0
    beside = directory.with_name(f".{directory.name}.saving")
    with collective.together("save_model"):
        if isinstance(model, PreTrainedModel) or is_adapted(model):
            save_pretrained(engine or SimpleNamespace(module=model), beside, overwrite=True)
        else:
            _save_parts(model, beside)
        with collective.on_all_ranks(OSError):
            if writes:
                for companion in companions:
                    companion.save_pretrained(beside)
                if args is not None:
                    torch.save(args, beside / "training_args.bin")
                _move(beside, directory)


def _save_parts(model: torch.nn.Module, folder: Path) -> None:
    """All tensors of a module in one file."""
    writes = collective.rank() == 0
    with collective.on_all_ranks(OSError):
        if writes:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        with collective.on_all_ranks(OSError):
            if writes:
                tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _move(source: Path, directory: Path) -> None:
    """Put the files of a folder into another one, in the place of an older model there."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {path.name for path in source.iterdir()}
    for pattern in _WEIGHTS:
        for old in directory.glob(pattern):
            if old.name not in written:
                old.unlink()
    for path in source.iterdir():
        if path.is_dir():
            shutil.rmtree(directory / path.name, ignore_errors=True)
        os.replace(path, directory / path.name)
    source.rmdir()
