"""``ds_zoadamu publish RUN TO``: a fine-tune as its journal and a card, in a repository of the hub or in a folder."""

import hashlib
from pathlib import Path
from typing import Any

from ..durability.journal import parse_journal, read_bytes
from ..durability.published import ADAPTERS, CARD, JOURNAL, adapter_files, stated_in
from ..errors import JournalError
from ..files.safetensors_io import write_durably
from ..files.untrusted import read_file
from . import card
from .upload import create_repo, upload_files

_MAX_BYTES = 1 << 30


def add_arguments(parser: Any) -> None:
    """The arguments of ``ds_zoadamu publish``."""
    parser.add_argument(
        "run", metavar="RUN", help="folder with journal.jsonl and, where a model was saved, its card; or a journal"
    )
    parser.add_argument("to", metavar="TO", help="name of a repository on the hub, or a folder that begins with ./, / or ~")
    parser.add_argument("--hub_private_repo", action="store_true", help="make the repository a private one, where it is new")


def run(args: Any) -> int:
    """Send or copy the files; returns the exit status. Raises JournalError, ReplayError, HubError, OSError."""
    journal = Path(args.run) / JOURNAL if Path(args.run).is_dir() else Path(args.run)
    data = read_bytes(journal)
    contents = parse_journal(data, f"journal {str(journal)!r}")
    if contents.damage is not None:
        raise contents.damage
    files: dict[str, bytes] = {JOURNAL: data}
    files |= {name: read_file(journal.parent / name, _MAX_BYTES) for name in adapter_files(contents.header)}
    local = args.to.startswith((".", "/", "~"))
    repo = None if local else create_repo(args.to, args.hub_private_repo or None)
    files[CARD] = _card(journal, data, contents.header, len(contents.records), repo).encode()
    if local:
        _copy(files, Path(args.to).expanduser())
    else:
        upload_files(files, repo, f"Journal of {len(contents.records)} steps")
    print(f"{args.to if local else repo}: {', '.join(files)}\nSHA-256 of the journal: {hashlib.sha256(data).hexdigest()}")
    return 0


def _card(journal: Path, data: bytes, header: dict, steps: int, repo: str | None) -> str:
    """The card that the run has left beside its journal or its model, else one of the journal alone."""
    base = header["base"]["name"]
    adapters = base == ADAPTERS
    for path in (journal.parent / CARD, journal.parent / "model" / CARD):
        stated = stated_in(path)
        if stated is None:
            continue
        if stated.journal_sha256 != hashlib.sha256(data).hexdigest():
            raise JournalError(f"{str(path)!r} states another SHA-256 than journal {str(journal)!r} has: save the model again")
        text = path.read_text(encoding="utf-8")
        known = card.Run(
            journal=data,
            step=stated.step,
            weights_sha256=stated.weights_sha256,
            adapters=adapters,
            **card.said_by(text),
        )
        return card.with_use(text, known, repo, has_weights=False)
    known = card.Run(journal=data, step=steps, base_model=None if adapters else card.hub_name(base), adapters=adapters)
    name = (repo or journal.absolute().parent.name).split("/")[-1]
    return card.with_use(card.new_card(known, name), known, repo, has_weights=False)


def _copy(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_durably(folder / name, content)
