"""Hugging Face language models: loaded straight into ZeRO-3 partitions, and saved from them parameter by parameter.

`deepspeed.zero.GatheredParameters` reads and writes the partitions.
"""

import json
import math
import os
from contextlib import ExitStack, suppress
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import logger
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ds_zoadamu.config import Config, load
from ds_zoadamu.config.auto import has_auto
from ds_zoadamu.config.known import check_known
from ds_zoadamu.config.sections import check_stage
from ds_zoadamu.config.settings import check_precision, read_config
from ds_zoadamu.console.progress import counted
from ds_zoadamu.distributed import collective
from ds_zoadamu.distributed.start import launched_world_size
from ds_zoadamu.distributed.waiting import current_limit, limit_waits
from ds_zoadamu.durability.base_model import check_whole
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.files import folders
from ds_zoadamu.files.hf_names import FileNames, Group
from ds_zoadamu.files.json_files import read_json
from ds_zoadamu.hf.adapter_files import is_adapted, load_adapter, write_adapter
from ds_zoadamu.hf.kinds import model_kind
from ds_zoadamu.hf.loading import shown_loading
from ds_zoadamu.zero3 import agreement, nvme
from ds_zoadamu.zero3 import hf as hf_zero3
from ds_zoadamu.zero3.partition import whole_shape
from ds_zoadamu.zero3.start import init_distributed

_INDEX = "model.safetensors.index.json"
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "gguf_file", "trust_remote_code")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def load_model(path: str, config: dict | str | Path | Config, dtype: torch.dtype | None = None, **kwargs) -> PreTrainedModel:
    """Loads a language model so that each rank keeps only its ZeRO-3 partition of every parameter.

    Which class it is loaded with, of causal, masked and sequence-to-sequence ones, follows from its configuration, see
    `kinds.model_kind`. Starts DeepSpeed's process group if there is none. Call it on all ranks.

    Args:
        path: a folder or a name on the hub, as for Transformers' `from_pretrained`.
        config: the DeepSpeed configuration, ZeRO stage 3, or its path; "auto" values are filled as by `initialize`.
        dtype: of the weights, as the configuration's bf16 or fp16 section says, else fp32; anything else is an error.
        kwargs: passed on to `from_pretrained`; without trust_remote_code a model that brings code of its own is refused.

    Returns:
        The model. Its `generate` and `resize_token_embeddings` know of the partitions; other models are loaded as ever.

    Raises:
        ConfigError: the configuration is not of stage 3, differs between ranks, or has a precision or an offload to NVMe that
            cannot work here; a model that is of no kind; a weights file that is cut short.
        OSError: from Transformers, when there is no such model; on other ranks a RankError, where it is there.
    """
    kwargs.setdefault("trust_remote_code", False)  # None: Transformers would ask on the terminal, on every rank
    init_distributed()
    with collective.together("load_model"):
        with collective.on_all_ranks(ConfigError):
            given = read_config(config)
            check_known(given)
            check_stage(given, "load_model: ", "only stage 3 partitions the weights")
        with collective.on_all_ranks(OSError):
            if not isinstance(config, Config):
                config = _loaded(given, _configuration(path, kwargs) if has_auto(given) else None)
            asked, dtype = dtype, config.dtype
            if asked not in (None, dtype):
                raise ConfigError(
                    f"load_model: dtype is {asked}, the configuration's weights are {dtype}: set its bf16 or fp16 section"
                )
        agreement.require_same(agreement.of_config(config) | {"dtype": str(dtype)})
        check_precision(config)
        with collective.on_all_ranks(OSError):
            kind = model_kind(_configuration(path, kwargs))
        agreement.require_same({"kind of model": kind.name})
        with collective.on_all_ranks(ConfigError):
            check_whole(path, kwargs.get("revision"))
        nvme.prepare(config)
        with hf_zero3.zero3_known(config.deepspeed) as known, shown_loading(path, kwargs.get("revision")):
            model = kind.auto.from_pretrained(path, dtype=dtype, **kwargs)
    limit_waits(current_limit())
    hf_zero3.attach(model, known)
    return model


def _configuration(path: str, kwargs: dict) -> PretrainedConfig:
    """The model's configuration. Raises OSError where there is no such model."""
    given = kwargs.get("config")
    if isinstance(given, PretrainedConfig):
        return given
    return AutoConfig.from_pretrained(given or path, **{key: kwargs[key] for key in _WHERE if key in kwargs})


def _loaded(given: dict, model_info: PretrainedConfig | None) -> Config:
    """What of a DeepSpeed configuration partitions depend on, without "auto"."""
    given = {key: value for key, value in given.items() if key not in ("optimizer", "scheduler")}
    return load(given, world_size=launched_world_size(), model_info=model_info)


