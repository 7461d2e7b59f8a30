"""The journal: one line a step, durable before the step changes a weight, from which the whole run can be made again.

A text file of JSON lines. Line 1 is the header, an object; line t + 1 is the record of step t, an array of HEADER["fields"]:

    [step, loss_plus, loss_minus, projected_grad, lr, skipped, [epoch, micro_batches], checksum]

Floats are written with the fewest digits that give back the same fp64 number; NaN and the infinities as "nan", "inf", "-inf".
lr is a list where parameter groups differ, projected_grad where a step has several directions; projected_grad has at most 22
significant bits, all of which the step uses. The data position (null for a
user's own iterator) is what the step had consumed when it ended: the epoch, and the micro-batches of all ranks within it. Every
line ends with a checksum: the first 8 bytes, in hex, of SHA-256 over the previous line's checksum (none for the header) and the
line up to the comma before its own. So the last checksum stands for the whole file, and a line that is damaged, missing,
repeated or out of order does not fit.

A line without its newline is torn: the process or the machine died while it was written, before the step changed anything. It
is cut off. Anything else that does not fit is damage, an error that names the line.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..distributed.collective import describe
from ..errors import JournalError, shown
from ..files.crash_points import reach
from ..files.locks import LockedFile
from ..files.safetensors_io import sync_directory
from ..files.untrusted import check_shape, parse_json, read_file
from ..kernels.types import FP32_MAX, GRAD_BITS, round_grad
from .schemas import MAX_COUNT, Header

FORMAT = "ds_zoadamu-journal"
FORMAT_VERSION = 1
FIELDS = ("step", "loss_plus", "loss_minus", "projected_grad", "lr", "skipped", "data_position", "checksum")

_MAX_BYTES = 1 << 32  # some 40 million steps
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEADER_LINE = re.compile(rb'(\{.*),"checksum":"([0-9a-f]{16})"\}')
_RECORD_LINE = re.compile(rb'(\[.*),"([0-9a-f]{16})"\]')


@dataclass(frozen=True)
class Record:
    """One step. ``projected_grads``: one a direction; ``lrs``: one a parameter group; ``data_position``: (epoch, micro-batches
    of all ranks within it) or None."""

    step: int
    loss_plus: float
    loss_minus: float
    projected_grads: tuple[float, ...]
    lrs: tuple[float, ...]
    skipped: bool
    data_position: tuple[int, int] | None = None


@dataclass(frozen=True)
class Contents:
    """What a journal holds. ``checksums[t]`` is that of step t, ``checksums[0]`` the header's; ``end``: bytes of the whole
    lines; ``torn``: bytes of an unfinished last line behind them; ``damage``: why reading ended early, or None."""

    header: dict
    records: list[Record]
    checksums: list[str]
    end: int
    torn: int
    damage: JournalError | None = None


# --- lines --------------------------------------------------------------------------------------------------------------------


def _encode(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _decode(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    raise ValueError(f"{name} is {shown(value)}, not a number as a journal writes it")


def _decode_several(name: str, value: Any) -> tuple[float, ...]:
    """Of a number, or of a list of them."""
    return tuple(_decode(name, v) for v in (value if isinstance(value, list) and value else (value,)))


def _checksum(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:16]


def header_line(header: dict) -> tuple[bytes, str]:
    """The first line of a journal with this header, and its checksum."""
    content = {"format": FORMAT, "version": FORMAT_VERSION, "fields": FIELDS, **header}
    body = json.dumps(content, separators=(",", ":"))[:-1].encode()
    checksum = _checksum("", body)
    return body + b',"checksum":"' + checksum.encode() + b'"}\n', checksum


def record_line(record: Record, previous: str) -> tuple[bytes, str]:
    """The line of a record that follows a line with the checksum ``previous``, and its own checksum."""
    values = (
        record.step,
        _encode(record.loss_plus),
        _encode(record.loss_minus),
        _encode(record.projected_grads[0]) if len(record.projected_grads) == 1 else [*map(_encode, record.projected_grads)],
        _encode(record.lrs[0]) if len(set(record.lrs)) == 1 else [*map(_encode, record.lrs)],
        int(record.skipped),
        record.data_position,
    )
    body = json.dumps(values, separators=(",", ":"))[:-1].encode()
    checksum = _checksum(previous, body)
    return body + b',"' + checksum.encode() + b'"]\n', checksum


def _parse_header(line: bytes, where: str) -> tuple[dict, str]:
    match = _HEADER_LINE.fullmatch(line)
    if match is None:
        raise JournalError(f"{where}, line 1: not the header of a journal; the file is damaged or something else")
    body, checksum = match[1], match[2].decode()
    if _checksum("", body) != checksum:
        raise JournalError(f"{where}, line 1: the header's checksum does not fit, so it is damaged; take an undamaged copy")
    try:
        header = parse_json(body + b"}")
        if header.get("format") == FORMAT and header.get("version") == FORMAT_VERSION:
            check_shape(Header, header)
            if header.get("fields") != list(FIELDS):
                raise ValueError(f"fields are {shown(header.get('fields'))}, not {', '.join(FIELDS)}")
            return header, checksum
    except ValueError as e:
        raise JournalError(f"{where}, line 1: not the header of a run: {e}; whoever wrote it, take an undamaged copy") from e
    raise JournalError(
        f"{where}, line 1: format {shown(header.get('format'))} version {shown(header.get('version'))}; this release reads "
        f"{FORMAT!r} version {FORMAT_VERSION}: use the release of ds_zoadamu that wrote it"
    )


def _parse_record(line: bytes, previous: str, step: int, header: dict) -> tuple[Record, str]:
    """Raises ValueError for a line that is not the record of ``step`` after ``previous`` in the run of ``header``."""
    match = _RECORD_LINE.fullmatch(line)
    if match is None:
        raise ValueError("it is not a record")
    body, checksum = match[1], match[2].decode()
    values = parse_json(body + b"]")
    if len(values) != len(FIELDS) - 1:
        raise ValueError("it is not a record")
    number, plus, minus, grad, lr, skipped, position = values
    if type(number) is not int or number != step:
        raise ValueError(f"it is of step {shown(number)}, step {step} is due: records are missing, repeated or out of order")
    if _checksum(previous, body) != checksum:
        raise ValueError("its checksum does not fit")
    if type(skipped) is not int or skipped not in (0, 1):
        raise ValueError(f"skipped is {shown(skipped)}; it must be 0 or 1")
    grads, lrs = _decode_several("projected_grad", grad), _decode_several("lr", lr)
    if not isinstance(lr, list):
        lrs *= len(header["groups"])
    _check_scalars(grads, lrs, bool(skipped), header)
    if position is not None:
        if not isinstance(position, list) or [type(n) is int and 0 <= n <= MAX_COUNT for n in position] != [True, True]:
            raise ValueError(f"data_position is {shown(position)}, not the epoch and the micro-batches within it")
        position = (position[0], position[1])
    return Record(step, _decode("loss_plus", plus), _decode("loss_minus", minus), grads, lrs, bool(skipped), position), checksum


def _check_scalars(grads: tuple[float, ...], lrs: tuple[float, ...], skipped: bool, header: dict) -> None:
    """Raises ValueError for what no step of the header's run can have had."""
    directions, groups = header["options"].get("num_perturbations", 1), len(header["groups"])
    if len(grads) != directions:
        raise ValueError(f"it has {len(grads)} projected gradients, num_perturbations is {shown(directions)}")
    if len(lrs) != groups:
        raise ValueError(f"it has {len(lrs)} learning rates for {groups} parameter groups")
    if not all(map(math.isfinite, lrs)):
        raise ValueError(f"lr is {_shown(lrs)}; it must be finite")
    if not skipped and not all(map(math.isfinite, grads)):
        raise ValueError(f"projected_grad is {_shown(grads)} in a step that is not skipped")
    factors = [1.0, *(abs(g) for g in grads if not skipped), *(group["weight_decay"] for group in header["groups"])]
    if max(map(abs, lrs)) * max(factors) > FP32_MAX:
        raise ValueError(f"lr is {_shown(lrs)}: times {shown(max(factors))} it is more than fp32 holds")
    if any(round_grad(g) != g for g in grads if math.isfinite(g)):
        raise ValueError(
            f"projected_grad is {_shown(grads)}, more than the {GRAD_BITS} significant bits that a step uses: it was changed"
        )


