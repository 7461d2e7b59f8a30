"""safetensors files by flat ranges: any elements [start, stop) of any tensor, read or written without the rest in memory.

The format is 8 bytes (little endian) with the length of a JSON header, the header, and the tensors' bytes. Nothing in it can
run code.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from ..errors import shown
from .untrusted import is_text, open_file, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own bound


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16". Raises ValueError for a name that is no dtype of tensors in files."""
    for dtype in DTYPES.values():
        if dtype_name(dtype) == name:
            return dtype
    raise ValueError(f"{shown(name)} is not the name of a dtype")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor as they lie in a file (copied to the CPU first, where it is elsewhere)."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy())


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError out of the body names this file, if it names none: what fails on an open file does not."""
    try:
        yield
    except OSError as e:
        if e.filename is None:
            e.filename = str(path)
        raise


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: ``offset`` in bytes from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class FlatReader:
    """Reads flat ranges of the tensors of one file.

    Raises OSError, or ``error``, a ValueError, for a file that is not whole or not of this format: as the safetensors library
    does, for tensors that overlap, leave gaps or do not end where the file ends.
    """

    def __init__(self, path: str | Path, error: type[ValueError] = ValueError):
        self.path = Path(path)
        self._error = error
        self._fd, size = open_file(path)
        try:
            self.tensors = self._parse_header(size)
        except ValueError as e:
            self.close()
            raise error(f"{str(self.path)!r} is not a whole safetensors file: {e}") from e
        except BaseException:
            self.close()
            raise

    def _parse_header(self, size: int) -> dict[str, TensorInfo]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 0 < length <= _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        if length > size - 8:
            raise ValueError(f"it has {size} bytes, its header alone says {8 + length}; it was cut short")
        header = parse_json(os.pread(self._fd, length, 8))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(map(is_text, (*metadata, *metadata.values()))):
            raise ValueError("its metadata is not text")
        ranges, tensors = [], {}
        for name, entry in header.items():
            try:
                if not is_text(name):
                    raise ValueError("its name is not text")
                dtype, shape, (begin, end) = _parse_entry(entry)
            except ValueError as e:
                raise ValueError(f"tensor {shown(name)}: {e}") from e
            ranges.append((begin, end, name))
            tensors[name] = TensorInfo(dtype, shape, 8 + length + begin)
        self._check_ranges(sorted(ranges), size - 8 - length)
        return tensors

    def _check_ranges(self, ranges: list[tuple[int, int, str]], size: int) -> None:
        """The tensors' bytes follow each other, from the header's end to the file's."""
        position = 0
        for begin, end, name in ranges:
            if begin != position:
                raise ValueError(f"tensor {shown(name)} begins at byte {begin}, the one before it ends at {position}")
            position = end
        if position != size:
            raise ValueError(
                f"its tensors have {position} bytes, {size} are there" + ("; it was cut short" if size < position else "")
            )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements start <= i < stop of the flattened tensor: a 1-D CPU tensor of its own memory."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.numel:
            raise self._error(f"{str(self.path)!r}: {name!r} has {info.numel} elements, asked for {start} to {stop}")
        if start == stop:
            return torch.empty(0, dtype=info.dtype)
        buffer = numpy.empty((stop - start) * info.dtype.itemsize, dtype=numpy.uint8)
        view, offset = memoryview(buffer), info.offset + start * info.dtype.itemsize
        while view:
            with naming(self.path):
                count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise self._error(f"{str(self.path)!r} ended early: it was shortened while it was read")
            view, offset = view[count:], offset + count
        return torch.from_numpy(buffer).view(info.dtype)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _parse_entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """(dtype, shape, (begin, end)) of a tensor's entry in the header. Raises ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its entry is {shown(entry)}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is {shown(dtype)}; read are {', '.join(DTYPES)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or len(value) > 64 or any(type(n) is not int or not 0 <= n < 2**63 for n in value):
            raise ValueError(f"{key} is {shown(value)}, not a list of sizes")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"data_offsets are {shown(offsets)} for {shown(shape)} elements of {dtype}")
    return DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


class FlatWriter:
    """Writes flat ranges of tensors of known dtypes and shapes into one file, in any order, also from several processes.

    ``create``: make the file with its header and full length; without it the file must already be so (another rank made it).
    """

    def __init__(self, path: str | Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, create: bool = True):
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in specs.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + position
        self._offsets = {name: len(self.header) + header[name]["data_offsets"][0] for name in specs}
        self._itemsizes = {name: dtype.itemsize for name, (dtype, _) in specs.items()}
        self._path = Path(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0), 0o666)
        if create:
            try:
                self._write_at(0, memoryview(self.header))
                with naming(path):
                    os.ftruncate(self._fd, self.size)
            except BaseException:
                self.abandon()
                raise

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Put the raw bytes of the elements from ``start`` on in their place."""
        self._write_at(self._offsets[name] + start * self._itemsizes[name], data)

    def _write_at(self, offset: int, data: memoryview) -> None:
        with naming(self._path):
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def close(self) -> None:
        """Make what was written durable, and close."""
        if self._fd >= 0:
            try:
                with naming(self._path):
                    os.fsync(self._fd)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close without waiting for the disk."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def sync_directory(path: str | Path) -> None:
    """Make creations, renames and removals in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_beside(path: str | Path, data: bytes) -> Path:
    """Write a small file under a temporary name beside ``path`` and fsync it; returns that name, for os.replace. Raises OSError
    naming the file, which is not there then."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)  # what a kill has left is never written to
    try:
        with naming(temporary), open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def write_durably(path: str | Path, data: bytes) -> None:
    """Write a small file, fsync it, and put it in the place of ``path``: the old content or the new, never a part. A link stays
    one; what is no file, such as a terminal, is written to as it is.

    Raises OSError; the old content is there then, and nothing else.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        Path(path).write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    os.replace(write_beside(path, data), path)
    sync_directory(path.parent)
