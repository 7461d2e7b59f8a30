"""Six functions of two variables, and the paths of Adam, AdaMax, MeZO and ZO-AdaMU to their minima: the paper's Figure 2.

    python benchmarks/trajectories.py --output trajectories.png
    python benchmarks/trajectories.py --lr_decay linear --output linear.png --json linear.json

Every method takes the same number of steps from the same starts, an even (Sobol) cover of the function's square, once with
each lr of one grid. Its best lr for a function is the one with the least median distance to the minimum after the last step,
over seeds and starts; distances below 1e-6 count as equal, and then the smallest lr is taken. A step costs Adam and AdaMax one
(sub)gradient, MeZO and ZO-AdaMU two function values. No path is confined to the square. A step whose projected gradient is not
finite leaves the point where it is.

The directions of MeZO and ZO-AdaMU come from the library's own rules, in fp32; points, functions and projected gradients
are fp64, so what is seen is the method and not the rounding of theta +- zo_eps m. Each seed has its own noise, which all
functions and all lr share.

Functions a to d, Beale and Rosenbrock are those of Jiang et al., AAAI 2024, Figure 2; (1 - y) there is read as (1 - y)^2, for
without the square the minimum would not be at (1, 1). docs/trajectories.md has results.
"""

import argparse
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from ds_zoadamu.errors import ConfigError
from ds_zoadamu.files.json_files import write_json
from ds_zoadamu.rules import Elements, Evaluation, MeZO, Rule, Update, ZOAdaMU
from ds_zoadamu.rules.noise import parameter_key
from ds_zoadamu.training.output import processor_name

RESOLUTION = 1e-6  # distances below this are not told apart when an lr is chosen
REACHED = 0.1  # a run has reached the minimum if it ends nearer than this; the squares are 6 or 9 wide
NUM_PATHS = 2  # starts whose paths are drawn
START_SEED = 3  # the first two starts, whose paths are drawn, lie apart and not beside a minimum
NOISE_SEED, NOISE_NAME = 0, "theta"
DEFAULT_GRID = tuple(float(f"{10 ** (k / 4):.3g}") for k in range(-24, 5))  # four a decade, 1e-6 to 10
LR_DECAYS: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1.0 - (step - 1) / steps,
}


@dataclass(frozen=True)
class Function:
    """A function of (x, y), fp64 tensors of one shape, over the square of ``half_width`` around 0; ``minimum`` is (x, y)."""

    name: str
    formula: str
    value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    minimum: tuple[float, float]
    half_width: float


FUNCTIONS = (
    Function("a", "|x| + |y|", lambda x, y: x.abs() + y.abs(), (0.0, 0.0), 3.0),
    Function("b", "|x+y| + |x-y|/10", lambda x, y: (x + y).abs() + (x - y).abs() / 10, (0.0, 0.0), 3.0),
    Function("c", "(x+y)² + (x-y)²/10", lambda x, y: (x + y) ** 2 + (x - y) ** 2 / 10, (0.0, 0.0), 3.0),
    Function("d", "|x|/10 + |y|", lambda x, y: x.abs() / 10 + y.abs(), (0.0, 0.0), 3.0),
    Function(
        "Beale",
        "(1.5-x+xy)² + (2.25-x+xy²)² + (2.625-x+xy³)²",
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2,
        (3.0, 0.5),
        4.5,
    ),
    Function("Rosenbrock", "100(x-y²)² + (1-y)²", lambda x, y: 100 * (x - y**2) ** 2 + (1 - y) ** 2, (1.0, 1.0), 4.5),
)


