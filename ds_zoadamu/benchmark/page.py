"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

import re
from collections.abc import Sequence
from html import escape

from ds_zoadamu.benchmark.blocks import Block, Bullets, Chart, Charts, Code, Heading, Table, Text
from ds_zoadamu.benchmark.charts import stroke, svg

_LIGHT = {
    "page": "#fcfcfa", "text": "#1c1f23", "soft": "#5c636b", "line": "#d9dcdf", "band": "#f1f2f0", "c0": "#1f6fb4",
    "c1": "#c2571a", "c2": "#2c8a57", "c3": "#8a4fb0", "c4": "#a37a00", "c5": "#c13a63",
}  # fmt: skip
_DARK = {
    "page": "#16191c", "text": "#e6e8ea", "soft": "#a0a8b0", "line": "#363c42", "band": "#1f2428", "c0": "#6fb4ee",
    "c1": "#f0935a", "c2": "#69c793", "c3": "#c79be6", "c4": "#dcb84a", "c5": "#f2849f",
}  # fmt: skip
_STYLE = """
:root{color-scheme:light dark;%s}
@media (prefers-color-scheme:dark){:root{%s}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem clamp(.9rem,3vw,2.5rem) 4rem;background:var(--page);color:var(--text);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:1rem 0}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p,ul{max-width:46rem;margin:.6rem 0}
ul{padding-left:1.2rem}
li,td,p{overflow-wrap:anywhere}
.wide{overflow-x:auto;width:fit-content;max-width:100%%;border:1px solid var(--line);border-radius:.4rem;margin:.8rem 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .7rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{background:var(--band);font-weight:600;color:var(--soft);vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}
th:first-child{position:sticky;left:0;background:var(--page);border-right:1px solid var(--line);font-weight:600;
min-width:min(7.5rem,36vw)}
thead th:first-child{background:var(--band)}
.n{text-align:right;white-space:nowrap}
td:not(.n){min-width:7rem}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{background:var(--band);border:1px solid var(--line);border-radius:.4rem;padding:.7rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%%,20rem),1fr));gap:1.2rem}
figure{margin:0}
figcaption{font-size:.9rem;font-weight:600;margin-bottom:.2rem}
svg{display:block;width:100%%;height:auto;fill:none}
svg text{fill:var(--soft);font-size:11px}
polyline{stroke-width:1.8}
.grid{stroke:var(--line)}
.level{stroke:var(--soft);stroke-dasharray:4 4}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;padding:0;margin:.8rem 0;list-style:none;font-size:.875rem;max-width:none}
.legend svg{display:inline-block;width:2rem;height:.7rem;vertical-align:baseline;margin-right:.4rem}
"""
_NUMBER = re.compile(r"[-+\d.,±()%/ e:]*")


def page(blocks: Sequence[Block]) -> str:
    """The blocks as a page, which is called by its first heading."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    style = _STYLE % tuple("".join(f"--{name}:{value};" for name, value in theme.items()) for theme in (_LIGHT, _DARK))
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(map(_html, blocks)) + "\n</body>\n</html>\n"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Table(header, rows):
            return _table(header, rows)
        case Charts(title, charts):
            drawn = [chart for chart in charts if chart.series]
            figures = f'<div class="charts">{"".join(map(_figure, drawn))}</div>'
            return f"<h2>{_inline(title)}</h2>{_legend(drawn)}{figures}" if drawn else ""


def _inline(text: str) -> str:
    strong = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", strong)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    columns = [[str(row[index]) for row in rows] for index in range(len(header))]
    numeric = [any(cell and _NUMBER.fullmatch(cell) for cell in column) for column in columns]

    def cells(row: Sequence[object], tag: str) -> str:
        words = []
        for index, cell in enumerate(map(str, row)):
            kind, right = "th" if index == 0 else tag, index > 0 and numeric[index] and (tag == "th" or _NUMBER.fullmatch(cell))
            words.append(f"<{kind}{' class=n' if right else ''}>{_inline(cell)}</{kind}>")
        return f"<tr>{''.join(words)}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    # Reached by the keyboard, too, where it is wider than the screen.
    return f'<div class="wide" tabindex="0"><table><thead>{cells(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def _figure(chart: Chart) -> str:
    return f"<figure><figcaption>{_inline(chart.title)}</figcaption>{svg(chart)}</figure>"


def _legend(charts: Sequence[Chart]) -> str:
    names = {series.style: series.name for chart in charts for series in chart.series}
    lines = [(name, f'<polyline points="0,6 32,6" {stroke(style)}/>') for style, name in sorted(names.items())]
    levels = {chart.level[0] for chart in charts if chart.level}
    lines += [(name, '<path class="level" d="M0 6H32"/>') for name in sorted(levels)]
    items = (f'<li><svg viewBox="0 0 32 12" aria-hidden="true">{line}</svg>{escape(name)}</li>' for name, line in lines)
    return f'<ul class="legend">{"".join(items)}</ul>'
