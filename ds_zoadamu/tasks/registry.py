"""The tasks by name, and task files. The package's own tasks are files too, in `data/`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ds_zoadamu.errors import shown, unknown_keys_message
from ds_zoadamu.files.untrusted import parse_json, read_file
from ds_zoadamu.files.yaml_files import parse_yaml
from ds_zoadamu.tasks.choice_task import ChoiceTask
from ds_zoadamu.tasks.errors import InputError
from ds_zoadamu.tasks.file_task import MAX_BYTES, FileTask
from ds_zoadamu.tasks.generation_task import GenerationTask
from ds_zoadamu.tasks.language_task import ChatTask, TextTask
from ds_zoadamu.tasks.prompt_task import PromptTask
from ds_zoadamu.tasks.protocol import TaskData

KINDS: dict[str, type[FileTask]] = {kind.kind: kind for kind in (PromptTask, ChoiceTask, GenerationTask, TextTask, ChatTask)}
"""What `kind` of a task file may be; without it the first."""
SUFFIXES = (".json", ".yaml", ".yml")
_DATA = Path(__file__).parent / "data"
_BUILT_IN = (
    "sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop", "sst5", "snli", "mnli", "trec",
    "text", "chat",
)  # fmt: skip


def load_task(name_or_path: str) -> TaskData:
    """A built-in task by its name, or a task file.

    Raises:
        InputError: no such task or file, not JSON or YAML, an unknown or missing key, as the kind of task.
    """
    if name_or_path in TASKS:
        return TASKS[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"unknown task {name_or_path!r}; known: {', '.join(TASKS)}, or the path of a .json task file (or .yaml, .yml)"
        )
    return read_task(path)


def read_task(path: Path) -> FileTask:
    """The task of a file; its name is the file's, unless the file has one.

    Raises:
        InputError: as `load_task`.
    """
    section = _parsed(path)
    if not isinstance(section, dict):
        raise InputError(f"{path}: a task file is one JSON object, got {type(section).__name__}")
    name = section.pop("kind", PromptTask.kind)
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(f"{path}: kind is {shown(name)}; known: {', '.join(KINDS)}")
    kind = KINDS[name]
    keys = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := set(section) - set(keys):
        raise InputError(unknown_keys_message(str(path), unknown, ["kind", *keys]))
    nothing = dataclasses.MISSING
    for key, field in keys.items():
        if key not in ("name", *section) and field.default is nothing and field.default_factory is nothing:
            raise InputError(f"{path}: the key {key!r} is missing")
    try:
        return kind(**{"name": path.stem, **section})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _parsed(path: Path) -> Any:
    kind, parse = ("JSON", parse_json) if path.suffix == ".json" else ("YAML", parse_yaml)
    try:
        return parse(read_file(path, MAX_BYTES))
    except OSError as error:
        raise InputError(f"cannot read the task file {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise InputError(f"{path}: not {kind}: {error}") from error


TASKS: dict[str, TaskData] = {name: read_task(_DATA / f"{name}.json") for name in _BUILT_IN}
"""The tasks that --task knows by name; a module of --import may add its own."""
SST2 = TASKS["sst2"]
