"""Files that others have made: bounded reads, strict JSON, and values checked against the shape they must have.

A checksum tells accidents from the truth, not a stranger from its author: whoever makes a file can make its checksums right. So
each reader checks what it has read before it uses any of it.
"""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import printed, shown

MAX_DEPTH = 100
"""Lists and objects inside each other; what walks them uses Python's stack."""


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can hold, which half of a surrogate pair cannot, and without NUL."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


# --- files --------------------------------------------------------------------------------------------------------------------


def open_file(path: str | Path) -> tuple[int, int]:
    """A regular file, opened to be read: (file descriptor, size in bytes).

    Raises OSError; also for folders, pipes and devices, and for a name that no file can have.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait for its writer
    except ValueError as e:
        raise OSError(errno.EINVAL, f"no file has such a name: {e}", str(path)) from e
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if number == errno.EISDIR else "is not a regular file", str(path))
    return fd, status.st_size


def read_file(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit``. Raises OSError."""
    fd, size = open_file(path)
    with open(fd, "rb") as file:
        if size > limit:
            raise OSError(errno.EFBIG, f"has {size} bytes; such a file has at most {limit}", str(path))
        return file.read(limit)


def check_file_name(name: Any) -> str:
    """The name, if it is that of a file in its folder. Raises ValueError for all that may lead elsewhere."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or not name.isprintable()
        or set("/\\") & set(name)
        or len(name.encode()) > 255
    ):
        raise ValueError(f"{shown(name)} is not the plain name of a file")
    return name


# --- JSON ---------------------------------------------------------------------------------------------------------------------


def parse_json(data: bytes | str, *, nonfinite: bool = False, repeated_keys: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError, with a reason of one line.

    Refused beside what is no JSON: other encodings than UTF-8, nesting deeper than ``MAX_DEPTH``; without ``nonfinite`` NaN,
    Infinity and numbers that fp64 cannot hold; without ``repeated_keys`` a key that comes twice in an object.
    """
    hooks: dict[str, Any] = {} if nonfinite else {"parse_constant": _finite, "parse_float": _finite}
    hooks |= {} if repeated_keys else {"object_pairs_hook": _unique}
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, **hooks)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 ({e.reason} at byte {e.start})") from e
    except RecursionError as e:
        raise ValueError(f"lists or objects more than {MAX_DEPTH} deep") from e
    except MemoryError as e:
        raise ValueError("more than the memory holds") from e
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} comes twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)[1:-1]} is not finite")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for children in inner for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise RecursionError


def check_shape(schema: type[BaseModel], value: Any) -> None:
    """Compare a value out of JSON with a schema. Raises ValueError naming the first thing that differs, and its value."""
    try:
        schema.model_validate(value)
    except ValidationError as e:
        raise ValueError(_first_error(e)) from e


def check_alike(value: Any, like: Any) -> None:
    """Compare the kind of a value out of JSON with one of our own: a number, text, a list of such, an object; None goes with
    all. Raises ValueError."""
    kinds = (bool, (int, float), str, (list, tuple), dict)
    kind, ours = (next((k for k in kinds if isinstance(v, k)), None) for v in (value, like))
    if value is None or like is None:
        return
    if kind != ours:
        raise ValueError(f"{shown(value)} in the place of {shown(like)}")
    if isinstance(value, list) and like:
        for item in value:
            check_alike(item, like[0])


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{printed(part)}" for part in first["loc"]).removeprefix(".")
    reason = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if first["type"] == "missing":
        return f"{place} is missing"
    if not place or first["type"] == "value_error":
        return f"{place}: {reason}" if place else reason
    return f"{place} is {shown(first['input'])}: {reason[:1].lower()}{reason[1:]}"
