"""JSON as this package writes it: ASCII that is UTF-8 too, files whole or not at all, null for a number that is not finite.

JSON has no NaN and no infinity; Python would write names for them that only Python reads.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .safetensors_io import write_durably
from .untrusted import parse_json


def read_json(path: str | Path, what: str, remedy: str = "") -> Any:
    """The value in a JSON file of a user. Raises ConfigError, which begins with ``what``, where it cannot be read or parsed."""
    try:
        return parse_json(Path(path).read_bytes(), nonfinite=True, repeated_keys=True)
    except OSError as e:
        raise ConfigError(f"{what} cannot be read: {e.strerror}{remedy}") from e
    except ValueError as e:
        raise ConfigError(f"{what} is not valid JSON: {e}") from e


def dumps(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null in the place of NaN and the infinities."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file durably, whole or not at all. Raises OSError."""
    write_durably(path, (dumps(value, indent=2) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
