"""The kernels for the CPU, in C++ (csrc/): same functions and same bits as reference.py, many times faster.

The library is built once at first use, by the compiler named in ``CXX`` or else g++, clang++ or c++, and kept in a cache
directory: ``DS_ZOADAMU_CACHE_DIR``, else ``$XDG_CACHE_HOME/ds_zoadamu``, else ``~/.cache/ds_zoadamu``. It holds one variant for
each vector width and takes the widest that the machine has; ``DS_ZOADAMU_SIMD`` = avx512 | avx2 | sse2 | generic takes another.

Threads: torch.get_num_threads(), out of the pool of the OpenMP runtime that torch has already loaded (two pools would get
into each other's way). Their number never changes a bit.
"""

import ctypes
import functools
import os

import torch

from . import build
from .checks import check_direction, check_position, check_step, check_table
from .types import Recurrence, Rounding, SignTable

_NOISE, _PERTURB, _UPDATE, _SIGNS, _PERTURB_SIGNS, _UPDATE_SIGNS = range(6)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_NO_DTYPE = -1
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTUM_DTYPES = (*_WEIGHT_DTYPES, torch.int8)
_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")


class _Step(ctypes.Structure):
    """struct Step of job.h."""

    _fields_ = [
        ("step", ctypes.c_uint32),
        ("sqrt_alpha", ctypes.c_float),
        ("sqrt_one_minus_alpha", ctypes.c_float),
        ("beta1", ctypes.c_float),
        ("one_minus_beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
    ]


class _Job(ctypes.Structure):
    """struct Job of job.h."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("momentum", ctypes.c_void_p),
        ("steps", ctypes.POINTER(_Step)),
        ("table", ctypes.POINTER(ctypes.c_float)),
        ("parallel_region", ctypes.c_void_p),
        ("start", ctypes.c_uint64),
        ("numel", ctypes.c_int64),
        ("num_steps", ctypes.c_int64),
        ("key", ctypes.c_uint32 * 2),
        ("operation", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("weight_dtype", ctypes.c_int32),
        ("momentum_dtype", ctypes.c_int32),
        ("rounding", ctypes.c_int32),
        ("simd", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("flip_bits", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
        ("write_weight", ctypes.c_int32),
        ("direction", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("decode_scale", ctypes.c_float),
        ("encode_scale", ctypes.c_float),
        ("lr_grad", ctypes.c_float),
        ("lr_decay", ctypes.c_float),
        ("sigma", ctypes.c_float),
    ]


# ---------------------------------------------------------------- the library


@functools.cache
def _library() -> ctypes.CDLL:
    """The shared library, built if need be. Raises build.BuildError."""
    path = build.library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # a file system mounted noexec, a broken file
        raise build.BuildError(
            f"cannot load {path}: {error}; delete it, or set DS_ZOADAMU_CACHE_DIR to another folder"
        ) from error
    library.zo_job_size.restype = ctypes.c_int64
    library.zo_variant_name.restype = ctypes.c_char_p
    library.zo_variant_name.argtypes = library.zo_variant_supported.argtypes = [ctypes.c_int32]
    library.zo_run.argtypes = [ctypes.POINTER(_Job)]
    assert library.zo_job_size() == ctypes.sizeof(_Job), "cpu.py and job.h disagree about struct Job"
    return library


def available_simd() -> tuple[str, ...]:
    """Names of the variants that this machine can run, widest first."""
    library, names, i = _library(), [], 0
    while (name := library.zo_variant_name(i)) is not None:
        if library.zo_variant_supported(i):
            names.append(name.decode())
        i += 1
    return tuple(names)


@functools.cache
def _simd_index(forced: str) -> int:
    """Index of a variant in the library's table; the widest one that the machine can run for the empty string."""
    library, available = _library(), available_simd()
    wanted = forced or available[0]
    if wanted not in available:
        raise ValueError(f"DS_ZOADAMU_SIMD={wanted!r}: this machine can run {', '.join(available)}")
    i = 0
    while library.zo_variant_name(i).decode() != wanted:
        i += 1
    return i


def _forced_simd() -> str:
    return os.environ.get("DS_ZOADAMU_SIMD", "")


def backend_name() -> str:
    """Name for logs, with the vector width in use: "cpu-avx512", ..."""
    return "cpu-" + _library().zo_variant_name(_simd_index(_forced_simd())).decode()


def load() -> None:
    """Builds and loads the library now. Raises build.BuildError, or ValueError for a wrong DS_ZOADAMU_SIMD."""
    _simd_index(_forced_simd())


@functools.cache
def _parallel_region() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that is loaded in this process, or None.

    Intel's and LLVM's runtimes have that entry point too. Looked up by address because torch's wheels bring a runtime of their
    own: a library linked against OpenMP in the ordinary way could load the system's beside it. None is not an error: the
    kernels then start threads of their own for each call.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "/" in line}
    except OSError:
        return None
    torch_dir = os.path.dirname(torch.__file__)
    # Torch's own runtime first, where the process has several.
    for path in sorted(paths, key=lambda path: (not path.startswith(torch_dir), path)):
        if os.path.basename(path).startswith(_OPENMP_RUNTIMES):
            try:
                runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
                return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                continue
    return None


