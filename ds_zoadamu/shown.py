"""Values as a message shows them, wherever they come from."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """A value as a message shows it: printable, on one line, and short."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a long {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def printed(value: Any) -> str:
    """A value as a report shows it: text without quotes where a terminal can print it; else as ``shown``."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 200 else shown(value)
