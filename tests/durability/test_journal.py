"""The journal's format: exact floats, small records, a chain that shows every kind of damage, one writer, and failures that
leave no trace."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys

import pytest

from ds_zoadamu.durability.journal import Journal, Record, parse_journal, read_journal, record_line
from ds_zoadamu.errors import JournalError
from ds_zoadamu.files.crash_points import VARIABLE
from ds_zoadamu.files.locks import LockedFile
from ds_zoadamu.kernels.types import fp32, round_grad

HEADER = {
    "noise_version": 1, "optimizer": "MeZO", "options": {"seed": 3, "lr": 1e-3}, "groups": [{"weight_decay": 0.0}],
    "micro_batch_size": 2, "micro_batches_a_step": 4, "data": None, "parameters": [], "tied": {}, "untrained": [],
    "base": {"name": None, "revision": None, "sha256": None, "files": None, "note": "the model was not loaded from files"},
}  # fmt: skip


def record(step: int, **changes) -> Record:
    values = {
        "step": step,
        "loss_plus": 2.0 + 0.1 * step,
        "loss_minus": 2.0 / 3.0 * step,
        "projected_grads": (round_grad(-0.1 / step),),
        "lrs": (1e-6 / 3.0,),
        "skipped": False,
        "data_position": (step // 4, step % 4 * 8),
    }
    return Record(**values | changes)


def written(path, steps: int = 5, header=HEADER, **changes):
    journal = Journal.create(path, header)
    for step in range(1, steps + 1):
        journal.append(record(step, **changes))
    journal.close()
    return path


def test_round_trip(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    contents = read_journal(path)
    assert contents.records == [record(step) for step in range(1, 6)]
    assert contents.header["options"] == {"seed": 3, "lr": 1e-3}
    assert contents.torn == 0
    assert len(contents.checksums) == 6
    assert all(isinstance(json.loads(line), (list, dict)) for line in path.read_text().splitlines())


@pytest.mark.parametrize("value", [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.nan, math.inf, -math.inf, 1 / 3])
def test_floats_survive_exactly(tmp_path, value):
    grad = round_grad(value)
    path = written(tmp_path / "journal.jsonl", 1, loss_plus=value, loss_minus=-value, projected_grads=(grad,), skipped=True)
    [back] = read_journal(path).records
    for mine, expected in ((back.loss_plus, value), (back.loss_minus, -value), (*back.projected_grads, grad)):
        assert math.isnan(mine) if math.isnan(expected) else struct.pack("<d", mine) == struct.pack("<d", expected)


def test_several_rates_and_directions(tmp_path):
    header = HEADER | {"options": {"num_perturbations": 3}, "groups": [{"weight_decay": 0.0}, {"weight_decay": 0.1}]}
    values = {"lrs": (1e-3, 2e-4), "projected_grads": (0.5, -1.5, math.nan), "skipped": True, "data_position": None}
    path = written(tmp_path / "journal.jsonl", 1, header, **values)
    [back] = read_journal(path).records
    assert back.lrs == (1e-3, 2e-4) and back.projected_grads[:2] == (0.5, -1.5) and back.data_position is None


@pytest.mark.parametrize("grad", [0.1, -1.0, 3.0e-39, 1.0 - 2.0**-53, 12345.678])
def test_a_gradient_is_what_the_step_uses_to_its_last_bit(tmp_path, grad):
    """Neighbours among the 22-bit numbers stay apart when lr * g is rounded to fp32; other numbers are not taken."""
    rounded = round_grad(grad)
    assert rounded == round_grad(rounded) and abs(rounded - grad) <= abs(grad) * 2.0**-22
    spacing = math.ldexp(1.0, math.frexp(rounded)[1] - 22)
    for lr in (1.0, 1e-6, 2e-4 / 3.0, 0.1):
        if abs(lr * grad) > 2.0**-126:  # below, fp32 has fewer bits
            assert len({fp32(lr * (rounded + k * spacing)) for k in (-1, 0, 1)}) == 3
    path = written(tmp_path / "journal.jsonl", 2, projected_grads=(math.nextafter(rounded, math.inf),))
    with pytest.raises(JournalError, match="line 2: projected_grad is .* more than the 22 significant bits"):
        read_journal(path)


def test_a_gradient_that_fp32_cannot_hold_is_infinite():
    assert [round_grad(v) for v in (1e39, -math.inf)] == [math.inf, -math.inf] and math.isnan(round_grad(math.nan))


def test_records_are_small(tmp_path):
    """Losses and lr with all 17 digits, a gradient with all 22 bits, a step of 6 digits, a position of 8: at most 150 bytes."""
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, HEADER)
    journal.last_step = 199_998
    long = record(
        199_999, loss_plus=-12.345678901234567, loss_minus=-12.345678901234569, lrs=(1.2345678901234567e-06,),
        projected_grads=(round_grad(-0.0012345678901234567),), data_position=(123, 1_234_567),
    )  # fmt: skip
    journal.append(long)
    journal.close()
    assert len(path.read_bytes().splitlines(keepends=True)[1]) <= 150


def test_every_flipped_bit_is_found(tmp_path):
    """Any bit of any byte; only in the last newline does it look like a torn line, which loses no step that was taken."""
    data = written(tmp_path / "journal.jsonl", 3).read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    for position in range(len(data)):
        line = sum(end < position for end in ends) + 1
        for bit in range(8):
            broken = data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]
            if position == ends[-1]:
                assert parse_journal(broken, "J").torn
            elif line == 1:
                with pytest.raises(JournalError, match="line 1"):
                    raise parse_journal(broken, "J").damage
            else:
                assert f"line {line}:" in str(parse_journal(broken, "J").damage)


@pytest.mark.parametrize(
    ("order", "line"),
    [([0, 1, 3, 4, 5], 3), ([0, 1, 2, 2, 3, 4, 5], 4), ([0, 1, 3, 2, 4, 5], 3), ([0, 2, 3, 4, 5], 2)],
    ids=["missing", "repeated", "reordered", "first missing"],
)
def test_missing_repeated_and_reordered_records(tmp_path, order, line):
    path = written(tmp_path / "journal.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(
        JournalError, match=rf"line {line}: it is of step \d, step {line - 1} is due: records are missing, repeated"
    ):
        read_journal(path)
    assert len(read_journal(path, until=line - 2).records) == line - 2


def test_records_of_another_run_do_not_fit(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    other = tmp_path / "other.jsonl"
    journal = Journal.create(other, HEADER | {"options": {"seed": 4, "lr": 1e-3}})
    journal.close()
    other.write_bytes(other.read_bytes() + b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(JournalError, match="line 2: its checksum does not fit"):
        read_journal(other)


def test_a_torn_last_line_is_reported_and_cut_off(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        contents = read_journal(path)
        assert (len(contents.records), contents.torn, contents.end) == (4, end - last, last)
    journal, contents = Journal.open(path)
    assert contents.torn and path.read_bytes() != whole[:last]
    journal.cut_torn_line()
    assert path.read_bytes() == whole[:last]
    journal.append(record(5))
    journal.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"format":', "the header is not whole"),
        (b"[1,2]\n", "line 1: not the header"),
        (b"\x80\x04\x95pickle\n", "line 1: not the header"),
    ],
    ids=["empty", "torn header", "no header", "binary"],
)
def test_files_that_are_no_journal(tmp_path, content, message):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    for read in (read_journal, Journal.open):
        with pytest.raises(JournalError, match=message):
            read(path)
    assert path.read_bytes() == content


def test_another_format_version(tmp_path):
    path = written(tmp_path / "journal.jsonl", 0)
    from ds_zoadamu.durability import journal

    body = path.read_bytes().rpartition(b',"checksum"')[0].replace(b'"version":1', b'"version":2')
    path.write_bytes(body + b',"checksum":"' + journal._checksum("", body).encode() + b'"}\n')
    with pytest.raises(JournalError, match="version 2; this release reads"):
        read_journal(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(JournalError, match="No such file"):
        read_journal(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="file"):
        Journal.create(tmp_path / "file" / "journal.jsonl", HEADER)


def test_an_existing_journal_is_never_replaced(tmp_path):
    path = written(tmp_path / "journal.jsonl")
    before = path.read_bytes()
    with pytest.raises(JournalError, match="exists: another run has written it"):
        Journal.create(path, HEADER)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["journal.jsonl"]


def test_two_runs_cannot_write_to_one_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, HEADER)
    journal.append(record(1))
    code = "import sys; from ds_zoadamu.durability.journal import Journal; Journal.open(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert other.returncode == 1 and "is being written by another run" in other.stderr
    with pytest.raises(JournalError, match="is being written by another run"):
        Journal.open(path)
    journal.close()
    Journal.open(path)[0].close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """As a data loader's worker does when its trainer is killed: it lives on for a while."""
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(path, HEADER)
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    try:
        journal._file.close()  # as a kill does: without unlocking
        again, contents = Journal.open(path)
        assert contents.records == [] and again.last_step == 0
        again.close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


