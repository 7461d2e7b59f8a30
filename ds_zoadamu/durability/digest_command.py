"""``ds_zoadamu digest FOLDER --journal FILE``: the digest of a model's trained weights, to compare with what its author
published."""

from typing import Any

from ..distributed.collective import rank


def add_arguments(parser: Any) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model in safetensors files")
    parser.add_argument("--journal", required=True, metavar="FILE", help="the run's journal.jsonl, which says what was trained")


def run(args: Any) -> int:
    from .replay import folder_digest

    if rank() == 0:
        print(folder_digest(args.folder, args.journal))
    return 0
