"""Which model a run started from: a folder or hub name, its revision, and SHA-256 over its safetensors files."""

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..console.progress import progress
from ..distributed.collective import describe
from ..errors import ConfigError, ReplayError, shown
from ..files.companions import COMPANIONS, companion_hashes
from ..files.safetensors_io import write_durably
from ..files.untrusted import check_file_name, open_file, parse_json, read_file

INDEX_NAMES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
SINGLE_NAMES = ("model.safetensors", "adapter_model.safetensors")
_BLOCK = 1 << 24
_MAX_INDEX = 1 << 28  # bytes


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model or adapter folder, the index first where there is one; the index is read, and names
    files in the folder only.

    Raises ReplayError where there are none, or where one that the index names is missing.
    """
    for index_name in INDEX_NAMES:
        index = folder / index_name
        if index.exists():
            files = [folder / name for name in _files_of(index)]
            if missing := [f.name for f in files if not f.exists()]:
                raise ReplayError(f"{str(folder)!r} lacks {missing[0]!r}, which {index_name} names ({len(missing)} missing)")
            return [index, *files]
    for name in SINGLE_NAMES:
        if (folder / name).exists():
            return [folder / name]
    raise ReplayError(
        f"{str(folder)!r} has no safetensors weights ({', '.join(SINGLE_NAMES)} or an index); save the model there with "
        "save_pretrained. Weights in pickle files are not read"
    )


def _files_of(index: Path) -> list[str]:
    """The names of the files in an index. Raises ReplayError."""
    try:
        content = parse_json(read_file(index, _MAX_INDEX), repeated_keys=True)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map")
        names = sorted({check_file_name(name) for name in weight_map.values()})
        if others := [name for name in names if not name.endswith(".safetensors")]:
            raise ValueError(f"it names {shown(others[0])}")
    except ValueError as e:
        raise ReplayError(f"{str(index)!r} is not an index of safetensors files: {e}") from e
    return names


def check_whole(name: str | Path, revision: str | None = None) -> None:
    """Raise ConfigError for a safetensors file of a model on this machine that is cut short or damaged, by its name: the error
    of the library has none, and the ranks would meet it at different times."""
    folder = find_folder(str(name), revision, download=False)
    try:
        paths = [] if folder is None else weight_files(folder)
    except ReplayError:
        return  # no safetensors files: whoever loads the model says what it lacks
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except SafetensorError as e:
            raise ConfigError(f"{str(path)!r} is not a whole safetensors file: {e}; take an undamaged copy") from e


def find_folder(name: str, revision: str | None = None, *, download: bool, files: Iterable[str] | None = None) -> Path | None:
    """The local folder of a model: ``name`` itself, or the hub's snapshot of it (fetched only with ``download``); None if there
    is none. Of the hub's files only ``files`` and companions are fetched (None: all safetensors files), never code."""
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    weights = ["*.safetensors", *INDEX_NAMES] if files is None else map(glob.escape, files)
    patterns = [*weights, *COMPANIONS]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=not download))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def file_sha256(path: Path, progress: Callable[[int], object] = id) -> str:
    """SHA-256 in hex; ``progress`` is told the bytes read."""
    digest = hashlib.sha256()
    with open(open_file(path)[0], "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def combined_sha256(files: dict[str, str]) -> str:
    """One SHA-256 for all files: over the lines "SHA256  NAME\\n" that sha256sum prints for them, sorted by name."""
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in sorted(files.items())).encode()).hexdigest()


def hash_files(paths: list[Path], *, use_cache: bool) -> dict[str, str]:
    """SHA-256 of every file by its name. With ``use_cache`` one that was hashed before, at the same path, size and time, is not
    read again."""
    cache = _HashCache() if use_cache else None
    result = {path: cache.known(path) if cache else None for path in paths}
    new = [path for path, sha in result.items() if sha is None]
    with (
        progress("hashing files", sum(path.stat().st_size for path in new), "B", scale=True) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # hashlib lets other threads run
    ):
        result |= zip(new, pool.map(lambda path: file_sha256(path, bar.update), new), strict=True)
    result = {path.name: sha for path, sha in result.items()}
    if cache:
        cache.remember({path: result[path.name] for path in paths})
    return result


class _HashCache:
    """SHA-256 by (real path, size, modification time), in the user's cache folder. A cache that cannot be used is no error."""

    def __init__(self) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self._path = Path(root) / "ds_zoadamu" / "file_hashes.json"
        try:
            self._entries = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._entries = {}
        if not isinstance(self._entries, dict):
            self._entries = {}

    @staticmethod
    def _state(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]

    def known(self, path: Path) -> str | None:
        entry = self._entries.get(str(path.resolve()))
        return entry[2] if isinstance(entry, list) and len(entry) == 3 and entry[:2] == self._state(path) else None

    def remember(self, hashes: dict[Path, str]) -> None:
        new = {str(path.resolve()): [*self._state(path), sha] for path, sha in hashes.items()}
        if new.items() <= self._entries.items():
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, json.dumps({**self._entries, **new}).encode())
        except OSError:
            pass


def base_folder(module: Any, base: str | Path | None) -> Path | None:
    """The local folder of a run's base model: of ``base``, or None: of what the model itself says it was loaded from."""
    name = _base_name(module, base)
    return find_folder(name, _revision(module), download=False) if name else None


def _base_name(module: Any, base: str | Path | bool | None) -> str:
    if base is False:
        return ""
    if base is not None:
        return str(base)
    return "" if hasattr(module, "peft_config") else getattr(getattr(module, "config", None), "_name_or_path", None) or ""


def _revision(module: Any) -> str | None:
    return getattr(getattr(module, "config", None), "_commit_hash", None)


def base_identity(module: Any, base: str | Path | bool | None) -> dict:
    """What a journal's header says of the base model: {"name", "revision", "sha256", "files", "companions"}; sha256 and files
    None, with a "note" and without companions, where the weights did not come from safetensors files. A local folder is named
    without the path to it: journals are published.

    Args: ``module``: the model; ``base``: folder or hub name, or None: what the model itself says it was loaded from,
    or False: the weights are in no files. Raises ReplayError where ``base`` was given and has no safetensors weights.
    """
    adapters = hasattr(module, "peft_config")
    name, revision, folder = _base_name(module, base), _revision(module), base_folder(module, base)
    unknown = {
        "name": Path(name).name if os.path.isabs(name) else name or None,
        "revision": revision,
        "sha256": None,
        "files": None,
    }
    if folder is None:
        if base is not None and base is not False:
            raise ReplayError(f"base {name!r} is neither a folder nor a model in the hub's local cache")
        what = "adapters were not loaded from a folder: pass base=" if adapters else "the model was not loaded from files"
        return {**unknown, "note": what}
    try:
        files, companions = hash_files(weight_files(folder), use_cache=True), companion_hashes(folder)
    except ReplayError as e:
        if base is not None:
            raise
        return {**unknown, "note": str(e).replace(str(folder), folder.name)}
    except OSError as e:
        raise ReplayError(f"base model {describe(e)}") from e
    short = folder.resolve().name if Path(name).is_dir() else name
    sha256 = combined_sha256(files)
    return {"name": short, "revision": revision, "sha256": sha256, "files": files, "companions": companions}
