"""The C++ kernels equal the reference in every bit: dtypes, storages, roundings, shapes, starts, vector widths, threads."""

import itertools
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from ds_zoadamu import kernels
from ds_zoadamu.kernels import build, cpu, reference
from ds_zoadamu.kernels.types import Recurrence, Rounding, fp32

from .common import KEY, MOMENTUM_DTYPES, WEIGHT_DTYPES, assert_same_bits, direction, momenta, scalars, special_values, weights

try:
    WIDTHS = cpu.available_simd()
except build.BuildError as error:
    pytest.skip(f"no C++ kernels here: {error}", allow_module_level=True)

# A tile is at most 512 elements, a block 32, a chunk that a thread takes 32768.
SHAPES = [(1, 0), (1, 1), (2, 1), (31, 1), (33, 2**33 - 17), (513, 2**40 + 511), (1300, 7)]
TWO_CHUNKS = (70001, 2**34 - 35001)  # for two threads; the upper half of the pair index changes in the middle
LAST_STEP = 2**32 - 1


@pytest.fixture(params=WIDTHS)
def width(request, monkeypatch):
    monkeypatch.setenv("DS_ZOADAMU_SIMD", request.param)
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cache
def steps(replayed: bool) -> Recurrence:
    return direction(*(scalars(LAST_STEP - k, alpha=0.9 - 0.1 * k) for k in reversed(range(5 if replayed else 1))))


def copy(tensor):
    return None if tensor is None else tensor.clone()


@cache
def perturbed(numel, start, weight_dtype, out_dtype, storage, replayed, rounding, scale):
    """The reference's result, computed once for all vector widths."""
    out, weight, momentum = torch.empty(numel, dtype=out_dtype), weights(numel, weight_dtype), momenta(numel, storage)
    reference.perturb_(out, weight, momentum, steps(replayed), key=KEY, start=start, scale=scale, rounding=rounding)
    return out


def check_perturb(numel, start, weight_dtype, storage, replayed=False, out_dtype=None):
    out_dtype = out_dtype or weight_dtype
    for rounding, scale in itertools.product(Rounding, (fp32(1e-3), -fp32(1e-3))):
        out = torch.empty(numel, dtype=out_dtype)
        weight, momentum = weights(numel, weight_dtype), momenta(numel, storage)
        cpu.perturb_(out, weight, momentum, steps(replayed), key=KEY, start=start, scale=scale, rounding=rounding)
        case = (numel, start, weight_dtype, out_dtype, storage, replayed, rounding, scale)
        assert_same_bits(out, perturbed(*case), case)
        assert_same_bits(weight, weights(numel, weight_dtype), "weight was written")
        assert_same_bits(momentum, momenta(numel, storage), "momentum was written")


@cache
def updated(numel, start, weight_dtype, storage, replayed, options):
    weight, momentum = weights(numel, weight_dtype), momenta(numel, storage)
    reference.update_(weight, momentum, steps(replayed), key=KEY, start=start, **dict(options))
    return weight, momentum


def check_update(numel, start, weight_dtype, storage, replayed=False):
    for rounding, normalize, write_weight in itertools.product(Rounding, (False, True), (False, True)):
        options = {
            "lr_grad": fp32(-3e-3), "lr_decay": fp32(1e-2), "sigma": fp32(1e-8),
            "normalize": normalize, "write_weight": write_weight, "rounding": rounding,
        }  # fmt: skip
        weight, momentum = weights(numel, weight_dtype), momenta(numel, storage)
        cpu.update_(weight, momentum, steps(replayed), key=KEY, start=start, **options)
        case = (numel, start, weight_dtype, storage, replayed, tuple(options.items()))
        expected_weight, expected_momentum = updated(*case)
        assert_same_bits(weight, expected_weight, case)
        assert_same_bits(momentum, expected_momentum, ("momentum", case))