def _shown(values: tuple[float, ...]) -> str:
    return shown(values[0] if len(set(values)) == 1 else values)


def parse_journal(data: bytes, where: str, until: int | None = None) -> Contents:
    """The contents of a journal from its bytes; ``where`` names it in messages, ``until`` is the last step that matters.

    Damage behind the header ends the reading and is handed back in ``Contents.damage``. Raises JournalError where there is no
    whole header.
    """
    if not data:
        raise JournalError(f"{where} is empty, not even the header is there; take a copy, or remove it to start a new run")
    if b"\n" not in data:
        raise JournalError(f"{where}, line 1: the header is not whole; take a copy, or remove the file to start a new run")
    lines = data.split(b"\n")
    tail = lines.pop()
    header, checksum = _parse_header(lines[0], where)
    records: list[Record] = []
    checksums = [checksum]
    end = len(lines[0]) + 1
    for step, line in enumerate(lines[1:], 1):
        if until is not None and step > until:
            return Contents(header, records, checksums, end, 0)
        try:
            record, checksum = _parse_record(line, checksum, step, header)
        except ValueError as e:
            reason = "it is not a record" if isinstance(e, json.JSONDecodeError) else e
            damage = JournalError(
                f"{where}, line {step + 1}: {reason}. The records before it, to step {step - 1}, are whole: take an undamaged "
                f"copy, or rebuild the model up to there with ds_zoadamu replay --until {step - 1}"
            )
            return Contents(header, records, checksums, end, 0, damage)
        records.append(record)
        checksums.append(checksum)
        end += len(line) + 1
    return Contents(header, records, checksums, end, len(tail))