def save_pretrained(
    engine, directory: str | Path, tokenizer=None, max_shard_size: str = "5GB", *, overwrite: bool = False
) -> None:
    """Writes an engine's model as Transformers' `from_pretrained(directory)` reads it; of a model that PEFT has wrapped the
    adapter alone, as `PeftModel.from_pretrained(model, directory)` reads it.

    Parameters are gathered one by one on all ranks; rank 0 collects them in files as Transformers makes them, of at most
    `max_shard_size` (a single larger parameter has a larger file of its own), and holds no more than one such file's bytes at a
    time, and a parameter and its pieces where Transformers stores it in pieces: names and pieces are those of the files that
    the model was loaded from, or of its architecture. Tied weights are stored once.
    The folder appears complete or not at all: it is written beside its place and renamed. Call it on all ranks. After a kill
    in the middle of replacing one, the older is in `.NAME.old`, and the next call puts it back before it does anything else.

    Args:
        engine: a DeepSpeed engine (or anything with a `module` that is a `PreTrainedModel` or a `PeftModel`).
        directory: where to write; its parents are made. A link to a folder stays one.
        tokenizer: saved too, if given.
        max_shard_size: bytes with a unit, for example "500MB" (decimal units, as in Transformers).
        overwrite: replace what is in `directory`.

    Raises, on all ranks, after which there is nothing new on the disk:
        OSError: a file cannot be written, or `directory` exists, is not empty, and `overwrite` is not set.
        TypeError: the model is not a Transformers model.
        ValueError: a malformed `max_shard_size`.
    """
    directory, writes = Path(os.path.realpath(directory)), collective.rank() == 0
    with collective.together("save_pretrained"):
        with collective.on_all_ranks(OSError):
            model, limit = engine.module, _parse_size(max_shard_size)
            adapted = is_adapted(model)
            if not isinstance(model, PreTrainedModel) and not adapted:
                raise TypeError(
                    f"save_pretrained: the engine's module is a {type(model).__name__}, not a Transformers PreTrainedModel"
                )
            if writes:
                folders.put_back(directory, _aside(directory))
            if writes and not overwrite and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise FileExistsError(f"{directory} exists and is not empty; give another folder or overwrite=True")
        temporary = directory.with_name(f".{directory.name}.writing")
        try:
            with collective.on_all_ranks(OSError):
                if writes:
                    _begin(temporary, None if adapted else model, tokenizer)
            _release_gathered(engine)
            if adapted:
                write_adapter(model, temporary, writes)
            else:
                _write_tensors(model, temporary, limit, writes)
            with collective.on_all_ranks(OSError):
                if writes:
                    folders.replace(temporary, directory, _aside(directory))
                    folders.remove(_aside(directory))
        except Exception:
            if writes:
                with suppress(OSError):
                    folders.remove(temporary)
            raise


def _begin(folder: Path, model: PreTrainedModel | None, tokenizer) -> None:
    """Makes a new folder with everything but the weights."""
    folders.remove(folder)
    folder.mkdir(parents=True)
    if model is not None:
        model.config.save_pretrained(folder)
    if model is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_tensors(model: PreTrainedModel, folder: Path, limit: int, writes: bool) -> None:
    """Gathers each stored tensor on all ranks and hands it to a writer, under its name in files, where `writes`; agrees after
    each, so that a full disk ends it everywhere."""
    stored: dict[str, torch.Tensor] = dict(_stored_names(model))
    # Buffers are not partitioned. state_dict() knows which of them are persistent.
    persistent = model.state_dict().keys()
    stored |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    groups = _groups_in_files(model, {name: whole_shape(tensor) for name, tensor in stored.items()})
    writer = _ShardWriter(folder, _split(groups, stored, limit))
    for group in counted(groups, "saving the model", "tensor"):
        partitioned = [stored[name] for name in group.given if isinstance(stored[name], torch.nn.Parameter)]
        with deepspeed.zero.GatheredParameters(partitioned):
            copies = {n: stored[n].detach().to("cpu", copy=True).contiguous() for n in group.given} if writes else {}
        with collective.on_all_ranks(OSError):
            made = group.convert(copies) if writes else {}
            del copies
            for key in list(made):  # pieces of a fused tensor get memory of their own: the format allows no other
                tensor = made.pop(key)
                writer.add(key, tensor if group.keeps else tensor.clone(memory_format=torch.contiguous_format))


def _split(groups: list[Group], stored: dict[str, torch.Tensor], limit: int) -> StateDictSplit:
    """Which tensor comes into which file, by the rule of Transformers, without a tensor's bytes."""
    shapes = {}
    for group in groups:
        given = {n: torch.empty(whole_shape(stored[n]), dtype=stored[n].dtype, device="meta") for n in group.given}
        shapes |= {key: torch.empty_like(tensor) for key, tensor in group.convert(given).items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=limit)
    parameters = sum(math.prod(whole_shape(p)) for p in stored.values() if isinstance(p, torch.nn.Parameter))
    split.metadata = {"total_parameters": parameters, **split.metadata}
    return split


