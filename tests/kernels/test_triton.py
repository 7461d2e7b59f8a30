"""The Triton kernels without a GPU: in Triton's interpreter against the reference, and compiled to PTX, which is read.

The interpreter runs the same Triton code by numpy, where every operation rounds on its own. So it shows integers, masks,
offsets, dtypes and the order of operations; it cannot show what a compiler does to them. For that PTX is read; what only a GPU
can show is in ../gpu/test_triton_gpu.py.

The interpreter is chosen by the environment when Triton is imported, hence a process of its own.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from ds_zoadamu import kernels
from ds_zoadamu.kernels import reference, triton, triton_common
from ds_zoadamu.kernels.types import Rounding
from tests.helpers.harness import HANG

from . import triton_checks as checks
from .common import KEY, MOMENTUM_DTYPES, WEIGHT_DTYPES

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROGRAM = 2 * 128 * 4  # elements that a program takes as words
WORDS_AND_REST = (PROGRAM + 7, 2**33 - 2 * 100)  # the upper half of the pair index changes in the middle
ODD = (300, 7)
# A program takes 2048 elements where they begin with a run of 256; the upper half of the counter changes at 2**36.
SIGN_SHAPES = [(1, 255), (300, 7), (2048 + 52, 2**36 - 512), (700, 2**62 + 77)]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function of triton_checks in a process whose Triton interprets."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield lambda check, *args, **options: pool.submit(check, *args, **options).result(timeout=HANG)


# ---------------------------------------------------------------- bits, in the interpreter


@needs_triton
@pytest.mark.parametrize("numel, start", [(1, 0), (1, 1), (2, 1), (257, 2**63 - 300), ODD, (PROGRAM, 0), WORDS_AND_REST])
def test_noise(interpreter, numel, start):
    interpreter(checks.check_noise, numel, start)


@needs_triton
@pytest.mark.parametrize("storage", MOMENTUM_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_perturb(interpreter, dtype, storage):
    interpreter(checks.check_perturb, *WORDS_AND_REST, dtype, storage, Rounding.STOCHASTIC, -1)
    interpreter(checks.check_perturb, *ODD, dtype, storage, Rounding.STOCHASTIC, +1)
    interpreter(checks.check_perturb, *ODD, dtype, storage, Rounding.NEAREST, +1)


@needs_triton
def test_perturb_in_a_corner(interpreter):
    interpreter(checks.check_perturb, 1, 2**63 - 2, BF16, torch.int8, Rounding.STOCHASTIC, +1)
    interpreter(checks.check_perturb, PROGRAM, 0, BF16, torch.int8, Rounding.STOCHASTIC, +1, offset=1)
    interpreter(checks.check_perturb, PROGRAM, 0, FP32, torch.int8, Rounding.STOCHASTIC, +1, offset=1)
    for dtype, out_dtype in ((FP32, BF16), (FP32, FP16), (BF16, FP32), (FP16, BF16)):
        interpreter(checks.check_perturb, PROGRAM, 0, dtype, FP32, Rounding.STOCHASTIC, -1, out_dtype=out_dtype)


@needs_triton
@pytest.mark.parametrize("storage", MOMENTUM_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_update(interpreter, dtype, storage):
    interpreter(checks.check_update, *WORDS_AND_REST, dtype, storage, Rounding.STOCHASTIC)
    interpreter(checks.check_update, *ODD, dtype, storage, Rounding.NEAREST, normalize=False)


@needs_triton
@pytest.mark.parametrize("storage", MOMENTUM_DTYPES, ids=str)
def test_a_skipped_step_moves_the_momentum_only(interpreter, storage):
    interpreter(checks.check_update, *ODD, BF16, storage, Rounding.STOCHASTIC, write_weight=False)


@needs_triton
@pytest.mark.parametrize("storage", (None, torch.int8), ids=str)
def test_replay(interpreter, storage):
    interpreter(checks.check_perturb, *WORDS_AND_REST, BF16, storage, Rounding.STOCHASTIC, -1, num_steps=3)
    interpreter(checks.check_update, *ODD, FP32, storage, Rounding.STOCHASTIC, num_steps=3)


@needs_triton
def test_signs(interpreter):
    for numel, start in SIGN_SHAPES:
        interpreter(checks.check_signs, numel, start, 12)


@needs_triton
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_perturb_and_update_with_signs(interpreter, dtype):
    for numel, start in SIGN_SHAPES:
        interpreter(checks.check_perturb_signs, numel, start, dtype, Rounding.STOCHASTIC, -1e-3)
        interpreter(checks.check_update_signs, numel, start, dtype, Rounding.STOCHASTIC, 11)
    interpreter(checks.check_perturb_signs, *ODD, dtype, Rounding.NEAREST, 1e-2, direction=3)
    interpreter(checks.check_update_signs, *ODD, dtype, Rounding.NEAREST, 8)
    interpreter(checks.check_perturb_signs, 2048, 0, dtype, Rounding.STOCHASTIC, 1e-3, out_dtype=FP32)
    interpreter(checks.check_perturb_signs, 2048, 0, dtype, Rounding.STOCHASTIC, 1e-3, offset=1)


# ---------------------------------------------------------------- what the compiler makes of it


def _compiled(name: str, dtypes: dict[str, str | None], capability: int, **constants) -> str:
    """PTX of a kernel for a GPU that need not be here. dtypes: Triton's names of the pointers' dtypes, None for no tensor."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ds_zoadamu.kernels import signs_jit, triton_jit

    kernel = getattr(triton_jit, name, None) or getattr(signs_jit, name)
    integers = {"num_full", "tail", "pair_low", "pair_high", "key0", "key1", "step", "num_older"}
    integers |= {"skip", "stop", "block_low", "block_high", "direction", "negative"}
    signature, values, hints = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants or dtypes.get(argument, "") is None:
            signature[argument], values[(i,)] = "constexpr", constants.get(argument)
        elif argument in dtypes:
            signature[argument], hints[(i,)] = "*" + dtypes[argument], [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32" if argument in integers else "fp32"
    options = triton_common.compile_options(divides=name == "update_kernel")
    source = ASTSource(kernel, signature, values, hints)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


COMPILED = {
    "noise": ("noise_kernel", {"xi1": "fp32", "xi2": "fp32"}, {}),
    "perturb": (
        "perturb_kernel", {"out": "bf16", "weight": "bf16", "momentum": "i8", "table": None},
        {"STOCHASTIC": True, "FLIP": True, "REPLAY": False},
    ),
    "perturb, replay": (
        "perturb_kernel", {"out": "fp16", "weight": "fp16", "momentum": None, "table": "i32"},
        {"STOCHASTIC": True, "FLIP": False, "REPLAY": True},
    ),
    "update": (
        "update_kernel", {"weight": "bf16", "momentum": "i8", "table": None},
        {"STOCHASTIC": True, "NORMALIZE": True, "WRITE_WEIGHT": True, "REPLAY": False},
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("case", COMPILED)
def test_ptx_rounds_every_operation_on_its_own(case, capability):
    if triton._triton_version().startswith(("3.2", "3.3")):
        pytest.skip("this test compiles by an interface that Triton has had since 3.4")
    name, dtypes, constants = COMPILED[case]
    ptx = _compiled(name, dtypes, capability, **constants, ODD=0, WORDS=True, FAST_ROOT=True, BLOCK=128, CHUNKS=1)
    code = re.findall(r"^\s*(?:@\S+ )?([a-z]\w*(?:\.\w+)+)", ptx, re.MULTILINE)
    roots = sum(op.startswith("rsqrt.approx") for op in code)
    assert roots and sum(op.startswith("fma.") for op in code) == 2 * roots  # those of _root, and no others
    approximate = {op for op in code if ".approx" in op or ".full" in op or op.startswith(("sin", "cos", "lg2", "ex2"))}
    assert approximate <= {"rsqrt.approx.ftz.f32", "rsqrt.approx.f32"}
    assert {op for op in code if ".ftz" in op} <= {"rsqrt.approx.ftz.f32"}
    if name == "update_kernel":
        assert code.count("sqrt.rn.f32") == code.count("div.rn.f32") == 2
    assert not [op for op in code if op.startswith(("ld.shared", "st.shared"))]  # nothing is moved between lanes


SIGNS_COMPILED = {
    "perturb": ("perturb_signs_kernel", {"out": "bf16", "weight": "bf16"}, {"STOCHASTIC": True}),
    "update": ("update_signs_kernel", {"weight": "bf16", "table": "fp32"}, {"STOCHASTIC": True, "ROWS": 2}),
}


@needs_triton
@pytest.mark.parametrize("case", SIGNS_COMPILED)
def test_ptx_of_signs(case):
    """Nothing is fused, approximated or moved between lanes, and four 16-bit neighbours are one word."""
    if triton._triton_version().startswith(("3.2", "3.3")):
        pytest.skip("this test compiles by an interface that Triton has had since 3.4")
    name, dtypes, constants = SIGNS_COMPILED[case]
    ptx = _compiled(name, dtypes, 80, **constants, MASKED=False, LANES=128)
    code = re.findall(r"^\s*(?:@\S+ )?([a-z]\w*(?:\.\w+)+)", ptx, re.MULTILINE)
    assert not [
        op for op in code if op.startswith(("fma.", "ld.shared", "st.shared", "shfl")) or ".approx" in op or ".ftz" in op
    ]
    assert code.count("st.global.b64") == 4 and code.count("ld.global.b64") == 4


# ---------------------------------------------------------------- the quick root


def test_the_quick_root_with_any_right_estimate():
    """The four operations of _root give the correctly rounded root of all inputs if the estimate is the nearest fp32 number.

    A GPU's estimate is not always that; load() tries its own on all inputs.
    """
    wrong, total = 0, 0
    for k in torch.arange(1 << 24).split(1 << 20):
        x = (reference.log_uniform(k) * -0.5).numpy()
        x = x[x != 0]
        exact = np.sqrt(x.astype(np.float64))
        estimate = (1 / exact).astype(np.float32)
        root = x * estimate
        rest = (x.astype(np.float64) - root.astype(np.float64) ** 2).astype(np.float32)  # fma: exact in fp64, rounded once
        half = estimate * np.float32(0.5)
        root = (rest.astype(np.float64) * half + root.astype(np.float64)).astype(np.float32)
        wrong += int((root != exact.astype(np.float32)).sum())
        total += x.size
    assert (wrong, total) == (0, (1 << 24) - 1)


# ---------------------------------------------------------------- where it cannot work, and bad input


def test_missing_triton_is_named():
    with pytest.raises(triton.TritonUnavailable, match=r"not installed; needed is triton >= 3.2.*plain PyTorch.*=triton"):
        triton._check_version(None)


def test_old_triton_is_named():
    with pytest.raises(triton.TritonUnavailable, match=r"Triton 3.1.0 is too old; needed is triton >= 3.2"):
        triton._check_version("3.1.0")
    for version in ("3.2.0", "3.10.1+gitabc", "4.0"):
        triton._check_version(version)


def test_an_old_gpu_is_named():
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(6, 1)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="Old Card"),
        pytest.raises(triton.TritonUnavailable, match=r"Old Card has compute capability 6.1; Triton needs 7.0 or more"),
    ):
        triton._check_device(torch.device("cuda", 0))


@pytest.mark.parametrize("choice", ("auto", "triton", "reference"))
def test_dispatch_falls_back_with_one_warning(monkeypatch, choice, recwarn):
    def load():
        raise triton._unavailable("no Triton today")

    monkeypatch.setattr(triton, "load", load)
    monkeypatch.setenv("DS_ZOADAMU_KERNELS", choice)
    kernels._backend.cache_clear()
    try:
        if choice == "triton":
            with pytest.raises(triton.TritonUnavailable, match="no Triton today"):
                kernels.backend_name("cuda")
            return
        assert kernels.backend_name("cuda") == kernels.backend_name("cuda") == "reference"
        warned = [str(w.message) for w in recwarn if "no Triton today" in str(w.message)]
        assert len(warned) == (choice == "auto")
    finally:
        kernels._backend.cache_clear()


def test_dispatch_takes_triton(monkeypatch):
    monkeypatch.setattr(triton, "load", lambda: None)
    monkeypatch.setattr(triton, "_triton_version", lambda: "3.6.0")
    monkeypatch.delenv("DS_ZOADAMU_KERNELS", raising=False)
    kernels._backend.cache_clear()
    try:
        assert kernels.backend_name("cuda") == "triton-3.6.0"
    finally:
        kernels._backend.cache_clear()


def test_without_a_gpu_it_is_not_available():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "triton" in sys.modules and triton_common.interpreting():
        pytest.skip("Triton interprets in this process")
    triton.load.cache_clear()
    assert not triton.is_available()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"xi2": torch.empty(3)}, ValueError, "xi2 has 3 elements where the other tensors have 4"),
        ({"xi1": torch.empty(4, dtype=FP16)}, TypeError, "xi1 is torch.float16"),
        ({"xi1": torch.empty(2, 2)}, ValueError, "xi1 has shape"),
        ({"step": 1 << 32}, ValueError, "step must be"),
        ({"start": -1}, ValueError, "flat indices must be"),
        ({"start": 2**63 - 3}, ValueError, "flat indices must be"),
        ({"key": (1 << 32, 0)}, ValueError, "key must be two words"),
    ],
)
def test_bad_noise_arguments(monkeypatch, change, error, message):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # checks come before Triton is imported
    arguments = {"xi1": torch.empty(4), "xi2": torch.empty(4), "key": KEY, "step": 1, "start": 0} | change
    with pytest.raises(error, match=re.escape(message)):
        triton.noise_(arguments.pop("xi1"), arguments.pop("xi2"), **arguments)


def test_tensors_on_the_cpu_are_refused():
    if triton_common.interpreting():
        pytest.skip("Triton interprets in this process")
    with pytest.raises(ValueError, match="xi1 is on cpu; the Triton kernels need all tensors on one GPU"):
        triton.noise_(torch.empty(4), torch.empty(4), key=KEY, step=1, start=0)


def test_parts_cover_a_range_once():
    for numel in (1, 255, 256, 257, PROGRAM - 1, PROGRAM, 3 * PROGRAM + 300):
        for start, aligned in ((0, True), (1, True), (6, False), (2**33 - 2, True)):
            covered = 0
            for first, grid, place in triton._parts(numel, start, aligned):
                assert first == covered and place["ODD"] == (start + first) % 2
                pair = place["pair_high"] << 32 | place["pair_low"] & 0xFFFFFFFF
                assert 2 * pair + place["ODD"] == start + first
                span = 256 * place["CHUNKS"]
                if place["WORDS"]:
                    covered += grid * span
                else:
                    assert grid == place["num_full"] + (place["tail"] > 0)
                    covered += place["num_full"] * span + place["tail"] - place["ODD"]
            assert covered == numel
