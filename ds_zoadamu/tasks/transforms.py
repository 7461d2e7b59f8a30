"""What a task file may do to the text of a column: a fixed vocabulary, no code."""

from collections.abc import Callable, Sequence
from typing import Any

from ds_zoadamu.errors import shown
from ds_zoadamu.files.untrusted import is_text
from ds_zoadamu.tasks.errors import InputError


def _lower_first_word(text: str, unless: Sequence[str]) -> str:
    first, space, rest = text.partition(" ")
    return text if first in unless else first.lower() + space + rest


def _ensure_end(text: str, end: str) -> str:
    return text if text.endswith(end) else text + end


def _mapped(text: str, mapping: dict[str, str]) -> str:
    if text not in mapping:
        raise ValueError(f"is {shown(text)}; its map knows {', '.join(map(shown, mapping))}")
    return mapping[text]


def _part(text: str, mark: str, which: int) -> str:
    if mark not in text:
        raise ValueError(f"has no {shown(mark)}: {shown(text)}")
    return text.partition(mark)[which]


_PLAIN: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "drop_last": lambda text: text[:-1],
}
_WITH_VALUE: dict[str, Callable[[str, Any], str]] = {
    "lower_first_word_unless": _lower_first_word,
    "strip_end": str.removesuffix,
    "ensure_end": _ensure_end,
    "replace": lambda text, pair: text.replace(*pair),
    "map": _mapped,
    "before": lambda text, mark: _part(text, mark, 0),
    "after": lambda text, mark: _part(text, mark, 2),
}


def _is_fit(name: str, value: Any) -> bool:
    """Whether a value is of the kind that a transform takes."""
    if name in ("replace", "lower_first_word_unless"):
        fits = isinstance(value, (list, tuple)) and all(map(is_text, value))
        return fits and (name != "replace" or (len(value) == 2 and value[0] != ""))
    if name == "map":
        return isinstance(value, dict) and bool(value) and all(map(is_text, (*value, *value.values())))
    return is_text(value) and value != ""


def check_transform(where: str, transform: Any) -> None:
    """Raises InputError for what is no transform; `where` names the place."""
    if isinstance(transform, str) and transform in _PLAIN:
        return
    if isinstance(transform, dict) and len(transform) == 1:
        ((name, value),) = transform.items()
        if name in _WITH_VALUE:
            if _is_fit(name, value):
                return
            wanted = {
                "replace": "[old, new]",
                "map": '{"value": "text", ...}',
                "lower_first_word_unless": "a list of words",
            }.get(name, "a text")
            raise InputError(f"{where}: {name} takes {wanted}, got {shown(value)}")
    raise InputError(
        f'{where}: {shown(transform)} is no transform; known: {", ".join(_PLAIN)}, and with a value, {{"name": value}}: '
        f"{', '.join(_WITH_VALUE)}"
    )


def transformed(text: str, transforms: Sequence[Any]) -> str:
    """The text after each transform in turn.

    Raises:
        ValueError: a value that `map` does not know, a mark that `before` or `after` does not find; says what the text is.
    """
    for transform in transforms:
        if isinstance(transform, str):
            text = _PLAIN[transform](text)
        else:
            ((name, value),) = transform.items()
            text = _WITH_VALUE[name](text, value)
    return text
