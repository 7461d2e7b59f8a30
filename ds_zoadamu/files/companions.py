"""The small files beside a model's weights: which of them a replay takes along, how they are verified, and what is left out of
them. None of them is code, and none names code that a loader would run.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import ReplayError, shown
from .untrusted import parse_json, read_file

COMPANIONS = (
    "config.json", "generation_config.json", "adapter_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CODE_KEYS = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "experts_implementation")
"""In configurations: the names under which Transformers fetches and imports modules or compiled kernels."""
_MAX_BYTES = 1 << 28


def check_companion(name: str) -> str:
    """Raises ValueError for a file that a replay never copies."""
    if name not in COMPANIONS:
        raise ValueError(f"{shown(name)} is not among the files that are copied: {', '.join(COMPANIONS)}")
    return name


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a link takes a file of ``folder`` elsewhere. The hub's cache is made of links, from snapshots/COMMIT to blobs."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    return not any(target.is_relative_to(place) for place in (root, *blobs))


def companion_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the companions that a folder has, by name. Raises OSError."""
    found = (name for name in COMPANIONS if (folder / name).is_file())
    return {name: hashlib.sha256(read_file(folder / name, _MAX_BYTES)).hexdigest() for name in found}


def read_companions(folder: Path, expected: dict[str, str] | None) -> dict[str, bytes]:
    """The contents of the companions of a folder, by name: those whose SHA-256 a journal's header states; where it states none
    (None: an earlier release wrote it), all that are there.

    Raises ReplayError for a file that is missing, has another SHA-256, or lies, behind a link, outside the folder; OSError.
    """
    contents = {}
    for name in COMPANIONS if expected is None else expected:
        path = folder / name
        if not path.exists() and expected is None:
            continue
        if not path.exists():
            raise ReplayError(f"{str(folder)!r} lacks {name!r}, which the journal's run began with; take the same files")
        if expected is None and leads_out(path, folder):
            raise ReplayError(
                f"{str(path)!r} is a link out of its folder, and the journal has no SHA-256 of it; put the file in its place"
            )
        contents[name] = read_file(path, _MAX_BYTES)
        if expected is not None and hashlib.sha256(contents[name]).hexdigest() != expected[name]:
            raise ReplayError(f"{str(path)!r} is not what the journal's run began with (SHA-256 differs); take the same files")
    return contents


def without_code(name: str, content: bytes, where: Path, dtype: str | None = None) -> tuple[bytes, list[str]]:
    """A companion as it is written beside rebuilt weights, and the keys that were left out: those of ``CODE_KEYS``, at any
    depth of a configuration. ``dtype``: of the weights, to be stated in config.json.

    Raises ReplayError, naming ``where``, for a configuration that is not one JSON object.
    """
    if not name.endswith("config.json"):
        return content, []
    try:
        values = parse_json(content, nonfinite=True, repeated_keys=True)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except ValueError as e:
        raise ReplayError(f"{str(where)!r} is not a configuration, one JSON object: {e}") from e
    dropped: list[str] = []
    values = _without(values, dropped)
    if name == "config.json" and dtype is not None:
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    elif not dropped:
        return content, []
    return (json.dumps(values, indent=2) + "\n").encode(), sorted(set(dropped))


def _without(value: Any, dropped: list[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, dropped) for item in value]
    if not isinstance(value, dict):
        return value
    dropped += [key for key in CODE_KEYS if key in value]
    return {key: _without(item, dropped) for key, item in value.items() if key not in CODE_KEYS}
