"""Folders of checkpoints on disk: which are there, which are whole, how one takes its place, and which are removed.

DIR/latest                          the tag of the newest one
DIR/.lock                           locked by the engine that saves here, see checkpoint_owner.py
DIR/TAG/manifest.json               written last; a folder without it is no checkpoint
DIR/TAG/rank-00000-of-00002.safetensors
DIR/.writing-TAG                    being written, or left by a kill: never read
DIR/.replaced-TAG                   the older one of the same tag, read only while DIR/TAG is not there
DIR/.removing-TAG                   being removed

DIR and DIR/TAG may be links to folders. A link in the place of a TAG is replaced and removed itself; what it points to stays.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown
from ..files import folders
from ..files.crash_points import reach
from ..files.safetensors_io import sync_directory, write_beside, write_durably
from ..files.untrusted import check_file_name, check_shape, parse_json, read_file
from .base_model import file_sha256
from .schemas import Manifest

FORMAT = "ds_zoadamu-checkpoint"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 held client_state and the states of scheduler and data as plain JSON, which loses types; 2 as ``typed_json``."""
MANIFEST, LATEST, LOCK = "manifest.json", "latest", ".lock"
_MAX_BYTES = 1 << 28
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
_OURS = re.compile(r"\..*|rank-\d{5,}-of-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Found:
    """A checkpoint that has a readable manifest; its files are not checked yet."""

    tag: str
    path: Path
    manifest: dict

    @property
    def step(self) -> int:
        return self.manifest["step"]


def check_tag(tag: Any) -> str:
    """The tag as a string. Raises CheckpointError for one that is not a plain folder name."""
    tag = str(tag)
    try:
        check_file_name(tag)
    except ValueError:
        pass
    else:
        if not tag.startswith(".") and tag != LATEST:
            return tag
    raise CheckpointError(
        f"tag is {shown(tag)}; it must be the name of a folder, without '/' and not beginning with '.', such as "
        "'global_step100'"
    )


# --- manifests ----------------------------------------------------------------------------------------------------------------


def encode_manifest(manifest: dict) -> bytes:
    body = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **manifest})[:-1].encode()
    return body + b', "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def read_manifest(folder: Path) -> dict:
    """Raises CheckpointError where there is none, or it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        data = read_file(path, _MAX_BYTES)
    except OSError as e:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is not whole: {MANIFEST} cannot be read: {e.strerror}; load another one"
        ) from e
    return parse_manifest(data, folder)


def parse_manifest(data: bytes, folder: Path) -> dict:
    """What a manifest's bytes say; ``folder`` names the checkpoint in messages. Raises CheckpointError."""
    body, separator, tail = data.rpartition(b', "sha256": "')
    if not separator or tail != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {MANIFEST} is damaged (its checksum does not fit); load another one"
        )
    try:
        manifest = parse_json(body + b"}", nonfinite=True)
        if not isinstance(manifest, dict):
            raise ValueError(f"it holds a {type(manifest).__name__}")
        if manifest.get("format") == FORMAT and manifest.get("version") in READABLE_VERSIONS:
            check_shape(Manifest, manifest)
            return manifest
    except ValueError as e:
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {MANIFEST} is not that of a checkpoint: {e}; load another one"
        ) from e
    raise CheckpointError(
        f"checkpoint {str(folder)!r} has format {shown(manifest.get('format'))} version {shown(manifest.get('version'))}; this "
        f"release reads {FORMAT!r} versions {' and '.join(map(str, READABLE_VERSIONS))}"
    )


def check_file(folder: Path, entry: dict) -> None:
    """Compare one file with its manifest's {"file", "size", "sha256"}. Raises CheckpointError."""
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"checkpoint file {str(path)!r} has {size} bytes, it was saved with {entry['size']}; load another checkpoint"
            )
        if file_sha256(path) != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint file {str(path)!r} is damaged (its SHA-256 does not fit); load another checkpoint"
            )
    except OSError as e:
        raise CheckpointError(f"checkpoint file {str(path)!r} cannot be read: {e.strerror}; load another checkpoint") from e


# --- finding ------------------------------------------------------------------------------------------------------------------


def latest_tag(directory: Path) -> str | None:
    """What ``latest`` says, or None where it is not there."""
    try:
        data = read_file(directory / LATEST, 4096)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise CheckpointError(f"{str(directory / LATEST)!r} cannot be read: {e.strerror}") from e
    try:
        return check_tag(data.decode(errors="replace").strip())
    except CheckpointError as e:
        raise CheckpointError(f"{str(directory / LATEST)!r}: {e}") from e


def _folder(directory: Path, tag: str) -> Path:
    """Where a tag's checkpoint lies; beside its place, if a kill has struck between the two renames that replace it."""
    path, replaced = directory / tag, directory / (_REPLACED + tag)
    return replaced if not os.path.lexists(path) and replaced.exists() else path


