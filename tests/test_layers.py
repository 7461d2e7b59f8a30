"""Arrows between packages point one way, and rules and kernels are mathematics that need torch and numpy alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ds_zoadamu

LAYERS = (
    "errors", "files", "distributed", "console", "kernels", "rules", "config", "zero3", "durability", "hub", "initialization",
    "hf", "integrations", "tasks", "training", "plan", "benchmark", "reproduce", "cli",
)  # fmt: skip
"""What may import what: a package those before it. Names are public ones of ``ds_zoadamu``, resolved when they are used."""
PACKAGE = Path(ds_zoadamu.__file__).parent

ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "transformers", "accelerate", "datasets"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
import ds_zoadamu.kernels, ds_zoadamu.rules
from ds_zoadamu.rules import Elements, Evaluation, Update, make_rule

rule = make_rule("ZOAdaMU", {"lr": 1e-2, "total_steps": 10})
weight, elements = torch.ones(5), Elements("w", (5,), rule.keys(["w"])["w"], 0, 5)
state = rule.new_state(5, weight.dtype, weight.device)
rule.update_(weight, state, elements, Update(1, rule.direction(1), 1e-2, 0.0, (0.5,)))
assert not torch.equal(weight, torch.ones(5))
below = ("kernels", "rules", "errors")
above = sorted(n for n in sys.modules if n.startswith("ds_zoadamu.") and n.split(".")[1] not in below)
assert not above, above
"""


def test_rules_and_kernels_import_nothing_above_them():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _imports(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, also in its functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            base = ".".join(filter(None, [".".join(package.split(".")[: len(package.split(".")) - node.level + 1]), base]))
        if base.split(".")[0] == "ds_zoadamu":
            yield from {found if (found := f"{base}.{alias.name}") in modules else base for alias in node.names} - {
                "ds_zoadamu"
            }


def _graph() -> dict[str, set[str]]:
    modules = _modules()
    return {name: set(_imports(name, path, modules)) for name, path in modules.items() if name != "ds_zoadamu"}


def test_every_package_has_its_layer_and_imports_from_lower_ones():
    layer = {name: number for number, name in enumerate(LAYERS)}
    graph = _graph()
    assert {name.split(".")[1] for name in graph} == set(LAYERS)
    up = [(a, b) for a, found in graph.items() for b in found if layer[b.split(".")[1]] > layer[a.split(".")[1]]]
    assert up == []


def test_no_circle():
    left = _graph()
    while leaves := [name for name, found in left.items() if not found & left.keys() - {name}]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_few_files_lie_flat():
    assert len(list(PACKAGE.glob("*.py"))) <= 5
