"""Stored tensors on the device of the arithmetic, a chunk at a time: no temporary there has the size of a parameter."""

from collections.abc import Iterator, Sequence

import torch

# Elements that go through the arithmetic before the next ones. On a CPU: few enough for a core's cache, many enough to pay for
# a call; on a GPU a chunk has to fill the device. Even: the kernels make noise for pairs of elements.
CHUNK_ON_CPU, CHUNK_ON_GPU = 1 << 16, 1 << 24


def chunks_on(
    device: torch.device,
    tensors: Sequence[torch.Tensor],
    *,
    writing: bool,
    chunk: int | None = None,
    copy: bool = False,
    non_blocking: bool = False,
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Go through 1-D tensors of one length: yields (range of elements, the tensors' parts on ``device``).

    A part is a view where its tensor is on ``device`` already, else a copy, which ``writing`` puts back after the loop's body.
    Args: ``chunk``: elements in a part; None: CHUNK_ON_GPU where something is copied, else everything at once. ``copy``: copy
    in any case. ``non_blocking``: copies from pinned memory may still be under way on the device's stream.
    """
    length = tensors[0].numel()
    copied = [copy or t.device != device for t in tensors]
    chunk = chunk or (CHUNK_ON_GPU if any(copied) else max(1, length))
    for low in range(0, length, chunk):
        part = slice(low, min(low + chunk, length))
        here = [
            t[part].to(device, copy=copy, non_blocking=non_blocking) if c else t[part]
            for t, c in zip(tensors, copied, strict=True)
        ]
        yield part, here
        if writing:
            for stored, changed, c in zip(tensors, here, copied, strict=True):
                if c:
                    stored[part].copy_(changed)
