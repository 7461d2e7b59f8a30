"""What a report is made of, and how it reads as Markdown.

Texts and cells are lines of Markdown with `**strong**` and `code` alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A line that a user may copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells are shown as ``str`` shows them; the first of a row names it."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Series:
    """A line of a chart: (x, mean, least, greatest) of each point. ``style``: which colour and dash, the same in all charts."""

    name: str
    style: int
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Chart:
    """Drawn on the page alone. ``level``: a name and a value, for a line across."""

    title: str
    x: str
    series: Sequence[Series]
    level: tuple[str, float] | None = None


@dataclass(frozen=True)
class Charts:
    """Beside each other under a heading, with one legend."""

    title: str
    charts: Sequence[Chart]


Block = Heading | Text | Bullets | Code | Table | Charts


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; without the charts."""
    parts = [part for block in blocks if (part := _markdown(block))]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text):
            return f"    {text}"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return ""