@dataclass(frozen=True)
class Experiment:
    """What all methods share, and the options of ZO-AdaMU's schedule (its own defaults where none are given)."""

    steps: int
    seeds: int
    starts: int
    grid: tuple[float, ...]
    zo_eps: float
    lr_decay: str
    schedule: dict[str, float]

    def mezo(self) -> MeZO:
        """The library's MeZO with lr = zo_eps = 1, see ``directions``."""
        return MeZO(lr=1.0, zo_eps=1.0)

    def zo_adamu(self) -> ZOAdaMU:
        """The library's ZO-AdaMU, likewise. Raises ConfigError for a schedule that cannot be."""
        momentum = {"dtype": "fp32"}
        return ZOAdaMU(lr=1.0, zo_eps=1.0, total_steps=self.steps, momentum=momentum, **self.schedule)

    def lrs(self, step: int) -> torch.Tensor:
        """lr of every entry of the grid at ``step``: fp64, (lrs,)."""
        return torch.tensor(self.grid, dtype=torch.float64) * LR_DECAYS[self.lr_decay](step, self.steps)

    def points(self, copies: int) -> torch.Tensor:
        """All runs at their starts: fp64, (functions, lrs, copies * starts, 2); the starts of the first copy come first."""
        sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=START_SEED)
        square = sobol.draw(self.starts, dtype=torch.float64) * 2.0 - 1.0
        half_widths = torch.tensor([f.half_width for f in FUNCTIONS], dtype=torch.float64)
        starts = half_widths[:, None, None, None] * square.repeat(copies, 1)
        return starts.repeat(1, len(self.grid), 1, 1)


def evaluate(points: torch.Tensor) -> torch.Tensor:
    """Function i at the points [i]: (functions, ..., 2) to (functions, ...)."""
    return torch.stack([f.value(p[..., 0], p[..., 1]) for f, p in zip(FUNCTIONS, points, strict=True)])


