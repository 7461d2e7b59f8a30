"""trajectories.py: the functions, one path of each zeroth-order method against NumPy, the choice of lr, bad input."""

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ds_zoadamu.errors import ConfigError
from ds_zoadamu.rules.noise import parameter_key
from tests.helpers.reference_numpy import Hyper64, direction64, noise64, zo_adamu_step64

STEPS, SEEDS, STARTS, LRS, ZO_EPS = 12, 2, 3, (1e-6, 3e-6), 1e-3  # 12 steps: warm-up, annealing from 2 on, plateau from 8 on


@pytest.fixture(scope="module")
def trajectories():
    path = Path(__file__).parents[2] / "benchmarks" / "trajectories.py"
    spec = importlib.util.spec_from_file_location("trajectories", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def experiment(trajectories):
    return trajectories.Experiment(STEPS, SEEDS, STARTS, LRS, ZO_EPS, "linear", {})


def values64(x, y):
    """The six functions in NumPy, written from the paper's Figure 2."""
    return np.stack(
        [
            np.abs(x[0]) + np.abs(y[0]),
            np.abs(x[1] + y[1]) + 0.1 * np.abs(x[1] - y[1]),
            np.square(x[2] + y[2]) + 0.1 * np.square(x[2] - y[2]),
            0.1 * np.abs(x[3]) + np.abs(y[3]),
            sum(np.square(c - x[4] * (1 - y[4] ** k)) for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))),
            100 * np.square(x[5] - np.square(y[5])) + np.square(1 - y[5]),
        ]
    )


def test_the_minimum_is_zero_and_the_only_one_of_a_lattice(trajectories):
    """A lattice of step 1/2 holds every minimum. Both sides are exact in fp64 where the value is 0."""
    for f in trajectories.FUNCTIONS:
        line = torch.arange(-2 * f.half_width, 2 * f.half_width + 1, dtype=torch.float64) / 2
        x, y = torch.meshgrid(line, line, indexing="ij")
        values = f.value(x, y)
        (at,) = (values == 0).nonzero().tolist()
        assert (line[at[0]].item(), line[at[1]].item()) == f.minimum
        assert (values >= 0).all()


def test_values_and_gradients(trajectories, experiment):
    """Against NumPy, and against central differences of NumPy: their error is some 1e-16 * |f| / h + h^2 f''' / 6."""
    points = experiment.points(1).requires_grad_()
    values = trajectories.evaluate(points)
    x, y = points.detach().numpy().transpose(3, 0, 1, 2)
    np.testing.assert_allclose(values.detach(), values64(x, y), rtol=1e-14)  # a few roundings, no cancellation below 1e-2
    (gradient,) = torch.autograd.grad(values.sum(), points)
    h = 1e-5
    differences = [values64(x + h, y) - values64(x - h, y), values64(x, y + h) - values64(x, y - h)]
    expected = np.stack(differences, -1) / (2 * h)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-10 * values.max().item())


def projected_grad64(theta, direction):
    """theta: (functions, lrs, 2 * runs), x and y in turn; direction: (2 * runs,). Returns (functions, lrs, 2 * runs)."""
    plus, minus = theta + ZO_EPS * direction, theta - ZO_EPS * direction
    difference = values64(plus[..., 0::2], plus[..., 1::2]) - values64(minus[..., 0::2], minus[..., 1::2])
    return np.repeat(difference / (2 * ZO_EPS), 2, axis=-1)


def zo_adamu64(theta, experiment):
    """Points after each step. lr is folded into g, for it differs between runs."""
    key, momentum = parameter_key(0, "theta"), np.zeros(theta.shape[-1])
    hyper = Hyper64(t1=2, t2=8, t3=12, lr=1.0)
    for t in range(1, STEPS + 1):
        direction, _ = direction64(momentum, t, *hyper.scalars(t), key)
        lr = np.array(experiment.grid)[:, None] * (1 - (t - 1) / STEPS)
        theta, momentum = zo_adamu_step64(theta, momentum, lr * projected_grad64(theta, direction), t, hyper, key)
        yield theta


def mezo64(theta, experiment):
    for t in range(1, STEPS + 1):
        xi1, _ = noise64(parameter_key(0, "theta"), t, 0, theta.shape[-1])
        lr = np.array(experiment.grid)[:, None] * (1 - (t - 1) / STEPS)
        theta = theta - lr * projected_grad64(theta, xi1) * xi1
        yield theta


@pytest.mark.parametrize(("method", "path64"), [("MeZO", mezo64), ("ZO-AdaMU", zo_adamu64)])
def test_zeroth_order_paths_are_those_of_numpy(trajectories, experiment, method, path64):
    """Through warm-up, annealing and plateau. The library's directions are fp32: 6e-8 an operation, at most some 20 of them
    in a row, and 1e-7 of a perturbation moves a projected gradient by 1e-7 of itself; hence 1e-5 of the way gone.
    """
    start = experiment.points(SEEDS)
    flat = start.numpy().reshape(len(trajectories.FUNCTIONS), len(LRS), -1)
    paths = itertools.zip_longest(trajectories.METHODS[method](experiment), path64(flat, experiment))
    for points, expected in paths:
        way = expected - flat
        error = (points - start).numpy().reshape(flat.shape) - way
        assert (np.abs(error).max(-1) <= 1e-5 * np.abs(way).max(-1)).all()
        assert (np.abs(way).max(-1) > 0).all()


