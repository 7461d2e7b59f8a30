"""FZOO, and MeZO with signs and a running normalisation, on real ranks: equal bits, and an fp64 replay of their journals."""

import statistics

import numpy as np
import pytest

from ds_zoadamu.durability.journal import read_journal
from ds_zoadamu.rules.noise import parameter_key
from tests.helpers.reference_numpy import fzoo_step64, noise64, signs64

from ..helpers import runs
from ..helpers.harness import run_ranks
from ..helpers.jobs import whole_model
from ..helpers.models import OddModel

pytestmark = pytest.mark.ranks

STEPS, SEED, DECAY = 7, 5, 0.1
COMMON = {"lr": 2e-2, "zo_eps": 1e-2, "seed": SEED, "weight_decay": DECAY, "bad_steps": (3,)}
CASES = {
    "signs": {"rule": "FZOO"},
    "11 directions": {"rule": "FZOO", "num_perturbations": 11},
    "bf16": {"rule": "FZOO", "dtype": "bf16"},
    "gaussian": {"rule": "FZOO", "num_perturbations": 3, "distribution": "gaussian"},
    "two sides, ema": {"rule": "FZOO", "num_perturbations": 2, "sides": 2, "normalize": "ema", "ema_decay": 0.5},
    "not normalized": {"rule": "FZOO", "num_perturbations": 2, "normalize": "none"},
    "MeZO with signs, ema": {"rule": "MeZO", "distribution": "sign", "normalize": "ema", "ema_decay": 0.9},
}


def _all(rank, world_size, folder):
    """Of each case the state of a whole run; on 2 ranks also of one that goes on from a checkpoint and its journal."""
    found = {}
    for number, settings in enumerate(CASES.values()):
        place = f"{folder}/{world_size}-{number}"
        found[number] = [_whole(world_size, place, **COMMON | settings)]
        if world_size == 2:
            runs.run(rank, world_size, f"{place}-again", 5, save_every=2, **COMMON | settings)
            found[number].append(runs.run(rank, world_size, f"{place}-again", STEPS, resume=True, **COMMON | settings))
    return found


def _whole(world_size, folder, **settings):
    """(state, weights as fp64, figures of the last step) of a run with a journal."""
    engine, batches = runs.make_engine(world_size, **settings)
    engine.open_journal(f"{folder}/journal.jsonl")
    runs.train(engine, batches, STEPS)
    weights = {name: value.double().numpy().ravel() for name, value in whole_model(engine).items()}
    found = runs.state(engine), weights, engine.last_step.figures
    engine.destroy()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fzoo")


@pytest.fixture(scope="module")
def found(folder):
    """Of every rank of 1, 2 and 4 what ``_all`` returns."""
    return [of_rank for world_size in (1, 2, 4) for of_rank in run_ranks(world_size, _all, str(folder))]


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_equal_bits_on_1_2_and_4_ranks_and_after_a_resume(found, folder, number):
    (expected, _, _), *_ = found[0][number]
    assert expected["counters"][2] == 1  # the skipped step
    for of_rank in found:
        (state, _, _), *resumed = of_rank[number]
        assert [state, *resumed] == [expected] * (1 + len(resumed))
    files = [folder / f"{name}-{number}{again}" / "journal.jsonl" for name, again in ((1, ""), (2, ""), (2, "-again"), (4, ""))]
    assert len({file.read_bytes() for file in files}) == 1
    gaussian = "gaussian" in list(CASES.values())[number].values()
    assert read_journal(files[0]).header["noise_version"] == (1 if gaussian else 2)


