"""Charts as SVG that stands in a page: its colours are the page's, its text grows with it."""

import math
from collections.abc import Sequence
from html import escape

from ds_zoadamu.benchmark.blocks import Chart, Series

COLOURS = 6
"""The page has as many, ``--c0`` and on; further series have them again with another dash."""
_DASHES = ("", "7 3", "2 3")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 240, 52, 12, 10, 36


def stroke(style: int) -> str:
    """The attributes of a series' line."""
    dash = _DASHES[style // COLOURS % len(_DASHES)]
    return f'stroke="var(--c{style % COLOURS})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def svg(chart: Chart) -> str:
    """A chart with its axes, without title and legend. A series has at least one point."""
    values = [y for series in chart.series for point in series.points for y in point[1:]]
    values += [chart.level[1]] if chart.level else []
    x_ticks, y_ticks = _ticks([point[0] for series in chart.series for point in series.points]), _ticks(values)

    def x_at(x: float) -> float:
        return _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_HEIGHT - _TOP - _BOTTOM)

    def text(x: float, y: float, words: str, anchor: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title, quote=True)}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_at(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(text(_LEFT - 6, y_at(tick) + 4, f"{tick:.6g}", "end"))
    parts += [text(x_at(tick), _HEIGHT - _BOTTOM + 16, f"{tick:,.6g}", "middle") for tick in x_ticks]
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, chart.x, "middle"))
    if chart.level:
        name, value = chart.level
        line = f'<path class="level" d="M{_LEFT} {y_at(value):.1f}H{_WIDTH - _RIGHT}">'
        parts.append(f"{line}<title>{escape(name)}: {value:.4g}</title></path>")
    parts += [_line(series, x_at, y_at) for series in chart.series]
    return "".join([*parts, "</svg>"])


def _line(series: Series, x_at, y_at) -> str:
    at = [(x_at(x), *map(y_at, ys)) for x, *ys in series.points]
    line = " ".join(f"{x:.1f},{mean:.1f}" for x, mean, *_ in at)
    band = " ".join([*(f"{x:.1f},{high:.1f}" for x, _, _, high in at), *(f"{x:.1f},{low:.1f}" for x, _, low, _ in at[::-1])])
    colour = f"var(--c{series.style % COLOURS})"
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"><title>{escape(series.name)}: {mean:.4g} at {where:,.6g}'
        "</title></circle>"
        for (x, y, *_), (where, mean, *_) in zip(at, series.points, strict=True)
    )
    return f'<polygon points="{band}" fill="{colour}" opacity="0.12"/><polyline points="{line}" {stroke(series.style)}/>{dots}'


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers, the first and the last around the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