def test_all_methods_start_alike_and_lr_falls_to_every_method(trajectories, experiment):
    """Adam's and AdaMax's first step is lr * sign(gradient) up to their eps of 1e-8, which no gradient here comes near."""
    start = experiment.points(1)
    assert torch.equal(experiment.points(SEEDS), torch.cat([start] * SEEDS, 2))
    gradient_start = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(trajectories.evaluate(gradient_start).sum(), gradient_start)
    for method in ("Adam", "AdaMax"):
        first, *_, last_but_one, last = trajectories.METHODS[method](experiment)
        torch.testing.assert_close(first - start, -experiment.lrs(1)[:, None, None] * gradient.sign(), rtol=1e-6, atol=1e-12)
        # With momentum and hardly a change of gradient the last step is as large as its lr.
        way = (last - last_but_one).abs()[0]
        torch.testing.assert_close(way, experiment.lrs(STEPS)[:, None, None].expand_as(way), rtol=1e-6, atol=1e-12)


def test_a_step_without_a_finite_gradient_leaves_the_point(trajectories):
    """lr 1e300 throws every run out of fp64's range in a step or two; from there it stays, as the engine skips such steps."""
    experiment = trajectories.Experiment(4, 1, 2, (1e300,), ZO_EPS, "constant", {})
    *_, last_but_one, last = trajectories.METHODS["ZO-AdaMU"](experiment)
    assert torch.equal(last[4:], last_but_one[4:])
    assert not trajectories.evaluate(last)[4:].isfinite().any()


def test_the_best_lr_has_the_least_median_and_ties_go_to_the_smallest(trajectories):
    experiment = trajectories.Experiment(1, 1, 3, (0.1, 0.2, 0.3, 0.4), ZO_EPS, "constant", {})
    minima = torch.tensor([f.minimum for f in trajectories.FUNCTIONS], dtype=torch.float64)[:, None, None]
    points = minima.repeat(1, 4, 3, 1)
    #                     distances of the three starts by lr; the medians are 0.5, 2e-7, 1e-7, infinite
    points[..., 0] += torch.tensor([[0.05, 0.5, 3.0], [1e-7, 2e-7, 9.0], [0.0, 1e-7, 9.0], [math.nan, math.inf, 7.0]])
    for result in trajectories.summarize(experiment, "MeZO", points, points[None]):
        assert (result.lr, result.at_edge) == (0.2, False)  # 2e-7 and 1e-7 are both "at the minimum"
        assert [round(m, 9) for m in result.medians] == [0.5, 2e-7, 1e-7, math.inf]
        assert (result.p10, result.p90) == pytest.approx((1e-7, 9.0), rel=1e-6)  # of a difference of numbers near 3
        assert (result.reached, result.starts_reached) == pytest.approx((2 / 3, 2 / 3))


def run_main(trajectories, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["trajectories.py", *map(str, arguments)])
    trajectories.main()


def test_the_script_writes_a_picture_a_table_and_figures(trajectories, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs the extra plots")
    picture, figures = tmp_path / "paths.png", tmp_path / "figures.json"
    arguments = ["--steps", 6, "--seeds", 2, "--starts", 1, "--grid", 1e-4, 1e-3, 1e9, "--output", picture, "--json", figures]
    run_main(trajectories, monkeypatch, *arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    report, out = json.loads(figures.read_text()), capsys.readouterr().out
    pairs = [(f.name, method) for method in trajectories.METHODS for f in trajectories.FUNCTIONS]
    assert [(row["function"], row["method"]) for row in report["rows"]] == pairs
    assert all(f"| {function} | {method} |" in out for function, method in pairs)
    assert "6 gradients, or 12 function values" in out
    assert "does not hold" in out  # after 6 steps nothing has arrived


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--seeds", "-1"], "--seeds is -1; it must be at least 1"),
        (["--starts", "0"], "--starts is 0; it must be at least 1"),
        (["--grid"], "--grid is empty; give at least one lr"),
        (["--grid", "1e-3", "0"], "--grid holds 0.0; every lr must be a finite number above 0"),
        (["--grid", "nan"], "--grid holds nan"),
        (["--zo_eps", "0"], "--zo_eps is 0.0; it must be a finite number above 0"),
        (["--t1", "9", "--t2", "5"], "t1, t2, t3 are 9, 5, 2000; they must satisfy"),
        (["--constant_beta1", "2"], "constant_beta1 is 2.0; it must be finite"),
        (["--output", "picture.jpg"], "--output is 'picture.jpg'; its name must end in .png"),
        (["--output", "no_folder/a.png"], "no_folder/a.png cannot be written: No such file or directory"),
        (["--json", "."], "--json . cannot be written: Is a directory"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(trajectories, monkeypatch, tmp_path, arguments, message):
    pytest.importorskip("matplotlib", reason="the picture needs the extra plots")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trajectories, "METHODS", None)
    with pytest.raises(SystemExit) as error:
        run_main(trajectories, monkeypatch, *arguments)
    assert str(error.value).startswith("trajectories.py: ") and message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named_with_its_remedy(trajectories, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what an import of a missing module finds
    with pytest.raises(ConfigError, match=r'Matplotlib; install it with: pip install "ds_zoadamu\[plots\]"'):
        trajectories.check(trajectories.parser().parse_args(["--output", str(tmp_path / "a.png")]))


def test_the_check_for_writing_leaves_files_as_they_are(trajectories, tmp_path):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    trajectories.check_writable("--output", old)
    trajectories.check_writable("--output", tmp_path / "new.png")
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]
