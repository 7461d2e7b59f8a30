"""How far the loading of a model into partitions has come."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

import torch

from ds_zoadamu.console.progress import progress
from ds_zoadamu.durability.base_model import find_folder, weight_files
from ds_zoadamu.errors import ReplayError


@contextmanager
def shown_loading(path: str, revision: str | None = None) -> Iterator[None]:
    """Inside, the bytes that Transformers gives to modules are counted on rank 0, which alone reads them; it has no bar of its
    own for partitioned models."""
    original = torch.nn.Module._load_from_state_dict
    with progress("loading the model", _bytes_of_files(path, revision), "B", scale=True) as bar:

        @wraps(original)
        def counting(module, state_dict, prefix, *args, **kwargs):
            original(module, state_dict, prefix, *args, **kwargs)
            own = (state_dict.get(prefix + name) for name in (*module._parameters, *module._buffers))
            bar.update(sum(tensor.nbytes for tensor in own if isinstance(tensor, torch.Tensor)))

        torch.nn.Module._load_from_state_dict = counting
        try:
            yield
        finally:
            torch.nn.Module._load_from_state_dict = original


def _bytes_of_files(path: str, revision: str | None) -> int | None:
    """None where the files are not here yet, or are no safetensors files."""
    try:
        folder = find_folder(str(path), revision, download=False)
        return None if folder is None else sum(file.stat().st_size for file in weight_files(folder))
    except (OSError, ReplayError):
        return None
