"""JSON as this package writes it: ASCII that is UTF-8 too, files whole or not at all, null for a number that is not finite.

JSON has no NaN and no infinity; Python would write names for them that only Python reads.
"""

import json
import math
from pathlib import Path
from typing import Any

from .safetensors_io import write_durably


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
