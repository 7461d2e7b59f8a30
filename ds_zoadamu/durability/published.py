"""A fine-tune that was published as its journal and a card: in a folder, or in a repository of the hub."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import JournalError, ReplayError, shown
from ..files.companions import COMPANIONS
from ..files.hub import is_hub_name
from ..files.hub_access import one_line
from ..files.untrusted import check_shape, read_file
from ..files.yaml_files import parse_yaml
from .journal import Contents, parse_journal, read_bytes
from .schemas import Count, Sha256

CARD, JOURNAL, ADAPTERS = "README.md", "journal.jsonl", "initial_adapters"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY = "ds_zoadamu"
"""Of a card's metadata, which has ``Stated`` under it."""
_MAX_CARD = 1 << 22  # bytes
_SECTION = re.compile(rf"^{KEY}:[ \t]*\n(?:[ \t]+.*\n)+", re.MULTILINE)


class Stated(BaseModel):
    """What a card says of its journal: the file's SHA-256, the step that the weights are of, and their digest."""

    model_config = ConfigDict(strict=True, extra="allow")

    journal_sha256: Sha256
    step: Count
    weights_sha256: Sha256 | None = None


@dataclass(frozen=True)
class Published:
    """Where a published journal lies, and what its card states; ``stated`` is None without a card, or where it says nothing."""

    folder: Path
    journal: Path
    contents: Contents
    stated: Stated | None

    @property
    def base(self) -> str:
        """The base that the journal names: adapters beside it, else a name on the hub. Raises ReplayError."""
        name = self.contents.header["base"]["name"]
        if name == ADAPTERS and (self.folder / ADAPTERS).is_dir():
            return str(self.folder / ADAPTERS)
        if name is None or not is_hub_name(name):
            raise ReplayError(f"the journal of {str(self.folder)!r} names {shown(name)} as its base: name the base with --base")
        return name


def adapter_files(header: Mapping[str, Any]) -> list[str]:
    """Where a journal's run began with the adapters in ADAPTERS: all files of them that a replay asks for, which lie there."""
    base = header["base"]
    if base["name"] != ADAPTERS:
        return []
    return [f"{ADAPTERS}/{name}" for name in (*(base["files"] or ()), *(base.get("companions") or ("adapter_config.json",)))]


def find_published(name: str) -> Published:
    """The journal and card of a folder, or of a repository of the hub, of which nothing else is fetched.

    Raises ReplayError where there is no journal, or another one than the card states; JournalError, HubError, OSError.
    """
    folder = Path(name) if Path(name).is_dir() else _fetched(name)
    journal = folder / JOURNAL
    if not journal.exists():
        raise ReplayError(f"{name!r} has no {JOURNAL}: nothing can be rebuilt from it")
    data, stated = read_bytes(journal), stated_in(folder / CARD)
    if stated is not None and (sha256 := hashlib.sha256(data).hexdigest()) != stated.journal_sha256:
        raise ReplayError(
            f"{JOURNAL} of {name!r} has SHA-256 {sha256}, its {CARD} states {stated.journal_sha256}: it was changed, or is of "
            "another run"
        )
    contents = parse_journal(data, f"journal {str(journal)!r}")
    if contents.damage is not None:
        raise contents.damage
    if stated is not None and stated.step > len(contents.records):
        raise JournalError(f"{CARD} of {name!r} is of step {stated.step}; its journal ends at {len(contents.records)}")
    return Published(folder, journal, contents, stated)


def stated_in(card: Path) -> Stated | None:
    """What a card's metadata states of its journal. Raises ReplayError where it is malformed, OSError."""
    if not card.exists():
        return None
    text = read_file(card, _MAX_CARD).decode(errors="replace").replace("\r\n", "\n").lstrip()
    metadata = text[4:].partition("\n---")[0] + "\n" if text.startswith("---\n") else ""
    if (found := _SECTION.search(metadata)) is None:  # only this is read: the rest may be any YAML that the hub takes
        return None
    try:
        section = parse_yaml(found[0].encode())[KEY]
        check_shape(Stated, section)
    except ValueError as e:
        raise ReplayError(f"{str(card)!r} states nothing usable under {KEY}: {e}") from e
    return Stated(**section)


def _fetched(name: str) -> Path:
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ReplayError(f"{name!r} is neither a folder nor a name on the hub")
    from huggingface_hub import HfApi

    wanted = [CARD, JOURNAL, *(f"{ADAPTERS}/{file}" for file in (_ADAPTER_WEIGHTS, *COMPANIONS))]
    with one_line(f"{name!r} cannot be fetched from the hub"):
        return Path(HfApi().snapshot_download(name, allow_patterns=wanted))
