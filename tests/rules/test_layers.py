"""Rules and kernels are mathematics: they need torch and numpy, and nothing that knows of ranks."""

import subprocess
import sys

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
below = ("kernels", "rules", "errors", "shown")
above = sorted(n for n in sys.modules if n.startswith("ds_zoadamu.") and n.split(".")[1] not in below)
assert not above, above
"""


def test_rules_and_kernels_import_nothing_above_them():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