def read_bytes(path: str | Path) -> bytes:
    """A journal's bytes. Raises JournalError naming the file and the reason where it cannot be read."""
    try:
        return read_file(path, _MAX_BYTES)
    except OSError as e:
        raise JournalError(f"journal {describe(e)}") from e


def read_journal(path: str | Path, until: int | None = None) -> Contents:
    """Read and verify a journal up to step ``until`` (its end where None).

    A torn last line is left out and counted in ``Contents.torn``. Raises JournalError for damage, naming the line, and for a
    file that cannot be read.
    """
    contents = parse_journal(read_bytes(path), f"journal {str(path)!r}", until)
    if contents.damage is not None:
        raise contents.damage
    return contents


# --- the writer ---------------------------------------------------------------------------------------------------------------


class Journal:
    """The one writer of a journal; it holds an exclusive lock on the file until it is closed or its process ends.

    Made by ``create`` or ``open``. ``append`` returns once the record is durable (every record with ``fsync_every`` 1).
    """

    def __init__(self, path: Path, file: LockedFile, checksums: list[str], size: int, fsync_every: int):
        self.path = path
        self.checksum = checksums[-1]
        self.last_step = len(checksums) - 1
        self.fsync_every = fsync_every
        self._file = file
        self._checksums = bytearray.fromhex("".join(checksums))
        self._size = size
        self._unsynced = 0

    @classmethod
    def create(cls, path: str | Path, header: dict, fsync_every: int = 1) -> "Journal":
        """A new journal with this header; appears whole or not at all. Raises JournalError where the file exists or cannot be
        made."""
        path = Path(path)
        _check_fsync_every(fsync_every)
        line, checksum = header_line(header)
        _parse_header(line[:-1], f"journal {str(path)!r}")  # no run begins whose journal could not be read
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _new_file(path)
            try:
                _write_all(file.fd, line)
                os.fsync(file.fd)
                _publish(file.path, path)
                sync_directory(path.parent)
            except BaseException:
                file.path.unlink(missing_ok=True)
                file.release()
                raise
        except OSError as e:
            raise JournalError(f"journal {describe(e)}") from e
        return cls(path, file, [checksum], len(line), fsync_every)

    @classmethod
    def open(cls, path: str | Path, fsync_every: int = 1) -> tuple["Journal", Contents]:
        """An existing journal, to go on behind its last whole record; a torn last line is still there: see ``cut_torn_line``.

        Raises JournalError for damage, for a file that another run writes, and for one that cannot be opened.
        """
        path = Path(path)
        _check_fsync_every(fsync_every)
        try:
            file = _locked(path, path, 0)
        except OSError as e:
            raise JournalError(f"journal {describe(e)}") from e
        try:
            contents = read_journal(path)
            _remove_second_name(path)
        except BaseException:
            file.release()
            raise
        return cls(path, file, contents.checksums, contents.end, fsync_every), contents

    def checksum_at(self, step: int) -> str | None:
        """The checksum of a step's record, of the header for step 0; None for a step that is not in the journal."""
        return self._checksums[8 * step : 8 * step + 8].hex() or None

    def cut_torn_line(self) -> None:
        """Cut off what lies behind the last whole record. Raises JournalError."""
        try:
            os.ftruncate(self._file.fd, self._size)
            os.fsync(self._file.fd)
        except OSError as e:
            raise JournalError(f"journal {str(self.path)!r}: the torn last line cannot be cut off: {e.strerror}") from e

    def append(self, record: Record) -> None:
        """Add the record of the next step, durably. Raises JournalError where that fails; the journal then ends before it."""
        if self._file.fd < 0:
            raise JournalError(f"journal {str(self.path)!r} is closed")
        if record.step != self.last_step + 1:
            raise JournalError(
                f"journal {str(self.path)!r} ends at step {self.last_step}; the record of step {record.step} cannot follow"
            )
        if not all(map(math.isfinite, record.lrs)):  # no reader takes such a record
            raise JournalError(
                f"journal {str(self.path)!r}: step {record.step} has the lr {_shown(record.lrs)}, which is not finite; the "
                "step was not taken: mend the lr scheduler"
            )
        line, checksum = record_line(record, self.checksum)
        reach("before_append", record.step)
        try:
            _write_all(self._file.fd, line)
            reach("after_append", record.step)
            self._unsynced += 1
            if self._unsynced >= self.fsync_every:
                self.sync()
        except OSError as e:
            self._withdraw()
            raise JournalError(
                f"journal {str(self.path)!r}: the record of step {record.step} cannot be written: {e.strerror}. The step was "
                "not taken; every step before it is in the journal: make room and resume"
            ) from e
        reach("after_fsync", record.step)
        self.checksum, self.last_step = checksum, record.step
        self._checksums += bytes.fromhex(checksum)
        self._size += len(line)

    def sync(self) -> None:
        """Make every record durable now. Raises OSError."""
        if self._file.fd >= 0 and self._unsynced:
            os.fdatasync(self._file.fd)  # the new length of the file is part of it
            self._unsynced = 0

    def close(self) -> None:
        """Make every record durable, and give up the lock."""
        try:
            self.sync()
        finally:
            self._file.release()

    def _withdraw(self) -> None:
        # The record stands for a step that will not be taken. Should this fail too, no harm is done: a whole record left behind
        # is the right one for the step, and a part of one is a torn line.
        try:
            os.ftruncate(self._file.fd, self._size)
            os.fdatasync(self._file.fd)
        except OSError:
            pass
        self._file.release()


