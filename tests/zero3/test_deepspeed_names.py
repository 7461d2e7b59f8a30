"""A canary: DeepSpeed's undocumented names, all listed in one place, are there; and nothing outside zero3/ uses one."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

import ds_zoadamu
from ds_zoadamu import zero3

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for
from ..helpers.models import OddModel

PACKAGE = Path(ds_zoadamu.__file__).parent
LIVE = ("parameter", "ds_tensor", "nvme_swapper", "engine", "optimizer", "offload")
"""Owners that only a partitioned model has; the others can be imported."""
COMMON = {
    "status",
    "dtype",
    "buffers",
    "start",
    "load",
    "destroy",
    "nvme",
    "swap_in",
    "all_gather",
    "_config",
    "ThroughputTimer",
}
"""Ordinary words, which other things are called too."""
COMMON |= {"AVAILABLE", "NOT_AVAILABLE", "ThroughputTimer"}


def listed() -> dict[str, list[str]]:
    """The names of the docstring by their owner."""
    names: dict[str, list[str]] = {}
    owner = ""
    for line in zero3.__doc__.split("\n\n")[2].splitlines():
        if line.startswith("    "):
            name, purpose = line.split(maxsplit=1)
            assert purpose
            names[owner].append(name)
        else:
            owner = line
            names[owner] = []
    return names


def _missing(owner: object, names: list[str]) -> list[str]:
    return [name for name in names if not hasattr(owner, name)]


@pytest.mark.parametrize("owner", [owner for owner in listed() if owner not in LIVE])
def test_what_can_be_imported_is_there(owner):
    try:
        found = importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, name = owner.rpartition(".")
        found = getattr(importlib.import_module(module), name)
    assert _missing(found, listed()[owner]) == []


def _live(rank, world_size):
    engine, names = engine_for(OddModel(), config(1)), listed()
    parameter = engine.optimizer.partitions[0].param
    owners = {"parameter": parameter, "ds_tensor": parameter.ds_tensor, "engine": engine, "offload": engine._offload}
    adamw = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}  # nothing is compiled
    owners["optimizer"] = engine_for(torch.nn.Linear(3, 3), config(1) | adamw).optimizer
    without_swapper = names | {"parameter": [name for name in names["parameter"] if name != "nvme_swapper"]}
    return {owner: _missing(value, without_swapper[owner]) for owner, value in owners.items()}


@pytest.mark.ranks
def test_what_a_partitioned_model_has_is_there():
    assert run_ranks(1, _live)[0] == dict.fromkeys(set(LIVE) - {"nvme_swapper"}, [])


def test_what_the_swapper_has_is_in_its_source():
    """An object of it needs the operator for NVMe."""
    module = importlib.import_module("deepspeed.runtime.swap_tensor.partitioned_param_swapper")
    tree = ast.parse(Path(module.__file__).read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert [name for name in listed()["nvme_swapper"] if name not in found] == []
    assert "nvme_swapper" in Path(importlib.import_module("deepspeed.runtime.zero.partition_parameters").__file__).read_text()


def _used(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    return names | {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_the_list_is_whole_and_only_zero3_uses_it():
    owners = listed()
    names = {name for several in owners.values() for name in several}
    names |= {owner.rpartition(".")[2] for owner in owners if owner.rpartition(".")[2][0].isupper()}
    inside, outside = set(), {}
    for path in PACKAGE.rglob("*.py"):
        used = _used(path)
        if path.parent.name == "zero3":
            inside |= used
        elif found := used & (names - COMMON):
            outside[path.name] = sorted(found)
    assert outside == {}
    assert sorted(names - inside) == []
    attributes = {name for name in inside if name.startswith("ds_")} - {"ds_zoadamu", "ds_zoadamu_temporaries"}
    assert sorted(attributes - names) == []
