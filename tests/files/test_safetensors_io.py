"""Flat ranges of safetensors files: the same bytes as the safetensors library reads and writes; files that are not whole are
refused."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_zoadamu.files.safetensors_io import (
    DTYPES,
    FlatReader,
    FlatWriter,
    dtype_from_name,
    dtype_name,
    raw_bytes,
    write_durably,
)
from tests.helpers.disks import file_size_limit

TENSORS = {
    "a.weight": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "b": torch.arange(6).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "q": torch.tensor([-3, 4], dtype=torch.int8),
    "none": torch.empty(0, 4),
}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    reader = FlatReader(tmp_path / "x.safetensors")
    for name, tensor in TENSORS.items():
        assert reader.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(reader.read(name, 0, tensor.numel()), tensor.reshape(-1))
    assert torch.equal(reader.read("a.weight", 6, 16), torch.arange(6.0, 16.0))
    with pytest.raises(ValueError, match="has 35 elements, asked for 30 to 36"):
        reader.read("a.weight", 30, 36)
    reader.close()


def test_the_library_reads_what_it_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    writer = FlatWriter(path, {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()})
    for name, tensor in reversed(TENSORS.items()):
        middle = tensor.numel() // 2
        second = FlatWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in TENSORS.items()}, create=False)
        second.write(name, middle, raw_bytes(tensor.reshape(-1)[middle:]))
        second.close()
        writer.write(name, 0, raw_bytes(tensor.reshape(-1)[:middle]))
    writer.close()
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert path.stat().st_size == writer.size
    with pytest.raises(FileExistsError):
        FlatWriter(path, {})


def test_files_that_are_not_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    data = path.read_bytes()
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}
    wrong = json.dumps(header).encode()
    for content in (b"", data[:5], data[:60], data[:-1], b"\xff" * 64, len(wrong).to_bytes(8, "little") + wrong + bytes(16)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            FlatReader(path)


def test_dtype_names():
    assert all(dtype_from_name(dtype_name(dtype)) is dtype for dtype in DTYPES.values())
    with pytest.raises(ValueError, match="'complex64'"):
        dtype_from_name("complex64")


# --- writing: errors name the file, and leave nothing -------------------------------------------------------------------------


def test_a_full_disk_names_the_file(tmp_path):
    """A limit on the size of files stops writing on an open file, whose errors name none."""
    path = tmp_path / "x.safetensors"
    writer = FlatWriter(path, {"a": (torch.float32, (4096,))})
    with file_size_limit(1024):
        with pytest.raises(OSError, match="File too large") as error:
            writer.write("a", 1024, raw_bytes(torch.ones(8)))
        assert error.value.filename == str(path)
        with pytest.raises(OSError, match="File too large") as error:
            FlatWriter(tmp_path / "y.safetensors", {"a": (torch.float32, (4096,))})
        assert error.value.filename == str(tmp_path / "y.safetensors")
    writer.abandon()


def test_a_small_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path, link, pipe = tmp_path / "a.json", tmp_path / "link.json", tmp_path / "pipe"
    write_durably(path, b"old")
    with file_size_limit(64), pytest.raises(OSError, match="File too large") as error:
        write_durably(path, bytes(100))
    assert error.value.filename == str(tmp_path / ".a.json.writing")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
    link.symlink_to(path)
    write_durably(link, b"new")
    assert link.is_symlink() and path.read_bytes() == b"new"
    os.mkfifo(pipe)  # as a terminal
    reader = os.open(pipe, os.O_RDWR)
    write_durably(pipe, b"read")
    assert os.read(reader, 10) == b"read" and pipe.is_fifo()
    os.close(reader)


def test_what_a_kill_has_left_is_never_written_to(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    os.link(tmp_path / "precious", tmp_path / ".a.json.writing")
    write_durably(tmp_path / "a.json", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious" and sorted(os.listdir(tmp_path)) == ["a.json", "precious"]
