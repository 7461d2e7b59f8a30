"""Folders of checkpoints on disk: which are there, which are whole, how one takes its place, and which are removed.

DIR/latest                          the tag of the newest one
DIR/TAG/manifest.json               written last; a folder without it is no checkpoint
DIR/TAG/rank-00000-of-00002.safetensors
DIR/.writing-TAG                    being written, or left by a kill: never read
DIR/.replaced-TAG                   the older one of the same tag, read only while DIR/TAG is not there
DIR/.removing-TAG                   being removed
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._crash_points import reach
from .base_model import file_sha256
from .errors import CheckpointError
from .safetensors_io import sync_directory, write_durably

FORMAT = "ds_zoadamu-checkpoint"
FORMAT_VERSION = 1
MANIFEST, LATEST = "manifest.json", "latest"
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"


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
    if not tag or tag != Path(tag).name or tag.startswith(".") or tag == LATEST:
        raise CheckpointError(
            f"tag is {tag!r}; it must be the name of a folder, without '/' and not beginning with '.', such as 'global_step100'"
        )
    return tag


# --- manifests ----------------------------------------------------------------------------------------------------------------


def encode_manifest(manifest: dict) -> bytes:
    body = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **manifest})[:-1].encode()
    return body + b', "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def read_manifest(folder: Path) -> dict:
    """Raises CheckpointError where there is none, or it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is not whole: {MANIFEST} cannot be read: {e.strerror}; load another one"
        ) from e
    body, separator, tail = data.rpartition(b', "sha256": "')
    if not separator or tail != hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise CheckpointError(
            f"checkpoint {str(folder)!r}: {MANIFEST} is damaged (its checksum does not fit); load another one"
        )
    manifest = json.loads(body + b"}")
    if manifest["format"] != FORMAT or manifest["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {manifest['format']!r} version {manifest['version']!r}; this release reads "
            f"{FORMAT!r} version {FORMAT_VERSION}"
        )
    return manifest


def check_file(folder: Path, entry: dict) -> None:
    """Compare one file with its manifest's {"file", "size", "sha256"}. Raises CheckpointError."""
    path = folder / entry["file"]
    if path.name != entry["file"]:
        raise CheckpointError(f"checkpoint {str(folder)!r} names a file outside its folder: {entry['file']!r}")
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
        return check_tag((directory / LATEST).read_text().strip())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise CheckpointError(f"{str(directory / LATEST)!r} cannot be read: {e.strerror}") from e


def _folder(directory: Path, tag: str) -> Path:
    """Where a tag's checkpoint lies; beside its place, if a kill has struck between the two renames that replace it."""
    path, replaced = directory / tag, directory / (_REPLACED + tag)
    return replaced if not path.exists() and replaced.exists() else path


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
    """An empty folder to write a checkpoint in; clears what kills have left. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(directory):
        replaced = name.startswith(_REPLACED)
        if replaced and not (directory / name.removeprefix(_REPLACED)).exists():
            os.rename(directory / name, directory / name.removeprefix(_REPLACED))
        elif replaced or name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(directory / name)
    folder = directory / (_WRITING + tag)
    folder.mkdir()
    return folder


def discard(folder: Path) -> None:
    """Remove a folder of ``begin`` that will not become a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, tag: str, manifest: dict, *, save_latest: bool) -> Path:
    """Make a folder whose files are durable the checkpoint of its tag, in the place of an older one. Raises OSError."""
    directory, step = folder.parent, manifest["step"]
    write_durably(folder / MANIFEST, encode_manifest(manifest))
    reach("save_manifest", step)
    path, replaced = directory / tag, directory / (_REPLACED + tag)
    if path.exists():
        os.rename(path, replaced)
    os.rename(folder, path)
    sync_directory(directory)
    reach("save_renamed", step)
    if save_latest:
        write_durably(directory / LATEST, (tag + "\n").encode())
    reach("save_latest", step)
    if replaced.exists():
        shutil.rmtree(replaced)
    return path


def prune(directory: Path, limit: int, keep: str) -> None:
    """Remove the oldest checkpoints, by step, until at most ``limit`` are left; never the one tagged ``keep``. Raises
    OSError."""
    others = [found for found in find_all(directory) if found.tag != keep]
    for found in others[max(0, limit - 1) :]:
        removing = directory / (_REMOVING + found.tag)
        os.rename(found.path, removing)  # a kill in the middle leaves nothing that looks like a checkpoint
        shutil.rmtree(removing)
