"""Bytes a GPU over model size for each method: the paper's Figure 3."""

from ..errors import ConfigError
from .memory import GB
from .table import METHODS, build_models, need


def series(world_size: int, length: int) -> dict[str, list[tuple[float, float]]]:
    """Method -> (parameters / 1e9, GB a GPU without reserve) of every OPT, smallest first."""
    models = build_models().values()
    points = {method: [] for method in METHODS}
    for model in models:
        for method in METHODS:
            one = need(model, method, world_size, length)
            points[method].append((model.numel / 1e9, (one.states + one.forward) / GB))
    return points


def draw(path: str, world_size: int, capacity: int, length: int) -> None:
    """Write the figure to ``path``. Raises ConfigError without matplotlib, or where the file cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError('--plot needs matplotlib; install it with: pip install "ds_zoadamu[plots]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method, points in series(world_size, length).items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
    axes.axhline(capacity / GB, color="black", linestyle=":", label=f"{capacity / GB:g} GB")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="parameters, 10^9",
        ylabel=f"GB a GPU on {world_size} GPUs",
        title="OPT, ZeRO-3, forward or step",
    )
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