def _groups_in_files(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> list[Group]:
    try:
        return FileNames(model, shapes).to_files()
    except ValueError as error:
        logger.warning("the model is saved under its names in memory, since in the format of its files %s", error)
        return [Group((name,), (name,)) for name in shapes]


def load_weights(engine, directory: str | Path) -> None:
    """Overwrites the weights of an engine's model with those of a folder that `save_pretrained` wrote for the same model.

    Of a model that PEFT has wrapped it is the adapter's. Rank 0 reads one parameter at a time and shares it. The optimizer's
    state is left alone: meant for evaluating a kept model or for starting again. Call it on all ranks.

    Raises:
        ValueError: on all ranks, before a weight is changed: a parameter is missing in the folder or has another shape there,
            or a file cannot be read.
        RuntimeError: a journal is open, whose steps would not lead to these weights.
    """
    if getattr(engine, "journaling", False):
        raise RuntimeError(
            "load_weights while a journal is open would make its weights others than those of its steps; call "
            "engine.close_journal() first"
        )
    engine.frozen_sha256s = None  # to be hashed anew
    directory, reads = Path(directory), collective.rank() == 0
    if is_adapted(engine.module):
        with collective.together("load_weights"):
            _release_gathered(engine)
            load_adapter(engine.module, directory, reads)
        return
    with collective.together("load_weights"), ExitStack() as opened:
        with collective.on_all_ranks(ValueError) as made:
            stored, groups, files = _stored_names(engine.module), [], {}
            if reads:
                files = _open_weights(directory, opened)
                groups = _groups_of(directory, files, engine.module, stored)
            made.mine = [group.made for group in groups]
        _release_gathered(engine)
        for index, names in enumerate(counted(made.all[0], "loading the weights", "tensor")):
            with collective.on_all_ranks(ValueError):
                tensors = {}
                if reads:
                    tensors = groups[index].convert({key: files[key].get_tensor(key) for key in groups[index].given})
            with deepspeed.zero.GatheredParameters([stored[name] for name in names], modifier_rank=0):
                for name, tensor in tensors.items():
                    stored[name].data.copy_(tensor)


def _open_weights(directory: Path, opened: ExitStack) -> dict:
    """Tensor name -> the open safetensors file in `directory` that holds it. Raises ValueError."""
    index, path = directory / _INDEX, directory / "model.safetensors"
    if index.exists():
        paths = sorted({directory / file for file in read_json(index, f"index {str(index)!r}")["weight_map"].values()})
    else:
        paths = [path] if path.exists() else []
    files = {}
    for path in paths:
        try:
            file = opened.enter_context(safe_open(path, framework="pt"))
            files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    return files


def _groups_of(directory: Path, files: dict, model: PreTrainedModel, stored: dict[str, torch.nn.Parameter]) -> list[Group]:
    """How the parameters are made of what is in files. Raises ValueError unless every one is there and has its shape."""
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in files.items()}
    groups = FileNames(model, {name: whole_shape(p) for name, p in stored.items()}).from_files(shapes)
    missing = stored.keys() - {name for group in groups for name in group.made}
    if missing:
        first = next(name for name in stored if name in missing)
        raise ValueError(f"{directory} has no weights for {first!r} ({len(missing)} missing); was it saved from this model?")
    for group in groups:
        made = group.convert({key: torch.empty(shapes[key], device="meta") for key in group.given})
        for name, tensor in made.items():
            there, here = tuple(tensor.shape), whole_shape(stored[name])
            if there != here:
                raise ValueError(
                    f"{directory} has {name!r} of shape {there}, in this model it is {here}; was it saved from this model?"
                )
    return groups


class _ShardWriter:
    """Writes each safetensors file of a split once its tensors are there, and the index with the last of several."""

    def __init__(self, folder: Path, split: StateDictSplit):
        self._folder, self._split = folder, split
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._left = len(split.filename_to_tensors)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor on the CPU that nobody else changes. Raises OSError."""
        file = self._split.tensor_to_filename[name]
        pending = self._pending.setdefault(file, {})
        pending[name] = tensor
        if len(pending) < len(self._split.filename_to_tensors[file]):
            return
        path = self._folder / file
        try:
            save_file(self._pending.pop(file), path, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors' own for a full disk, without the path
            raise OSError(f"{path} cannot be written: {error}") from error
        self._left -= 1
        if not self._left and self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            (self._folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _release_gathered(engine) -> None:
    """Lets go of parameters that DeepSpeed gathers ahead.

    After training with backward passes it expects one behind an evaluation's forward too, and `GatheredParameters` fails
    on a parameter in flight.
    """
    if hasattr(engine, "empty_partition_cache"):
        engine.empty_partition_cache()


def _stored_names(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by the name of which the stored one is made: of a tied parameter's names, the one that is not tied to
    another."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in names or names[id(parameter)][0] in tied:
            names[id(parameter)] = (name, parameter)
    return dict(names.values())


def _aside(directory: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return directory.with_name(f".{directory.name}.old")


def _parse_size(text: str) -> int:
    number, unit = str(text)[:-2], str(text)[-2:].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ValueError(f'max_shard_size is {text!r}; give a positive number with KB, MB, GB or TB, for example "5GB"')
    return size