def _divisors(settings: dict, records) -> list[float]:
    """s of each step that was not skipped, worked out from the journal's numbers alone."""
    normalize = settings.get("normalize", "std" if settings["rule"] == "FZOO" else "none")
    if normalize == "none":
        return [1.0] * len(records)
    if normalize == "std":
        return [np.std(record.projected_grads, ddof=1) for record in records]
    decay, found = settings["ema_decay"], []
    squares = [np.mean(np.square(record.projected_grads)) for record in records]
    for t in range(1, len(squares) + 1):
        weights = decay ** np.arange(t - 1, -1, -1)
        found.append(np.sqrt(np.average(squares[:t], weights=weights)))
    return found


def _directions(settings: dict, name: str, record, numel: int) -> list[np.ndarray]:
    count = len(record.projected_grads)
    if settings.get("distribution", "sign") == "gaussian":
        return [noise64(parameter_key(SEED, name, k), record.step, 0, numel)[0] for k in range(count)]
    return [signs64(parameter_key(SEED, name), record.step, k, 0, numel) for k in range(count)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_an_fp64_replay_of_the_journal(found, folder, number):
    settings = list(CASES.values())[number]
    contents = read_journal(folder / f"1-{number}" / "journal.jsonl")
    taken = [record for record in contents.records if not record.skipped]
    assert len(taken) == STEPS - 1
    divisors = _divisors(settings, taken)
    (_, weights, figures), *_ = found[0][number]
    start = OddModel(runs.DTYPES[settings.get("dtype", "fp32")])
    square = total = 0.0
    for name, param in start.named_parameters():
        theta0 = param.detach().double().numpy().ravel()
        if not param.requires_grad:
            assert np.array_equal(weights[name], theta0)
            continue
        theta = theta0
        for record, divisor in zip(taken, divisors, strict=True):
            z = _directions(settings, name, record, theta.size)
            theta = fzoo_step64(theta, record.projected_grads, record.lrs[0], DECAY, z, divisor)
        square += np.sum((weights[name] - theta) ** 2)
        total += np.sum((theta - theta0) ** 2)
    # fp32 rounds theta once a step and direction, by at most 2^-24 |theta|. bf16 rounds it to one of two neighbours that are
    # 2^-9 apart at 0.3: 0.002 after six steps in the root of the mean of squares, beside a displacement of 0.017.
    assert np.sqrt(square / total) < (0.2 if "dtype" in settings else 1e-5)
    if "divisor" in figures:
        last = taken[-1]
        assert figures["divisor"] == pytest.approx(divisors[-1], rel=1e-12)
        spread = np.linalg.norm(last.projected_grads) / len(last.projected_grads) / divisors[-1]
        assert figures["update_rms"] == pytest.approx(last.lrs[0] * spread, rel=1e-12)
    else:
        assert settings.get("normalize") == "none"


def _by_hand(rank, world_size):
    """(projected gradients of a step, the same from losses of a plain model at perturbed weights, loss_minus, L(theta))."""
    import torch

    engine, batches = runs.make_engine(1, rule="FZOO", **{k: v for k, v in COMMON.items() if k != "bad_steps"})
    step = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
    engine.train_batch(iter(step))
    record, losses = engine.last_step, []
    for direction in (None, *range(8)):
        model = OddModel().eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.requires_grad and direction is not None:
                    z = torch.from_numpy(signs64(parameter_key(SEED, name), 1, direction, 0, param.numel())).float()
                    param += (torch.tensor(1e-2) * z).reshape(param.shape)
            losses.append(statistics.fmean(float(model(**batch).loss) for batch in step))
    engine.destroy()
    return record.projected_grads, [(loss - losses[0]) / 1e-2 for loss in losses[1:]], record.loss_minus, losses[0]


def test_directions_are_measured_from_the_unperturbed_loss():
    grads, by_hand, loss_minus, unperturbed = run_ranks(1, _by_hand)[0]
    # fp32 losses near 2.5 have a spacing of 2^-22; a difference of two of them over zo_eps.
    assert grads == pytest.approx(by_hand, abs=4 * 2.0**-22 / 1e-2)
    assert loss_minus == pytest.approx(unperturbed, abs=2.0**-21)
