"""``ds_zoadamu replay --from PUBLISHED`` or ``--base MODEL --journal FILE --output FOLDER``: the tuned model out of its base
and its journal."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..distributed import collective
from ..distributed.start import launched_world_size
from ..distributed.waiting import time_limit
from ..errors import ReplayError
from .published import find_published
from .replay import replay


def add_arguments(parser: Any) -> None:
    """The arguments of ``ds_zoadamu replay``."""
    parser.add_argument(
        "--from", dest="published", metavar="NAME", help="repository on the hub, or folder, with a journal and its card"
    )
    parser.add_argument(
        "--base",
        help="folder or hub name of the model the run started from, or its adapters before training (default with --from: the "
        "base that the journal names)",
    )
    parser.add_argument("--journal", help="the run's journal.jsonl, in the place of --from")
    parser.add_argument(
        "--output", help="new folder for the model, as from_pretrained reads it (default with --from: ./NAME-rebuilt)"
    )
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="stop after this step (default: the card's, else the journal's last)"
    )
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
    with collective.on_all_ranks(ReplayError):
        given = _given(args)
    result = replay(**given, revision=args.revision, device=device)
    if collective.rank() == 0:
        print(f"{result.output}: the model after step {result.steps}\nSHA-256 of the trained weights: {result.sha256}")
    return 0


def _given(args: Any) -> dict[str, Any]:
    """What ``replay`` takes of the arguments and, with --from, of what was published. Raises ReplayError, JournalError,
    HubError, OSError."""
    given = {"base": args.base, "journal": args.journal, "output": args.output, "until": args.until, "expect": args.expect}
    if args.published is None:
        for name in ("base", "journal", "output"):
            if given[name] is None:
                raise ReplayError(f"--{name} is missing; it is needed without --from")
        return given
    if args.journal is not None:
        raise ReplayError("--from and --journal both name a journal: give one of them")
    found = find_published(args.published)
    given |= {"journal": found.journal, "base": args.base or found.base}
    given["output"] = args.output or f"{Path(args.published).resolve().name}-rebuilt"
    if found.stated is None and collective.rank() == 0:
        print(f"{args.published} has no card that states SHA-256 of its journal: nothing was compared", file=sys.stderr)
    if found.stated is not None and args.until in (None, found.stated.step):
        given |= {"until": found.stated.step, "expect": args.expect or found.stated.weights_sha256}
    return given
