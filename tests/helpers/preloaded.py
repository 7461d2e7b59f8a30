"""What the fork server imports once for all processes that it forks: whatever tests and commands would import in each of them.

Imported by nothing else. 6 seconds of a processor here are 6 seconds less of each command, and one less of each rank.
"""

import contextlib
import gc
import importlib
import sys

from ds_zoadamu.config.recorded import known_sections

for name in (
    "deepspeed",
    "torch._dynamo",  # the first torch optimizer of a process imports it
    "pytest",
    "ds_zoadamu.initialization",
    "ds_zoadamu.zero3.hf",
    "ds_zoadamu.kernels.cpu",
    "deepspeed.module_inject.auto_ep_layer",
    "transformers.models.opt.modeling_opt",
    "ds_zoadamu.training.run",
    "ds_zoadamu.training.search",
    "ds_zoadamu.hf",
    "matplotlib.pyplot",
    "peft",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "tests.helpers.runs",
    "tests.helpers.tiny_lm",
):
    with contextlib.suppress(ImportError):  # an extra that is not installed
        importlib.import_module(name)
known_sections()  # DeepSpeed's parser is followed once a process
sys.stdout.flush()  # or each fork would write once more what an import has said
gc.collect()
gc.freeze()  # a fork's collections pass over a million objects that it shares with the others