# --- a kill between the two acts that give a journal its name -----------------------------------------------------------------


def killed_while_creating(path):
    """Leaves the journal under its own name and under that of the unfinished one."""
    child = os.fork()
    if child == 0:
        os.environ[VARIABLE] = "journal_linked:0"
        Journal.create(path, HEADER)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    second = path.with_name(f".{path.name}.creating")
    assert second.samefile(path)
    return second


def test_a_killed_creation_never_harms_a_finished_journal(tmp_path):
    path, moved = tmp_path / "journal.jsonl", tmp_path / "finished.jsonl"
    second = killed_while_creating(path)
    with pytest.raises(JournalError, match="exists: another run has written it"):
        Journal.create(path, HEADER)
    assert len(read_journal(path).checksums) == 1
    second.unlink(missing_ok=True)
    path.unlink()

    second = killed_while_creating(path)
    path.rename(moved)  # resumed under another name, or put away, and a new run in its place
    with open(moved, "ab") as file:
        file.write(record_line(record(1), read_journal(moved).checksums[0])[0])
    before = moved.read_bytes()
    live, _ = Journal.open(moved)  # and it may be written to just now
    Journal.create(path, HEADER).close()
    live.append(record(2))
    live.close()
    assert moved.read_bytes().startswith(before) and len(read_journal(moved).records) == 2
    assert len(read_journal(path).records) == 0 and not second.exists()


