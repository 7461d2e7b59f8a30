"""The report's pictures: how the contenders learn, and what a step of theirs costs."""

from pathlib import Path

from ds_zoadamu.benchmark.report import AXES, PARTS
from ds_zoadamu.tasks import Metric
from ds_zoadamu.training.curves import write_figure

_MARKERS = "os^Dv*Pp<>"
_BYTES = (("weights_bytes", "weights"), ("optimizer_bytes", "optimizer state"), ("gradients_bytes", "gradients"))


def draw_curves(results: dict, path: Path, metric: Metric) -> bool:
    """Development loss and metric against steps, forward passes and seconds: means over seeds, and bands from the least to
    the greatest. Returns False where Matplotlib is not installed.
    """

    def draw(figure) -> None:
        axes = figure.subplots(2, 3, sharey="row")
        for row, key in zip(axes, ("loss", metric.name), strict=True):
            for axis, (x, label) in zip(row, AXES, strict=True):
                for index, (name, entry) in enumerate(results["contenders"].items()):
                    points = entry.get("runs", {}).get("curves", {}).get(key, [])
                    if not points:
                        continue
                    at, style = [point[x] for point in points], {"color": f"C{index}"}
                    marker = _MARKERS[index % len(_MARKERS)]
                    axis.plot(at, [p["mean"] for p in points], label=name, marker=marker, markersize=4, linewidth=1.2, **style)
                    axis.fill_between(
                        at, [p["min"] for p in points], [p["max"] for p in points], alpha=0.12, linewidth=0, **style
                    )
                axis.set(xlabel=label)
                axis.grid(alpha=0.3)
            row[0].set(ylabel=f"development {key}")
        for axis in axes[1] if (baseline := metric.baseline) else ():
            axis.axhline(results["settings"][baseline.name]["dev"], linestyle="--", color="0.5", label=baseline.title)
        handles, labels = axes[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)

    return write_figure(path, (13, 8), draw)


def draw_cost(results: dict, path: Path) -> bool:
    """Bytes of a rank with its peak, and a step by its parts, one bar a contender. Returns False where Matplotlib is not
    installed.
    """
    entries = {name: entry["cost"] for name, entry in results["contenders"].items() if "cost" in entry}
    names = list(entries)[::-1]

    def draw(figure) -> None:
        memory, time = figure.subplots(1, 2, sharey=True)
        left = [0.0] * len(names)
        for index, (key, label) in enumerate(_BYTES):
            widths = [entries[name][key] / 1e6 for name in names]
            memory.barh(names, widths, left=left, label=label, color=f"C{index}", height=0.6)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        peaks = [entries[name]["peak_bytes"] / 1e6 for name in names]
        memory.plot(peaks, names, "k|", markersize=16, markeredgewidth=2, label="peak of the process")
        memory.set(title="memory of the rank that has most", xlabel="MB")
        left = [0.0] * len(names)
        for index, part in enumerate(PARTS):
            widths = [1e3 * entries[name]["split_seconds"].get(part, 0.0) for name in names]
            if any(widths):
                time.barh(names, widths, left=left, label=part, color=f"C{index}", height=0.6)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        time.set(title="a step by its parts", xlabel="milliseconds")
        for axis in (memory, time):
            axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)

    return bool(names) and write_figure(path, (13, 1.8 + 0.42 * len(names)), draw)