# ---------------------------------------------------------------- arguments


def _check_tensor(thing: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], numel: int) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{thing} is on {tensor.device}; the CPU kernels need all tensors on the CPU")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{thing} is {tensor.dtype}; it must be one of {', '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{thing} has shape {tuple(tensor.shape)} and stride {tensor.stride()}; "
            "it must be flat and contiguous: pass x.view(-1)"
        )
    if tensor.numel() != numel:
        raise ValueError(f"{thing} has {tensor.numel()} elements where the other tensors have {numel}")


@functools.lru_cache(maxsize=8)
def _steps(direction: Recurrence) -> ctypes.Array:
    if not direction.steps:
        raise ValueError("direction has no steps; the last one must be the step to take")
    for c in direction.steps:
        check_step(c.step)
    return (_Step * len(direction.steps))(
        *(
            _Step(c.step, c.sqrt_alpha, c.sqrt_one_minus_alpha, c.beta1, c.one_minus_beta1, c.beta2, c.one_minus_beta2)
            for c in direction.steps
        )
    )


def _run(steps: ctypes.Array, key: tuple[int, int], start: int, numel: int, **fields) -> None:
    if numel == 0:
        return
    job = _Job(
        steps=steps,
        num_steps=len(steps),
        parallel_region=_parallel_region(),
        start=start,
        numel=numel,
        key=key,
        simd=_simd_index(_forced_simd()),
        num_threads=torch.get_num_threads(),
        **fields,
    )
    if _library().zo_run(ctypes.byref(job)):
        raise MemoryError(f"no memory for {len(steps)} prepared steps")


def _momentum_fields(momentum: torch.Tensor | None, direction: Recurrence, numel: int) -> dict[str, object]:
    if momentum is None:
        return {"momentum": None, "momentum_dtype": _NO_DTYPE}
    _check_tensor("momentum", momentum, _MOMENTUM_DTYPES, numel)
    return {
        "momentum": momentum.data_ptr(),
        "momentum_dtype": _DTYPES[momentum.dtype],
        "decode_scale": direction.decode_scale,
        "encode_scale": direction.encode_scale,
    }


# ---------------------------------------------------------------- the operations


def noise_(xi1: torch.Tensor, xi2: torch.Tensor, *, key: tuple[int, int], step: int, start: int) -> None:
    """See reference.noise_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    numel = xi1.numel()
    _check_tensor("xi1", xi1, (torch.float32,), numel)
    _check_tensor("xi2", xi2, (torch.float32,), numel)
    check_position(key, start, numel)
    _run(
        _one_step(step),
        key,
        start,
        numel,
        operation=_NOISE,
        out=xi1.data_ptr(),
        out_dtype=_DTYPES[torch.float32],
        weight=xi2.data_ptr(),
        weight_dtype=_DTYPES[torch.float32],
        momentum_dtype=_NO_DTYPE,
    )


def perturb_(
    out: torch.Tensor,
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Recurrence,
    *,
    key: tuple[int, int],
    start: int,
    scale: float,
    rounding: Rounding,
) -> None:
    """See reference.perturb_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    numel = weight.numel()
    _check_tensor("weight", weight, _WEIGHT_DTYPES, numel)
    _check_tensor("out", out, _WEIGHT_DTYPES, numel)
    check_position(key, start, numel)
    _run(
        _steps(direction),
        key,
        start,
        numel,
        operation=_PERTURB,
        out=out.data_ptr(),
        out_dtype=_DTYPES[out.dtype],
        weight=weight.data_ptr(),
        weight_dtype=_DTYPES[weight.dtype],
        rounding=Rounding(rounding),
        flip_bits=scale < 0,
        scale=scale,
        **_momentum_fields(momentum, direction, numel),
    )


