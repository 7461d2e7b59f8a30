"""Templates over the columns of a table: `{column}` stands for a text, `{{` and `}}` for braces."""

import string
from collections.abc import Mapping

from ds_zoadamu.errors import printed, shown
from ds_zoadamu.tasks.errors import InputError

MASK = "mask"
"""What templates for masked models call the mask."""


def names_of(where: str, template: str) -> tuple[str, ...]:
    """The names that a template reads, in order of first use.

    Raises:
        InputError: a malformed template, a name that is none, a format; `where` says whose template it is.
    """
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InputError(
            f"{where} {shown(template)} is malformed: {error}; a brace that is part of the text is written twice: {{{{ or }}}}"
        ) from error
    for name, spec, conversion in parts:
        if not name.isidentifier():
            raise InputError(
                f"{where} {shown(template)} has {{{printed(name)}}}, which is no column name; a brace that is part of the "
                "text is written twice, and a column with another name gets one in fields"
            )
        if spec or conversion:
            raise InputError(
                f"{where} {shown(template)} formats the column {shown(name)}; a column stands as it is: write "
                f"{{{printed(name)}}}"
            )
    return tuple(dict.fromkeys(name for name, _, _ in parts))


def tail_of(template: str) -> str:
    """The text behind the template's last column."""
    literal, name, *_ = list(string.Formatter().parse(template))[-1]
    return literal if name is None else ""


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its texts."""
    return template.format(**values)
