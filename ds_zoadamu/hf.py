"""Hugging Face causal language models: loaded straight into ZeRO-3 partitions, and saved from them parameter by parameter.

`deepspeed.zero.GatheredParameters` reads and writes the partitions.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ds_zoadamu import collective, folders, hf_zero3, nvme
from ds_zoadamu.auto_config import fill_auto_for_library, has_auto, hidden_size_of
from ds_zoadamu.base_model import check_whole
from ds_zoadamu.config import check_precision, read_config
from ds_zoadamu.distributed import init_distributed, launched_world_size
from ds_zoadamu.hf_names import FileNames, Group
from ds_zoadamu.partition import whole_shape

_INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def load_causal_lm(path: str, config: dict | str | Path, dtype: torch.dtype | None = None, **kwargs) -> PreTrainedModel:
    """Loads a causal language model so that each rank keeps only its ZeRO-3 partition of every parameter.

    Starts DeepSpeed's process group if there is none. Call it on all ranks.

    Args:
        path: a folder or a name on the hub, as for `AutoModelForCausalLM.from_pretrained`.
        config: the DeepSpeed configuration, ZeRO stage 3, or its path; "auto" values are filled as by `initialize`.
        dtype: of the weights; None: as the configuration's bf16 or fp16 section says, else fp32.
        kwargs: passed on to `from_pretrained`; without trust_remote_code a model that brings code of its own is refused.

    Returns:
        The model. Its `generate` and `resize_token_embeddings` know of the partitions; other models are loaded as ever.

    Raises:
        ValueError: the configuration is not of stage 3.
        ConfigError: a precision or an offload to NVMe that cannot work here; a weights file that is cut short.
        OSError: from Transformers, when there is no such model.
    """
    kwargs.setdefault("trust_remote_code", False)  # None: Transformers would ask on the terminal, on every rank
    config = read_config(config)
    stage = config.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise ValueError(f"load_causal_lm: zero_optimization.stage is {stage!r}; only stage 3 partitions the weights")
    if dtype is None:
        dtype = config_dtype(config)
    init_distributed()
    if has_auto(config):
        where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "trust_remote_code") if key in kwargs}
        config = fill_auto_for_library(
            config,
            world_size=launched_world_size(),
            hidden_size=hidden_size_of(AutoConfig.from_pretrained(path, **where)),
            num_examples=sys.maxsize,  # partitions do not depend on the number of steps
        )
    check_precision(config)
    check_whole(path, kwargs.get("revision"))
    nvme.prepare(config)
    with hf_zero3.zero3_known(config) as known:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)
    hf_zero3.attach(model, known)
    return model


def config_dtype(config: dict) -> torch.dtype:
    """The dtype of the weights that a DeepSpeed configuration asks for."""
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled", False):
            return dtype
    return torch.float32


def save_pretrained(
    engine, directory: str | Path, tokenizer=None, max_shard_size: str = "5GB", *, overwrite: bool = False
) -> None:
    """Writes an engine's model as `AutoModelForCausalLM.from_pretrained(directory)` reads it.

    Parameters are gathered one by one on all ranks; rank 0 collects them in files of at most `max_shard_size` (a single
    larger parameter makes a larger file) and holds no more than one file's bytes at a time, and a parameter and its pieces
    where Transformers stores it in pieces: names and pieces are those of the files that the model was loaded from, or of its
    architecture. Tied weights are stored once.
    The folder appears complete or not at all: it is written beside its place and renamed. Call it on all ranks. After a kill
    in the middle of replacing one, the older is in `.NAME.old`, and the next call puts it back before it does anything else.

    Args:
        engine: a DeepSpeed engine (or anything with a `module` that is a `PreTrainedModel`).
        directory: where to write; its parents are made. A link to a folder stays one.
        tokenizer: saved too, if given.
        max_shard_size: bytes with a unit, for example "500MB" (decimal units, as in Transformers).
        overwrite: replace what is in `directory`.

    Raises:
        FileExistsError: `directory` exists, is not empty, and `overwrite` is not set.
        TypeError: the model is not a Transformers model.
        ValueError: a malformed `max_shard_size`.
    """
    model, directory, limit = engine.module, Path(os.path.realpath(directory)), _parse_size(max_shard_size)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"save_pretrained: the engine's module is a {type(model).__name__}, not a Transformers PreTrainedModel")
    writes = dist.get_rank() == 0
    with _on_all_ranks("save_pretrained"):
        if writes:
            folders.put_back(directory, _aside(directory))
        if writes and not overwrite and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise FileExistsError(f"{directory} exists and is not empty; give another folder or overwrite=True")
    temporary = directory.with_name(f".{directory.name}.writing")
    with _on_all_ranks("save_pretrained"):
        if writes:
            folders.remove(temporary)
            temporary.mkdir(parents=True)
            model.config.save_pretrained(temporary)
            if model.can_generate():
                model.generation_config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
    _release_gathered(engine)
    writer = _ShardWriter(temporary, limit) if writes else None
    for name, tensor in _full_tensors(model, wanted=writes):
        if writer is not None:
            writer.add(name, tensor)
    with _on_all_ranks("save_pretrained"):
        if writer is not None:
            writer.finish()
            folders.replace(temporary, directory, _aside(directory))
            folders.remove(_aside(directory))


def load_weights(engine, directory: str | Path) -> None:
    """Overwrites the weights of an engine's model with those of a folder that `save_pretrained` wrote for the same model.

    Rank 0 reads one parameter at a time and shares it. The optimizer's state is left alone: meant for evaluating a kept
    model or for starting again. Call it on all ranks.

    Raises:
        ValueError: a parameter is missing in the folder or has another shape there.
    """
    model, directory, reads = engine.module, Path(directory), dist.get_rank() == 0
    stored, groups, files = _stored_names(model), [], {}
    with _on_all_ranks("load_weights"):
        if reads:
            files = _weight_files(directory)
            groups = FileNames(model, {n: whole_shape(p) for n, p in stored.items()}).from_files(_file_shapes(files))
            missing = stored.keys() - {name for group in groups for name in group.made}
            if missing:
                first = next(name for name in stored if name in missing)
                raise ValueError(
                    f"{directory} has no weights for {first!r} ({len(missing)} missing); was it saved from this model?"
                )
            _check_shapes(directory, groups, _file_shapes(files), stored)
    names = json.loads(collective.broadcast_bytes(json.dumps([group.made for group in groups]).encode()))
    _release_gathered(engine)
    for index, made in enumerate(names):
        with deepspeed.zero.GatheredParameters([stored[name] for name in made], modifier_rank=0):
            if reads:
                for name, tensor in groups[index].convert(_read(files, groups[index].given)).items():
                    stored[name].data.copy_(tensor)


def _check_shapes(directory: Path, groups: list[Group], shapes: dict, stored: dict[str, torch.nn.Parameter]) -> None:
    """Raises ValueError where what is read would have another shape than the parameter."""
    for group in groups:
        made = group.convert({key: torch.empty(shapes[key], device="meta") for key in group.given})
        for name, tensor in made.items():
            there, here = tuple(tensor.shape), whole_shape(stored[name])
            if there != here:
                raise ValueError(
                    f"{directory} has {name!r} of shape {there}, in this model it is {here}; was it saved from this model?"
                )


def _file_shapes(files: dict[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in set(files.values()):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if files.get(key) == path}
    return shapes


def _read(files: dict[str, Path], keys: tuple[str, ...]) -> dict[str, torch.Tensor]:
    tensors = {}
    for key in keys:
        with safe_open(files[key], framework="pt") as file:
            tensors[key] = file.get_tensor(key)
    return tensors


class _ShardWriter:
    """Collects tensors and writes them to numbered safetensors files; the names get their final form in `finish`.

    The number of files is known only at the end, since a partitioned parameter tells its size when it is gathered.
    """

    def __init__(self, folder: Path, limit: int):
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes

    def finish(self) -> None:
        """Writes what is left, renames the files as Transformers looks for them and adds the index."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            os.rename(self._part(0), self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file_name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(index), self._folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.safetensors"


