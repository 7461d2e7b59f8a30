"""Imported first by a command: what libraries say at its start and a user can do nothing about is not printed.

Only single messages are left out, by their words. Of ranks other than 0 also what Transformers and the hub have to say, which
rank 0 says too.
"""

import logging
import os
import warnings
from pathlib import Path

_NO_GPU = "Setting accelerator to CPU"  # worth saying only where there is a GPU


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_GPU) or Path("/dev/nvidiactl").exists()


logging.getLogger("DeepSpeed").addFilter(_says_something)
# DeepSpeed and Transformers call what torch has given another name.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
if os.environ.get("RANK", "0") != "0":
    for _name in ("huggingface_hub", "transformers"):
        logging.getLogger(_name).setLevel(logging.ERROR)