@cache
def noise(numel, start, step):
    xi1, xi2 = torch.empty(numel), torch.empty(numel)
    reference.noise_(xi1, xi2, key=KEY, step=step, start=start)
    return xi1, xi2


@pytest.mark.parametrize("numel, start", [*SHAPES, TWO_CHUNKS])
def test_noise(width, numel, start):
    actual = torch.empty(numel), torch.empty(numel)
    for step in (0, LAST_STEP):
        cpu.noise_(*actual, key=KEY, step=step, start=start)
        for i in range(2):
            assert_same_bits(actual[i], noise(numel, start, step)[i], (step, i))


def test_noise_where_the_uniform_is_one(width):
    """u = 1 makes the radius -0, whose sign the reference keeps; the counter is one that gives it, found by search."""
    key, pair = (0, 0), 2330056
    actual, expected = ([torch.empty(64) for _ in range(2)] for _ in range(2))
    cpu.noise_(*actual, key=key, step=0, start=2 * pair - 31)
    reference.noise_(*expected, key=key, step=0, start=2 * pair - 31)
    assert (expected[0] == 0).sum() == 1
    for i in range(2):
        assert_same_bits(actual[i], expected[i], i)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("storage", MOMENTUM_DTYPES)
def test_perturb(width, weight_dtype, storage):
    for numel, start in SHAPES:
        check_perturb(numel, start, weight_dtype, storage)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("storage", MOMENTUM_DTYPES)
def test_update(width, weight_dtype, storage):
    for numel, start in SHAPES:
        check_update(numel, start, weight_dtype, storage)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_replay(width, weight_dtype):
    for numel, start in SHAPES:
        check_perturb(numel, start, weight_dtype, None, replayed=True)
        check_update(numel, start, weight_dtype, None, replayed=True)


def test_a_result_of_another_dtype_than_the_weight(width):
    for weight_dtype, out_dtype in itertools.permutations(WEIGHT_DTYPES, 2):
        check_perturb(1300, 7, weight_dtype, torch.float32, out_dtype=out_dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("own_threads", [False, True])
def test_threads_never_change_a_bit(monkeypatch, set_threads, threads, own_threads):
    set_threads(threads)
    if own_threads:
        monkeypatch.setattr(cpu, "_parallel_region", lambda: None)
    for weight_dtype, storage in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.int8), (torch.float32, None)):
        check_perturb(*TWO_CHUNKS, weight_dtype, storage)
        check_update(*TWO_CHUNKS, weight_dtype, storage)
    check_perturb(5000, 3, torch.bfloat16, None, replayed=True)  # ten chunks: they are smaller when a step is replayed


@pytest.mark.parametrize("rounding", Rounding)
def test_every_exponent_rounds_as_the_reference(width, rounding):
    numel = 1 << 14
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat((x, special_values(torch.float32)))
    for dtype in (torch.bfloat16, torch.float16):
        actual, expected = (torch.empty(x.numel(), dtype=dtype) for _ in range(2))
        for module, out in ((cpu, actual), (reference, expected)):
            module.perturb_(out, x, None, steps(False), key=KEY, start=5, scale=0.0, rounding=rounding)
        assert_same_bits(actual, expected, dtype)


def test_in_place_and_unaligned(width):
    storage = weights(1025, torch.bfloat16)
    view = storage[1:]  # two bytes off any alignment
    expected = torch.empty(1024, dtype=torch.bfloat16)
    arguments = {"key": KEY, "start": 1, "scale": fp32(1e-3), "rounding": Rounding.STOCHASTIC}
    reference.perturb_(expected, view.clone(), None, steps(False), **arguments)
    first = storage[0].clone()
    cpu.perturb_(view, view, None, steps(False), **arguments)
    assert_same_bits(view, expected, "in place")
    assert torch.equal(storage[0], first)