def find(directory: Path, tag: str) -> Found:
    """The checkpoint of a tag. Raises CheckpointError where there is none."""
    path = _folder(directory, tag)
    if not path.is_dir():
        tags = ", ".join(repr(found.tag) for found in find_all(directory)[:5]) or "none"
        raise CheckpointError(f"no checkpoint {tag!r} in {str(directory)!r}; there are: {tags}")
    return Found(tag, path, read_manifest(path))


def find_all(directory: Path) -> list[Found]:
    """Every checkpoint of a directory that has a good manifest, the newest step first."""
    names = os.listdir(directory) if directory.is_dir() else []
    tags = {name.removeprefix(_REPLACED) for name in names if name.startswith(_REPLACED) or not name.startswith(".")}
    found = []
    for tag in sorted(tags):
        path = _folder(directory, tag)
        try:
            if (path / MANIFEST).is_file():
                found.append(Found(tag, path, read_manifest(path)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda f: f.step, reverse=True)


# --- writing, on rank 0 -------------------------------------------------------------------------------------------------------


def begin(directory: Path, tag: str) -> Path:
    """An empty folder to write a checkpoint in; clears what kills have left. ``directory`` is there and has no other writer.

    Raises OSError, or CheckpointError where something that is no checkpoint has the tag for its name.
    """
    for name in os.listdir(directory):
        if name.startswith(_REPLACED):
            folders.put_back(directory / name.removeprefix(_REPLACED), directory / name)
        elif name.startswith((_WRITING, _REMOVING)) or name == f".{LATEST}.writing":
            with suppress(OSError) if name.startswith(_REMOVING) else nullcontext():  # prune has said so, and tries again
                folders.remove(directory / name)
    _check_replaceable(directory / tag)
    folder = directory / (_WRITING + tag)
    folder.mkdir()
    return folder


def _check_replaceable(path: Path) -> None:
    if path.is_symlink() or not path.exists() or (path / MANIFEST).exists():
        return
    if not path.is_dir() or not all(_OURS.fullmatch(name) for name in os.listdir(path)):
        raise CheckpointError(
            f"{str(path)!r} is there and is no checkpoint; it is not replaced: move it away, or give another tag"
        )


def discard(folder: Path) -> None:
    """Remove a folder of ``begin`` that will not become a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, tag: str, manifest: dict, *, save_latest: bool) -> Path:
    """Make a folder whose files are durable the checkpoint of its tag, in the place of an older one.

    Raises OSError, or CheckpointError for a manifest that could not be read again; everything is as it was then, for all that
    needs room on the disk is written first.
    """
    directory, step = folder.parent, manifest["step"]
    data = encode_manifest(manifest)
    if len(data) > _MAX_BYTES:
        sizes = {key: len(json.dumps(value)) for key, value in manifest.items()}
        key = max(sizes, key=sizes.__getitem__)
        raise CheckpointError(
            f"the manifest of checkpoint {tag!r} has {len(data)} bytes, {sizes[key]} of them for {key}; it can have at most "
            f"{_MAX_BYTES}: keep less there"
        )
    parse_manifest(data, folder)
    path, replaced = directory / tag, directory / (_REPLACED + tag)
    write_durably(folder / MANIFEST, data)
    latest = write_beside(directory / LATEST, (tag + "\n").encode()) if save_latest else None
    reach("save_manifest", step)
    try:
        folders.replace(folder, path, replaced, step)
    except OSError:
        if latest is not None:
            latest.unlink(missing_ok=True)
        raise
    sync_directory(directory)
    reach("save_renamed", step)
    if latest is not None:
        os.replace(latest, directory / LATEST)
        sync_directory(directory)
    reach("save_latest", step)
    folders.remove(replaced)
    return path


def prune(directory: Path, limit: int, keep: str, owns: Callable[[Found], bool | None]) -> None:
    """Remove the oldest checkpoints of this run, by step, until at most ``limit`` are left; never the one tagged ``keep``, and
    none that is not known to be its own, or to which another name here is a link: a user keeps it that way. Raises OSError for
    the first that cannot be removed, when the others are."""
    names = {path: Path(os.path.realpath(path)) for path in directory.iterdir() if path.is_symlink()}
    names = {path: target for path, target in names.items() if target.parent == directory}
    own = [found for found in find_all(directory) if found.path not in names and found.path not in names.values()]
    others = [found for found in own if found.tag != keep and owns(found)]
    errors = []
    for found in others[max(0, limit - 1) :]:
        removing = directory / (_REMOVING + found.tag)
        try:
            os.rename(found.path, removing)  # a kill in the middle leaves nothing that looks like a checkpoint
            reach("save_pruning", found.step)
            folders.remove(removing)
        except OSError as e:
            errors.append(e)
    if errors:
        raise errors[0]