def _check_fsync_every(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise JournalError(
            f"journal_fsync_every is {value!r}; it must be an integer >= 1: the journal is made durable every so many steps"
        )


def _locked(file: Path, path: Path, flags: int) -> LockedFile:
    """``file`` of the journal ``path``. Raises OSError, or JournalError where another run has it."""
    try:
        locked = LockedFile(file, os.O_APPEND | flags)
        if locked.is_at_its_place():
            return locked
    except (BlockingIOError, FileExistsError):
        pass
    raise JournalError(f"journal {str(path)!r} is being written by another run; wait until that has ended, or stop it")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.creating")


def _new_file(path: Path) -> LockedFile:
    """An empty file beside the place of a new journal. What a kill has left there is removed and never written to: it may be
    the second name of a finished journal, see ``_publish``."""
    temporary = _temporary(path)
    with contextlib.suppress(FileNotFoundError):
        left = _locked(temporary, path, 0) if temporary.lstat().st_nlink == 1 else None  # another run may just be making it
        temporary.unlink()
        if left is not None:
            left.release()
    return _locked(temporary, path, os.O_CREAT | os.O_EXCL)


def _remove_second_name(path: Path) -> None:
    """After a kill in ``_publish``."""
    with contextlib.suppress(OSError):  # it does no harm
        if _temporary(path).samefile(path):
            _temporary(path).unlink()


def _write_all(fd: int, data: bytes) -> None:
    view: Iterable[int] = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _publish(temporary: Path, path: Path) -> None:
    """Give the finished file its name without ever replacing one. Raises OSError, JournalError where the name is taken."""
    try:
        os.link(temporary, path)
    except OSError as e:
        if os.path.lexists(path):
            raise JournalError(
                f"journal {str(path)!r} exists: another run has written it. Resume that run, or give this one another place"
            ) from e
        os.rename(temporary, path)  # a file system without hard links
        return
    reach("journal_linked", 0)
    temporary.unlink(missing_ok=True)