def _release_gathered(engine) -> None:
    """Lets go of parameters that DeepSpeed gathers ahead.

    After training with backward passes it expects one behind an evaluation's forward too, and `GatheredParameters` fails
    on a parameter in flight.
    """
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()


def _full_tensors(model: PreTrainedModel, wanted: bool) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Each stored tensor in full under its name in files, as a copy on the CPU where `wanted` and None elsewhere; a collective
    call."""
    stored: dict[str, torch.Tensor] = dict(_stored_names(model))
    # Buffers are not partitioned. state_dict() knows which of them are persistent.
    persistent = model.state_dict().keys()
    stored |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for group in _groups_in_files(model, {name: whole_shape(tensor) for name, tensor in stored.items()}):
        tensors = [stored[name] for name in group.given]
        with deepspeed.zero.GatheredParameters([t for t in tensors if isinstance(t, torch.nn.Parameter)]):
            copies = {n: stored[n].detach().to("cpu", copy=True).contiguous() for n in group.given} if wanted else None
        made = dict.fromkeys(group.made) if copies is None else group.convert(copies)
        del copies
        for key in group.made:  # pieces of a fused tensor have memory of their own: the format allows no other
            tensor = made.pop(key)
            yield key, tensor if tensor is None or group.keeps else tensor.clone(memory_format=torch.contiguous_format)


def _groups_in_files(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> list[Group]:
    try:
        return FileNames(model, shapes).to_files()
    except ValueError as error:
        logger.warning("the model is saved under its names in memory, since in the format of its files %s", error)
        return [Group((name,), (name,)) for name in shapes]


def _stored_names(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by the name of which the stored one is made: of a tied parameter's names, the one that is not tied to
    another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in names or names[id(parameter)][0] in tied:
            names[id(parameter)] = (name, parameter)
    return dict(names.values())


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file in `directory` that holds it."""
    if (directory / _INDEX).exists():
        weight_map = json.loads((directory / _INDEX).read_text())["weight_map"]
        return {name: directory / file for name, file in weight_map.items()}
    path = directory / "model.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def _aside(directory: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return directory.with_name(f".{directory.name}.old")


@contextmanager
def _on_all_ranks(what: str):
    """Raises on every rank what the body raised on one, so that no rank waits in the next collective for one that is gone."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = collective.gather_json(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise RuntimeError(f"{what} failed on rank {rank}: {message}")


def _parse_size(text: str) -> int:
    number, unit = str(text)[:-2], str(text)[-2:].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ValueError(f'max_shard_size is {text!r}; give a positive number with KB, MB, GB or TB, for example "5GB"')
    return size
