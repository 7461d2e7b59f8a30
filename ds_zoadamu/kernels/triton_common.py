"""What the host sides of the Triton kernels share: arguments, and what the compiler is told."""

import functools
import os

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_WARPS = 4


def interpreting() -> bool:
    """Whether Triton runs the kernels by numpy on the CPU: for tests, decided before Triton's first import in a process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_tensor(thing: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], like: torch.Tensor) -> None:
    """Raises ValueError or TypeError for a tensor that the kernels cannot take beside ``like``."""
    if tensor.device != like.device or not (tensor.is_cuda or interpreting()):
        raise ValueError(f"{thing} is on {tensor.device}; the Triton kernels need all tensors on one GPU")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{thing} is {tensor.dtype}; it must be one of {', '.join(map(str, dtypes))}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{thing} has shape {tuple(tensor.shape)} and stride {tensor.stride()}; it must be flat and contiguous: "
            "pass x.view(-1)"
        )
    if tensor.numel() != like.numel():
        raise ValueError(f"{thing} has {tensor.numel()} elements where the other tensors have {like.numel()}")


def signed(word: int) -> int:
    """A 32-bit word as the int32 with the same bits: a larger int would be passed as int64, to another variant of a kernel."""
    return word - (1 << 32) if word >= 1 << 31 else word


@functools.cache
def compile_options(divides: bool) -> dict[str, object]:
    """What keeps the compiler from changing bits.

    No a * b + c in one rounding, and no flushing of subnormal numbers in div_rn and sqrt_rn. Triton < 3.6 cannot be told the
    latter: there a quotient below 1e-38 is 0. It is left alone where nothing is divided, since rsqrt would get slower.
    """
    if interpreting():
        return {}
    from triton.backends.nvidia.compiler import CUDAOptions

    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    if divides and "enable_reflect_ftz" in CUDAOptions.__dataclass_fields__:
        options["enable_reflect_ftz"] = False
    return options
