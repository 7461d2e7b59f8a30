"""``ds_zoadamu replay --base MODEL --journal FILE --output FOLDER``: the tuned model out of its base and its journal."""

import os
from typing import Any

import torch

from ..distributed import collective
from ..distributed.start import launched_world_size
from ..distributed.waiting import time_limit
from ..errors import ReplayError
from .replay import replay


def add_arguments(parser: Any) -> None:
    """The arguments of ``ds_zoadamu replay``."""
    parser.add_argument(
        "--base", required=True, help="folder or hub name of the model the run started from, or its adapters before training"
    )
    parser.add_argument("--journal", required=True, help="the run's journal.jsonl")
    parser.add_argument("--output", required=True, help="new folder for the model, as from_pretrained reads it")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop after this step (default: the journal's last)")
    parser.add_argument("--revision", help="of a base on the hub (default: the one in the journal)")
    parser.add_argument(
        "--expect", metavar="SHA256", help="digest that the trained weights must have; anything else is an error"
    )
    parser.add_argument("--device", help='"cpu" or "cuda" (default: cuda where there is one)')


def run(args: Any) -> int:
    """Rebuild the model, on one process or a launcher's ranks; returns the exit status. Raises ReplayError, JournalError."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if launched_world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=time_limit())
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % max(1, torch.cuda.device_count())}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ReplayError(f'--device is {args.device!r}; it must be "cpu" or "cuda", and be there: {reason}') from e
    result = replay(
        args.base, args.journal, args.output, until=args.until, revision=args.revision, expect=args.expect, device=device
    )
    if collective.rank() == 0:
        print(f"{result.output}: the model after step {result.steps}\nSHA-256 of the trained weights: {result.sha256}")
    return 0