def test_nothing_is_written_outside_the_range(width):
    for numel in (1, 31, 32, 33, 700):
        surrounding = torch.full((numel + 128,), 7.0)
        inside = surrounding[64 : 64 + numel]
        cpu.noise_(inside, inside.clone(), key=KEY, step=1, start=13)
        assert torch.all(surrounding[:64] == 7) and torch.all(surrounding[64 + numel :] == 7)
        assert torch.all(inside != 7)


def test_empty_tensors(width):
    empty = torch.empty(0, dtype=torch.bfloat16)
    check_perturb(0, 5, torch.bfloat16, torch.int8)
    check_update(0, 5, torch.bfloat16, torch.int8)
    cpu.noise_(torch.empty(0), torch.empty(0), key=KEY, step=1, start=2**63)
    kernels.perturb_(empty, empty, None, steps(False), key=KEY, start=0, scale=1.0, rounding=Rounding.NEAREST)


def test_flushing_subnormal_numbers_to_zero_does_not_reach_the_kernels(width):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        w = torch.full((100,), 1e-40)
        out = torch.empty_like(w)
        cpu.perturb_(out, w, None, steps(False), key=KEY, start=0, scale=0.0, rounding=Rounding.NEAREST)
        assert out.view(torch.int32).tolist() == w.view(torch.int32).tolist()
    finally:
        torch.set_flush_denormal(False)


# ---------------------------------------------------------------- arguments


def perturb_with(**changes):
    arguments = {
        "out": torch.empty(8), "weight": torch.zeros(8), "momentum": None, "direction": steps(False),
        "key": KEY, "start": 0, "scale": 1.0, "rounding": Rounding.NEAREST,
    }  # fmt: skip
    cpu.perturb_(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"out": torch.empty(7)}, ValueError, "out has 7 elements where the other tensors have 8"),
        ({"momentum": torch.empty(9)}, ValueError, "momentum has 9 elements"),
        ({"weight": torch.zeros(8, dtype=torch.float64)}, TypeError, "weight is torch.float64; it must be one of"),
        ({"out": torch.zeros(8, dtype=torch.int8)}, TypeError, "out is torch.int8"),
        ({"momentum": torch.zeros(8, dtype=torch.int32)}, TypeError, "momentum is torch.int32"),
        ({"out": torch.empty(16)[::2]}, ValueError, r"out has shape \(8,\) and stride \(2,\); it must be flat and contiguous"),
        ({"out": torch.empty(2, 4)}, ValueError, r"out has shape \(2, 4\)"),
        ({"out": torch.empty(8, device="meta")}, ValueError, "out is on meta"),
        ({"start": -1}, ValueError, "start=-1"),
        ({"start": 2**63 - 7}, ValueError, r"2\*\*63"),
        ({"key": (0, 2**32)}, ValueError, "key must be two words"),
        ({"key": (0,)}, ValueError, "key must be two words"),
        ({"direction": Recurrence(())}, ValueError, "no steps"),
        ({"direction": Recurrence((scalars(2**32),))}, ValueError, r"step must be in 0 <= step < 2\*\*32, got 4294967296"),
        ({"rounding": 7}, ValueError, "7 is not a valid Rounding"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        perturb_with(**changes)


def test_a_vector_width_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("DS_ZOADAMU_SIMD", "avx1024")
    with pytest.raises(ValueError, match=r"DS_ZOADAMU_SIMD='avx1024': this machine can run .*generic"):
        perturb_with()


def test_the_name_of_the_backend_tells_the_width(width):
    assert cpu.backend_name() == f"cpu-{width}"


def test_no_second_openmp_runtime_is_loaded():
    perturb_with()
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc/self/maps here")
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps}
    named = {file for file in files if os.path.basename(file).startswith(cpu._OPENMP_RUNTIMES)}
    loaded = {file for file in named if not Path(file).parent.name.endswith(".libs")}  # a package's own copy, of sentencepiece
    library = build.library_path()
    assert len(loaded) == 1, loaded
    assert cpu._parallel_region() is not None
    assert b"libgomp" not in library.read_bytes()
