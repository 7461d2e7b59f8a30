"""Imported first by a command: what libraries say at its start and a user can do nothing about is not printed.

Only single messages are left out, by their words. Of ranks other than 0 also what Transformers and the hub have to say, which
rank 0 says too.
"""

import logging
import os
import warnings
from pathlib import Path

_GPUS = "/dev/nvidiactl"
_NO_GPU = "Setting accelerator to CPU"  # worth saying only where there is a GPU


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_GPU) or Path(_GPUS).exists()


def name_the_cpu() -> None:
    """Where there is no GPU say so to processes of DeepSpeed that do not import this module: they look for none then, and
    print no line about it.
    """
    from deepspeed.accelerator import get_accelerator

    if not Path(_GPUS).exists() and get_accelerator().device_name() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


logging.getLogger("DeepSpeed").addFilter(_says_something)
# DeepSpeed and Transformers call what torch has given another name.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# PEFT 0.21 asks Transformers 5.24 by the old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
if os.environ.get("RANK", "0") != "0":
    for _name in ("huggingface_hub", "transformers"):
        logging.getLogger(_name).setLevel(logging.ERROR)
