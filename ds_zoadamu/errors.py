"""The errors a user can meet. Each message names the thing, its value, the bound and the remedy; and how values are shown."""

import difflib
import reprlib
from collections.abc import Iterable
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


class ConfigError(ValueError):
    """A setting that cannot work; raised before the model is touched."""


class NonFiniteLossError(FloatingPointError):
    """Too many steps in a row had a loss that is NaN or infinite."""


class NonFiniteWeightsError(NonFiniteLossError):
    """The loss of a run's first step is NaN or infinite because the weights it starts from are; raised before the step."""


class JournalError(ValueError):
    """A journal that cannot be written, read or trusted; names the file and, where there is one, the line."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved, found or trusted; raised before anything in memory is changed."""


class HalfLoadedError(CheckpointError):
    """A checkpoint that was found damaged when some of it was in the engine already; another one may still be loaded."""


class ReplayError(ValueError):
    """A base model and a journal from which no model can be rebuilt."""


class HubError(RuntimeError):
    """What the hub refused, or why it cannot be reached; what was to be sent is on the disk."""


class RankError(RuntimeError):
    """Another rank has failed, has ended or does something else; names it and why."""


def nearest(key: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known word that a misspelt one may stand for."""
    return next(iter(difflib.get_close_matches(key, list(known), n=1, cutoff=cutoff)), None)


def unknown_keys_message(where: str, unknown: Iterable[str], known: Iterable[str]) -> str:
    """One sentence for keys that nobody reads, each with the nearest known one."""
    known = sorted(known)
    parts, unknown = [], sorted(map(str, unknown))
    for key in unknown[:8]:
        near = nearest(key, known)
        parts.append(shown(key) + (f" (did you mean {near!r}?)" if near else ""))
    more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
    return f"{where}: unknown {', '.join(parts)}{more}; known: {', '.join(known)}"
