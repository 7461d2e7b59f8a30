"""Rows of a task's split: from local JSON-lines, CSV or text files, or from the Hugging Face hub."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds_zoadamu.tasks.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What Python's "surrogateescape" makes of a byte that is not UTF-8."""


def read_rows(task, split: str, data_dir: str | None) -> Iterator[tuple[str, dict]]:
    """Yields (where, row) for the task's "train" or "validation" split; `where` names the file and line for messages.

    `task` is a `FileTask`, or has its `name`, `train_file`, `validation_file`, `hub_path`, `hub_name` and `hub_revision`.

    Local files are read here rather than through `datasets`, whose errors do not say which line is at fault.

    Raises:
        InputError: no such file, directory or data set, or a malformed line.
    """
    if data_dir is not None:
        yield from _read_file(find_file(task, split, data_dir))
    elif task.hub_path is not None:
        yield from _read_hub(task, split)
    else:
        raise InputError(f"task {task.name!r} is not on the hub: give the folder of its files with --data_dir")


def find_file(task, split: str, data_dir: str) -> Path:
    """The local file of a split.

    Raises:
        InputError: the folder or the file is missing; the message says which names were looked for.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    name = task.train_file if split == "train" else task.validation_file
    # What the hub calls a split may have the plain name in a folder of one's own.
    stems = dict.fromkeys((name, split) if task.hub_path else (name,))
    names = [name] if Path(name).suffix in SUFFIXES else [stem + suffix for stem in stems for suffix in SUFFIXES]
    candidates = [folder / each for each in names]
    for path in candidates:
        if os.path.isfile(path):  # False also for a name that no file can have
            return path
    raise InputError(f"the {split} split is missing: looked for {', '.join(str(path) for path in candidates)}")


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    reader = {".csv": _read_csv, ".txt": _read_text}.get(path.suffix, _read_json_lines)
    try:
        # What is not UTF-8 is decoded too, so that the line it stands in is known.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from reader(path, _utf8_lines(path, file))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _utf8_lines(path: Path, file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if escaped := _ESCAPED_BYTE.search(line):
            byte = ord(escaped[0]) - 0xDC00
            raise InputError(f"{path}:{number}: not UTF-8: byte 0x{byte:02x} at character {escaped.start()}; save it as UTF-8")
        yield line


def _read_json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError alone: a number of more digits than Python reads
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise InputError(f"{path}:{number}: not JSON ({reason}); each line holds one JSON object") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a JSON object is needed, got {type(row).__name__}")
        yield f"{path}:{number}", row


def _read_text(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    """Each line that is not empty is a row with the column `text`."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", {"text": line}


def _read_csv(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for name in (names := list(reader.fieldnames or ())):
            if names.count(name) > 1:
                raise InputError(f"{path}:{reader.line_num}: the column {name!r} stands there twice; rename or remove one")
        for row in reader:
            # DictReader files surplus fields under None and fills missing ones with None.
            if None in row or None in row.values():
                raise InputError(f"{path}:{reader.line_num}: {len(reader.fieldnames)} fields expected as in the first line")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        # The DictReader counts a line when it is whole.
        raise InputError(f"{path}:{reader.reader.line_num}: malformed CSV: {error}") from error


def _read_hub(task, split: str) -> Iterator[tuple[str, dict]]:
    import datasets

    name = task.train_file if split == "train" else task.validation_file
    source = "/".join(part for part in (task.hub_path, task.hub_name) if part)
    try:
        table = datasets.load_dataset(task.hub_path, task.hub_name, split=name, revision=task.hub_revision)
    # The hub client has many kinds of errors (network, missing name, missing split): all mean that there is no data.
    except Exception as error:
        raise InputError(
            f"cannot load {source} (split {name}) from the hub: {error}. "
            "Without a network give a folder with train.jsonl and validation.jsonl as --data_dir"
        ) from error
    for index, row in enumerate(table):
        yield f"{source} {name}[{index}]", row