def directions(rule: Rule, numel: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(perturbation, direction of the update) of steps 1, 2, ...: fp64, (numel / 2, 2).

    For ZO-AdaMU they are m_t and m_t / sqrt(v + sigma). Neither depends on the weights or the loss. So the rule's own
    perturbation of weight 0 by zo_eps = 1 is exactly the first of them, and its own update of weight 0 with lr = 1 and
    projected gradient -1 the second.
    """
    elements = Elements(NOISE_NAME, (numel,), (parameter_key(NOISE_SEED, NOISE_NAME),), 0, numel)
    state = rule.new_state(numel, torch.float32, torch.device("cpu"))
    for step in itertools.count(1):
        direction = rule.direction(step)
        perturbation, update = torch.zeros(numel), torch.zeros(numel)
        rule.perturb_(perturbation, perturbation, state, elements, direction, Evaluation(0, 1.0))
        rule.update_(update, state, elements, Update(step, direction, lr=1.0, weight_decay=0.0, projected_grads=(-1.0,)))
        yield perturbation.double().view(-1, 2), update.double().view(-1, 2)


def zeroth_order_path(experiment: Experiment, rule: Rule) -> Iterator[torch.Tensor]:
    """The points of every run after steps 1, 2, ..., T, shaped as ``Experiment.points``."""
    points, zo_eps = experiment.points(experiment.seeds), experiment.zo_eps
    num_lrs = len(experiment.grid)
    pairs = directions(rule, 2 * experiment.seeds * experiment.starts)
    for step, (perturbation, update) in zip(range(1, experiment.steps + 1), pairs, strict=False):
        both = torch.cat((points + zo_eps * perturbation, points - zo_eps * perturbation), dim=1)
        loss_plus, loss_minus = evaluate(both).split(num_lrs, dim=1)
        projected_grad = (loss_plus - loss_minus) / (2 * zo_eps)
        projected_grad = torch.where(projected_grad.isfinite(), projected_grad, 0.0)
        points = points - (experiment.lrs(step)[:, None] * projected_grad)[..., None] * update
        yield points


def gradient_path(experiment: Experiment, optimizer_class: type[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    """The same of one of torch's optimizers, which need no noise: one run a start."""
    params = [torch.nn.Parameter(points.clone()) for points in experiment.points(1).unbind(1)]
    optimizer = optimizer_class([{"params": [param], "lr": lr} for param, lr in zip(params, experiment.grid, strict=True)])
    for step in range(1, experiment.steps + 1):
        for group, lr in zip(optimizer.param_groups, experiment.lrs(step).tolist(), strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        evaluate(torch.stack(params, 1)).sum().backward()  # runs do not meet: each gets its own gradient
        optimizer.step()
        yield torch.stack([param.detach() for param in params], 1)


METHODS: dict[str, Callable[[Experiment], Iterator[torch.Tensor]]] = {
    "Adam": lambda experiment: gradient_path(experiment, torch.optim.Adam),
    "AdaMax": lambda experiment: gradient_path(experiment, torch.optim.Adamax),
    "MeZO": lambda experiment: zeroth_order_path(experiment, experiment.mezo()),
    "ZO-AdaMU": lambda experiment: zeroth_order_path(experiment, experiment.zo_adamu()),
}
LINES = {  # Adam and AdaMax often take the same way: dashes over a broader line show both
    "Adam": {"color": "#0072B2", "linewidth": 2.2},
    "AdaMax": {"color": "#F08FC4", "linewidth": 1.5, "linestyle": (0, (3, 2))},
    "MeZO": {"color": "#009E73", "linewidth": 1.2},
    "ZO-AdaMU": {"color": "#D55E00", "linewidth": 1.2},
}


@dataclass(frozen=True)
class Result:
    """One method on one function with its best lr. Distances and values after the last step, over seeds and starts.

    at_edge: the best lr is the first or last of the grid. reached: share of the runs. starts_reached: share of the starts from
    which some lr of the grid, another for each start, brings the median seed to the minimum. medians: of the distance, for
    every lr of the grid. path: fp64, (steps + 1, NUM_PATHS or fewer starts, 2), of the first seed.
    """

    function: str
    method: str
    lr: float
    at_edge: bool
    median: float
    p10: float
    p90: float
    reached: float
    starts_reached: float
    value: float
    medians: tuple[float, ...]
    path: torch.Tensor


def quantiles(values: torch.Tensor, levels: Sequence[float]) -> torch.Tensor:
    """(..., runs) to (len(levels), ...), each one of the values, so that infinite ones do no harm; NaN counts as infinite."""
    ranked = values.nan_to_num(nan=math.inf, posinf=math.inf).sort(-1).values
    return torch.stack([ranked[..., round(level * (ranked.shape[-1] - 1))] for level in levels])


def summarize(experiment: Experiment, method: str, points: torch.Tensor, path: torch.Tensor) -> list[Result]:
    """Results of every function out of the last ``points`` and the ``path`` (steps + 1, functions, lrs, starts, 2)."""
    minima = torch.tensor([f.minimum for f in FUNCTIONS], dtype=torch.float64)
    distances = (points - minima[:, None, None]).norm(dim=-1)
    p10, median, p90 = quantiles(distances, (0.1, 0.5, 0.9))
    values = quantiles(evaluate(points), (0.5,))[0]
    by_seed = distances.unflatten(2, (-1, experiment.starts)).transpose(2, 3)
    from_starts = quantiles(by_seed, (0.5,))[0].amin(1) < REACHED
    results = []
    for i, function in enumerate(FUNCTIONS):
        medians = median[i].clamp(min=RESOLUTION).tolist()
        best = medians.index(min(medians))
        figures = {"median": median, "p10": p10, "p90": p90, "value": values}
        results.append(
            Result(
                function=function.name,
                method=method,
                lr=experiment.grid[best],
                at_edge=best in (0, len(experiment.grid) - 1),
                reached=float((distances[i, best] < REACHED).double().mean()),
                starts_reached=float(from_starts[i].double().mean()),
                medians=tuple(median[i].tolist()),
                path=path[:, i, best],
                **{name: float(figure[i, best]) for name, figure in figures.items()},
            )
        )
    return results


def run(experiment: Experiment) -> list[Result]:
    """All methods on all functions: one result each, functions within methods."""
    results = []
    for method, steps in METHODS.items():
        path = [experiment.points(1)[..., :NUM_PATHS, :]]
        for points in steps(experiment):
            path.append(points[..., : path[0].shape[-2], :].clone())
        results += summarize(experiment, method, points, torch.stack(path))
    return results


def table(results: Iterable[Result]) -> str:
    """Markdown, one line a function and method."""
    lines = [
        f"| function | method | best lr | median distance (p10 - p90) | median value | runs within {REACHED:g} "
        "| starts, each with its own lr |",
        "|---|---|---|---|---|---|---|",
    ]
    order = [f.name for f in FUNCTIONS]
    for r in sorted(results, key=lambda r: order.index(r.function)):
        edge = " (edge)" if r.at_edge else ""
        lines.append(
            f"| {r.function} | {r.method} | {r.lr:.3g}{edge} | {r.median:.2g} ({r.p10:.2g} - {r.p90:.2g}) "
            f"| {r.value:.2g} | {r.reached:.0%} | {r.starts_reached:.0%} |"
        )
    return "\n".join(lines)


def figures_of(result: Result) -> dict[str, object]:
    """A result without its path; infinite figures as None, since JSON has no word for them."""

    def finite(figure: object) -> object:
        return None if isinstance(figure, float) and not math.isfinite(figure) else figure

    figures = {key: finite(figure) for key, figure in vars(result).items() if key != "path"}
    return figures | {"medians": [finite(median) for median in result.medians]}


def verdict(results: Sequence[Result]) -> str:
    """The paper's claim against the count of functions whose minimum the median run reaches."""
    counts = {method: sum(r.median < REACHED for r in results if r.method == method) for method in METHODS}
    holds = counts["ZO-AdaMU"] == len(FUNCTIONS) and counts["MeZO"] == 0
    reached = ", ".join(f"{method} {count}" for method, count in counts.items())
    return (
        f"Minima that the median run reaches (within {REACHED:g}), of {len(FUNCTIONS)}: {reached}.\n"
        f"The paper's claim (ZO-AdaMU reaches all, MeZO none) {'holds' if holds else 'does not hold'} here."
    )


def load_matplotlib() -> tuple[type, type]:
    """(Figure, FigureCanvasAgg). Raises ConfigError where Matplotlib, which brings Pillow along, is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError('the picture needs Matplotlib; install it with: pip install "ds_zoadamu[plots]"') from error
    return Figure, FigureCanvasAgg


def draw(results: Sequence[Result], output: Path, title: str) -> None:
    """Writes the six panels to ``output``, a PNG file."""
    figure_class, canvas_class = load_matplotlib()
    from PIL import Image

    figure = figure_class(figsize=(13.5, 9.4), dpi=100, layout="constrained")
    canvas = canvas_class(figure)
    for axes, function in zip(figure.subplots(2, 3).flat, FUNCTIONS, strict=True):
        draw_contours(axes, function)
        shown = [result for result in results if result.function == function.name]
        for result in shown:
            draw_paths(axes, result)
        axes.plot(*shown[0].path[0].T, "o", color="black", markersize=6, markerfacecolor="white", zorder=6, label="start")
        axes.plot(*function.minimum, "*", color="black", markersize=14, markerfacecolor="gold", zorder=7, label="minimum")
        axes.set_title(f"{function.name}:  {function.formula}", fontsize=10)
        limits = (-function.half_width, function.half_width)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="x", ylabel="y")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11)
    figure.suptitle(title, fontsize=12)
    canvas.draw()
    # A palette makes the file less than half the size.
    Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256).save(output, optimize=True)


def draw_contours(axes, function: Function) -> None:
    """Grey lines at equal ratios of the function's values, over four decades."""
    line = torch.linspace(-function.half_width, function.half_width, 301, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    values = function.value(x, y)
    highest = float(values.max())
    levels = torch.logspace(math.log10(highest) - 4, math.log10(highest), 25).tolist()
    axes.contour(x, y, values, levels=levels, colors="0.8", linewidths=0.7, zorder=1)


def draw_paths(axes, result: Result) -> None:
    """A line from every drawn start, with a dot at its end."""
    style = LINES[result.method]
    for path, label in itertools.zip_longest(result.path.unbind(1), [result.method]):
        axes.plot(*path.T, **style, zorder=3, label=label)
        axes.plot(*path[-1], "o", color=style["color"], markersize=5, zorder=5)


def check_writable(option: str, path: Path) -> None:
    """Raises ConfigError unless a file can be written at ``path``; leaves none behind."""
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from error
    if not existed:
        path.unlink()


def check(args: argparse.Namespace) -> Experiment:
    """The experiment that the arguments ask for. Raises ConfigError for values that cannot work."""
    for name in ("steps", "seeds", "starts"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not args.grid:
        raise ConfigError("--grid is empty; give at least one lr, for example --grid 1e-3 1e-2")
    for lr in args.grid:
        if not 0.0 < lr < math.inf:
            raise ConfigError(f"--grid holds {lr!r}; every lr must be a finite number above 0")
    if not 0.0 < args.zo_eps < math.inf:
        raise ConfigError(f"--zo_eps is {args.zo_eps!r}; it must be a finite number above 0")
    if args.output.suffix.lower() != ".png":
        raise ConfigError(f"--output is {str(args.output)!r}; its name must end in .png")
    schedule = {key: getattr(args, key) for key in ("t1", "t2", "t3", "constant_beta1") if getattr(args, key) is not None}
    grid = tuple(sorted(set(args.grid)))
    experiment = Experiment(args.steps, args.seeds, args.starts, grid, args.zo_eps, args.lr_decay, schedule)
    experiment.zo_adamu()  # refuses what the library refuses, by name
    load_matplotlib()
    check_writable("--output", args.output)
    if args.json:
        check_writable("--json", args.json)
    return experiment


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of every method (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=16, help="of the noise, for each start (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=16, help="points of departure a function (default: %(default)s)")
    parser.add_argument(
        "--grid",
        type=float,
        nargs="*",
        default=DEFAULT_GRID,
        metavar="LR",
        help="of all methods (default: 1e-6 to 10, four a decade)",
    )
    parser.add_argument("--zo_eps", type=float, default=1e-3, help="size of the perturbation (default: %(default)s)")
    parser.add_argument("--lr_decay", choices=LR_DECAYS, default="constant", help="of all methods (default: %(default)s)")
    parser.add_argument("--constant_beta1", type=float, metavar="BETA1", help="instead of ZO-AdaMU's annealed beta1")
    for name, meaning in (("t1", "end of the warm-up"), ("t2", "start of the plateau"), ("t3", "period")):
        parser.add_argument(
            f"--{name}", type=int, metavar="STEP", help=f"ZO-AdaMU's schedule: {meaning} (default: the library's)"
        )
    parser.add_argument(
        "--output", type=Path, default=Path("trajectories.png"), metavar="FILE.png", help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def main() -> None:
    args = parser().parse_args()
    try:
        experiment = check(args)
    except ConfigError as error:
        raise SystemExit(f"trajectories.py: {error}") from error
    began = time.perf_counter()
    results = run(experiment)
    seconds = time.perf_counter() - began
    schedule = experiment.zo_adamu().schedule
    head = {
        "hardware": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "seconds": round(seconds, 1),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    print(
        f"{experiment.steps} steps of every method ({experiment.steps} gradients, or {2 * experiment.steps} function values), "
        f"{experiment.starts} starts x {experiment.seeds} seeds (Adam, AdaMax: no seeds),\n"
        f"lr {experiment.lr_decay}, best of {len(experiment.grid)} from {experiment.grid[0]:g} to {experiment.grid[-1]:g}, "
        f"zo_eps {experiment.zo_eps:g}, T1 {schedule.t1}, T2 {schedule.t2}, T3 {schedule.t3}"
        f"{'' if schedule.constant_beta1 is None else f', beta1 {schedule.constant_beta1:g}'}\n"
    )
    print(table(results))
    print(f"\n{verdict(results)}")
    draw(
        results,
        args.output,
        f"{experiment.steps} steps, lr {experiment.lr_decay}, each method with its best lr; ring: start, dot: end",
    )
    if args.json:
        report = {**head, **asdict(experiment), "rows": [figures_of(result) for result in results]}
        write_json(args.json, report)


if __name__ == "__main__":
    main()