def test_a_resume_removes_what_a_killed_creation_left(tmp_path):
    path = tmp_path / "journal.jsonl"
    second = killed_while_creating(path)
    journal, _ = Journal.open(path)
    assert not second.exists()
    journal.append(record(1))
    journal.close()
    assert read_journal(path).records == [record(1)]


def test_an_unfinished_creation_is_thrown_away_and_one_under_way_is_left_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    left = path.with_name(f".{path.name}.creating")
    left.write_bytes(b'{"format":')
    lock = LockedFile(left, 0)
    with pytest.raises(JournalError, match="is being written by another run"):
        Journal.create(path, HEADER)
    assert left.read_bytes() == b'{"format":'
    lock.release()
    Journal.create(path, HEADER).close()
    assert os.listdir(tmp_path) == ["journal.jsonl"] and read_journal(path).records == []


def test_the_checksum_at_every_step(tmp_path):
    path = written(tmp_path / "journal.jsonl", 2)
    journal, _ = Journal.open(path)
    journal.append(record(3))
    assert [journal.checksum_at(step) for step in range(5)] == [*read_journal(path).checksums, None]
    journal.close()


def test_steps_follow_each_other(tmp_path):
    journal = Journal.create(tmp_path / "journal.jsonl", HEADER)
    journal.append(record(1))
    with pytest.raises(JournalError, match="ends at step 1; the record of step 3 cannot follow"):
        journal.append(record(3))
    journal.close()
    with pytest.raises(JournalError, match="is closed"):
        journal.append(record(2))


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_fsync_every_is_checked(tmp_path, value):
    with pytest.raises(JournalError, match="journal_fsync_every is .*>= 1"):
        Journal.create(tmp_path / "journal.jsonl", HEADER, value)
    assert not os.listdir(tmp_path)


def test_fsync_every_counts_records(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path / "journal.jsonl", HEADER, 3)
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    counts = []
    for step in range(1, 8):
        journal.append(record(step))
        counts.append(len(calls))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    journal.close()
    assert len(calls) == 3


def test_a_failed_append_leaves_the_journal_as_it_was(tmp_path):
    """A file size limit stops the write in the middle of a record, as a full disk does."""
    path = written(tmp_path / "journal.jsonl", 2)
    before = path.read_bytes()
    journal, _ = Journal.open(path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
        with pytest.raises(JournalError, match=r"step 3 cannot be written: File too large. The step was not taken"):
            journal.append(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    journal, contents = Journal.open(path)
    journal.append(record(3))
    journal.close()
    assert len(read_journal(path).records) == 3


def test_a_failed_fsync_is_an_error(tmp_path, monkeypatch):
    path = written(tmp_path / "journal.jsonl", 1)
    before = path.read_bytes()
    journal, _ = Journal.open(path)

    def fail(fd):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr(os, "fdatasync", fail)
        with pytest.raises(JournalError, match="step 2 cannot be written: Input/output error"):
            journal.append(record(2))
    assert path.read_bytes() == before