def update_(
    weight: torch.Tensor,
    momentum: torch.Tensor | None,
    direction: Recurrence,
    *,
    key: tuple[int, int],
    start: int,
    lr_grad: float,
    lr_decay: float,
    sigma: float,
    normalize: bool,
    write_weight: bool,
    rounding: Rounding,
) -> None:
    """See reference.update_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    numel = weight.numel()
    _check_tensor("weight", weight, _WEIGHT_DTYPES, numel)
    check_position(key, start, numel)
    if momentum is None and not write_weight:
        return
    _run(
        _steps(direction),
        key,
        start,
        numel,
        operation=_UPDATE,
        out=None,
        out_dtype=_NO_DTYPE,
        weight=weight.data_ptr(),
        weight_dtype=_DTYPES[weight.dtype],
        rounding=Rounding(rounding),
        normalize=bool(normalize),
        write_weight=bool(write_weight),
        lr_grad=lr_grad,
        lr_decay=lr_decay,
        sigma=sigma,
        **_momentum_fields(momentum, direction, numel),
    )


# ---------------------------------------------------------------- with signs


def signs_(out: torch.Tensor, *, key: tuple[int, int], step: int, start: int, direction: int) -> None:
    """See reference.signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    _check_tensor("out", out, (torch.float32,), out.numel())
    check_position(key, start, out.numel())
    check_direction(direction)
    _run(
        _one_step(step),
        key,
        start,
        out.numel(),
        operation=_SIGNS,
        out=out.data_ptr(),
        out_dtype=_DTYPES[torch.float32],
        weight=None,
        weight_dtype=_NO_DTYPE,
        momentum_dtype=_NO_DTYPE,
        direction=direction,
    )


def perturb_signs_(
    out: torch.Tensor,
    weight: torch.Tensor,
    *,
    key: tuple[int, int],
    step: int,
    start: int,
    direction: int,
    scale: float,
    rounding: Rounding,
) -> None:
    """See reference.perturb_signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    numel = weight.numel()
    _check_tensor("weight", weight, _WEIGHT_DTYPES, numel)
    _check_tensor("out", out, _WEIGHT_DTYPES, numel)
    check_position(key, start, numel)
    check_direction(direction)
    _run(
        _one_step(step),
        key,
        start,
        numel,
        operation=_PERTURB_SIGNS,
        out=out.data_ptr(),
        out_dtype=_DTYPES[out.dtype],
        weight=weight.data_ptr(),
        weight_dtype=_DTYPES[weight.dtype],
        momentum_dtype=_NO_DTYPE,
        rounding=Rounding(rounding),
        direction=direction,
        scale=scale,
    )


def update_signs_(
    weight: torch.Tensor,
    table: SignTable,
    *,
    key: tuple[int, int],
    step: int,
    start: int,
    lr_decay: float,
    rounding: Rounding,
) -> None:
    """See reference.update_signs_. Raises TypeError or ValueError for tensors or numbers that do not fit."""
    numel = weight.numel()
    _check_tensor("weight", weight, _WEIGHT_DTYPES, numel)
    check_position(key, start, numel)
    check_table(table)
    _run(
        _one_step(step),
        key,
        start,
        numel,
        operation=_UPDATE_SIGNS,
        out=None,
        out_dtype=_NO_DTYPE,
        weight=weight.data_ptr(),
        weight_dtype=_DTYPES[weight.dtype],
        momentum_dtype=_NO_DTYPE,
        rounding=Rounding(rounding),
        write_weight=True,
        table=_rows(table),
        num_rows=len(table.rows),
        lr_decay=lr_decay,
    )


def _one_step(step: int) -> ctypes.Array:
    check_step(step)
    return (_Step * 1)(_Step(step))


_last_rows: tuple[SignTable, ctypes.Array] | None = None


def _rows(table: SignTable) -> ctypes.Array:
    """The table for C, made once for all partitions of a step: found by identity, for it is long to hash."""
    global _last_rows
    if _last_rows is None or _last_rows[0] is not table:
        flat = [value for row in table.rows for value in row]
        _last_rows = table, (ctypes.c_float * len(flat))(*flat)
    return _last_rows[1]
