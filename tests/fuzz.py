"""Files that a stranger has made: a reader takes one, or refuses it by its own error, in one line that names the file.

    python -m tests.fuzz --cases 10000 --seed 0      all four readers, that many files each; prints the counts of outcomes

Half of the files are damaged in their bytes; in the others the content is changed and all checksums are made right again, by
code of this file's own. The same seed gives the same files.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch

from ds_zoadamu.durability import checkpoint
from ds_zoadamu.durability import checkpoint_store as store
from ds_zoadamu.durability.base_model import base_identity
from ds_zoadamu.durability.digest import tensor_sha256
from ds_zoadamu.durability.journal import Journal, Record, parse_journal, read_bytes
from ds_zoadamu.durability.journal_report import summary
from ds_zoadamu.durability.replay import replay
from ds_zoadamu.errors import CheckpointError, JournalError, ReplayError
from ds_zoadamu.files.safetensors_io import FlatReader, FlatWriter, raw_bytes
from ds_zoadamu.files.typed_json import encode
from ds_zoadamu.kernels.types import round_grad
from ds_zoadamu.rules import RULES
from ds_zoadamu.rules.zo_adamu import MOMENTUM_DTYPES
from ds_zoadamu.tasks import InputError, load_task
from tests.helpers.damage import change, damage_bytes, to_text


@dataclasses.dataclass
class Reader:
    """``write(rng)``: puts one damaged file in its place; ``read()``: all that is done with it; ``errors``: how it may end."""

    write: Callable[[random.Random], None]
    read: Callable[[], None]
    errors: tuple[type[Exception], ...]


TENSORS = {
    "embed.weight": torch.arange(35, dtype=torch.float32).reshape(5, 7) / 64,
    "out.bias": torch.arange(6).to(torch.bfloat16) / 8,
    "scale": torch.tensor(2.5),
    "buffer": torch.tensor([3, 4]),
}


def _header(base: Path) -> dict[str, Any]:
    """Of a journal of a run on ``base``."""
    trained = [name for name, tensor in TENSORS.items() if tensor.is_floating_point()]
    given = {"lr": 1e-3, "total_steps": 12, "num_perturbations": 2, "momentum": {"window_tolerance": 0.05, "max_window": 200}}
    return {
        "noise_version": 1,
        "optimizer": "ZOAdaMU",
        "options": dataclasses.asdict(RULES["ZOAdaMU"].config_class.parse(given)),
        "groups": [{"weight_decay": 0.0}, {"weight_decay": 0.1}],
        "micro_batch_size": 2,
        "micro_batches_a_step": 4,
        "data": {"num_examples": 24, "seed": 0},
        "parameters": [
            {
                "name": name,
                "shape": list(TENSORS[name].shape),
                "dtype": str(TENSORS[name].dtype).removeprefix("torch."),
                "group": index % 2,
                "sha256": tensor_sha256(TENSORS[name]),
            }
            for index, name in enumerate(trained)
        ],
        "tied": {"embed.weight": ["head.weight"]},
        "untrained": [["buffer", "int64"]],
        "base": base_identity(None, base),
    }


def journal_reader(folder: Path) -> Reader:
    """A run of six steps of ZO-AdaMU on a base in two files; read, printed and replayed."""
    base, path, output = folder / "base", folder / "journal.jsonl", folder / "output"
    base.mkdir()
    weight_map = {name: f"model-0000{1 + (name > 'c')}-of-00002.safetensors" for name in TENSORS}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({n: t for n, t in TENSORS.items() if weight_map[n] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "opt"}')
    journal = Journal.create(path, _header(base))
    for step in range(1, 7):
        grads, lrs = (round_grad(0.1 * step), float("nan") if step == 3 else round_grad(-0.7 / step)), (1e-3 / step, 2e-3)
        journal.append(Record(step, 2.0 + 0.1 * step, 2.1, grads, lrs, step == 3, (0, 4 * step)))
    journal.close()
    whole = path.read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    del lines[0]["checksum"]

    def chained(changed: list[Any]) -> bytes:
        data, previous = b"", ""
        for number, line in enumerate(changed):
            body = (to_text(line[:-1] if number and isinstance(line, list) else line)[:-1]).encode()
            previous = hashlib.sha256(previous.encode() + body).hexdigest()[:16]
            data += body + (b',"' if number else b',"checksum":"') + previous.encode() + (b'"]\n' if number else b'"}\n')
        return data

    def write(rng: random.Random) -> None:
        if rng.random() < 0.5:
            path.write_bytes(damage_bytes(rng, whole))
            return
        changed, number = copy.deepcopy(lines), rng.choice((0, 0, rng.randrange(len(lines))))
        changed[0]["options"]["momentum"]["dtype"] = rng.choice(MOMENTUM_DTYPES)
        if rng.random() < 0.1:
            changed[number:] = rng.choice((changed[number + 1 :], [changed[number], *changed[number:]], changed[number:][::-1]))
        else:
            changed[number] = change(rng, changed[number])
        path.write_bytes(chained(changed))

    def read() -> None:
        data = read_bytes(path)
        contents = parse_journal(data, f"journal {str(path)!r}")
        if any("\n" in line or not line.isprintable() for line in summary(contents, data)):
            raise AssertionError("the summary has a line that is none")
        shutil.rmtree(output, ignore_errors=True)
        try:
            replay(base, path, output, show_progress=False)
        except (JournalError, ReplayError):
            assert sorted(p.name for p in folder.iterdir()) == ["base", "journal.jsonl"], "a refused replay left something"
            raise
        assert sorted(p.suffix for p in output.iterdir())[-2:] == [".safetensors"] * 2

    return Reader(write, read, (JournalError, ReplayError))


def _manifest(entries: list[dict], numels: dict[str, int]) -> dict[str, Any]:
    """Of a checkpoint with these entries of files."""
    identity = {
        "noise_version": 1,
        "optimizer": "MeZO",
        "options": dataclasses.asdict(RULES["MeZO"].config_class.parse({"lr": 1e-3})),
        "groups": [{"weight_decay": 0.0}],
        "micro_batch_size": 2,
        "micro_batches_a_step": 4,
        "data": None,
        "parameters": [{"name": n, "shape": [count], "dtype": "float32", "group": 0} for n, count in numels.items()],
    }
    return {
        "step": 4,
        "identity": identity,
        "world_size": 2,
        "counters": {"global_steps": 4, "global_samples": 32, "skipped_steps": 0},
        "skipped_in_a_row": 0,
        "lrs": [1e-3],
        "lr_scheduler": {"type": "WarmupLR", "state": {"last_batch_iteration": 3}},
        "data_position": [0, 16],
        "client_state": encode({"best": float("inf"), 3: (1, {2}), "counts": Counter(a=1), "rng": torch.arange(4)}, "it"),
        "journal_checksum": "0" * 16,
        "files": entries,
        "data_state": None,
    }


def _rank_files(path: Path) -> list[dict[str, Any]]:
    """Of a checkpoint of two ranks; returns their entries in the manifest."""
    entries = []
    for rank, ranges in enumerate(({"a": [0, 7], "b": [0, 2]}, {"a": [7, 13]})):
        name = f"rank-0000{rank}-of-00002.safetensors"
        specs = {f"{k}/{n}": (d, (hi - lo,)) for n, (lo, hi) in ranges.items() for k, d in KINDS.items()}
        writer = FlatWriter(path / name, specs)
        for key, (dtype, (count,)) in specs.items():
            writer.write(key, 0, raw_bytes(torch.arange(count).to(dtype)))
        writer.close()
        data = (path / name).read_bytes()
        entries.append({"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "ranges": ranges})
    return entries


def checkpoint_reader(folder: Path) -> Reader:
    """A checkpoint of two ranks; found, verified, and read by one rank that needs all of it."""
    path, numels = folder / "global_step4", {"a": 13, "b": 2}
    path.mkdir()
    (folder / "latest").write_text("global_step4\n")
    entries = _rank_files(path)
    manifest = _manifest(entries, numels)
    identity = manifest["identity"]
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    whole[store.MANIFEST] = store.encode_manifest(manifest)
    plain = {"format": store.FORMAT, "version": store.FORMAT_VERSION, **manifest}

    def write(rng: random.Random) -> None:
        files, changed = dict(whole), plain
        kind = rng.random()
        if kind < 0.5:
            name = rng.choice((store.MANIFEST, *files))
            files[name] = damage_bytes(rng, files[name])
        elif kind < 0.8:
            changed = change(rng, plain)
        else:
            number = rng.randrange(2)
            name = entries[number]["file"]
            files[name] = changed_safetensors(rng, files[name])
            right = {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            changed = plain | {"files": [e | right if e["file"] == name else e for e in entries]}
        if changed is not plain:
            body = to_text(changed, (", ", ": "))[:-1].encode()
            sha = hashlib.sha256(body).hexdigest().encode()
            files[store.MANIFEST] = body + b', "sha256": "' + sha + b'"}\n'
        for name, data in files.items():
            (path / name).write_bytes(data)

    (path / store.MANIFEST).write_bytes(whole[store.MANIFEST])
    partitions = [SimpleNamespace(name=n, start=0, stop=count, length=count) for n, count in numels.items()]
    engine = SimpleNamespace(optimizer=SimpleNamespace(stored_dtypes=lambda partition: KINDS))

    def read() -> None:
        found = store.find(folder, store.latest_tag(folder))
        if differing := checkpoint.differences(identity, found.manifest["identity"], ignore=checkpoint.BATCH):
            raise CheckpointError(f"{found.path}: {checkpoint.phrase(differing)}")
        checkpoint.client_state_of(found), checkpoint.scheduler_state_of(found)
        for entry in found.manifest["files"]:
            store.check_file(found.path, entry)
        readers: dict[str, FlatReader] = {}
        try:
            for partition in partitions:
                stored = {kind: torch.empty(partition.length, dtype=dtype) for kind, dtype in KINDS.items()}
                for piece in checkpoint._pieces(engine, partition, found, readers, False):
                    checkpoint._read(piece, stored[piece.kind])
            if found.manifest["data_position"] is not None:
                checkpoint._position_here(HERE, found.manifest)
        finally:
            for reader in readers.values():
                reader.close()

    return Reader(write, read, (CheckpointError,))


KINDS = {"weight": torch.float32, "momentum": torch.int8}
HERE = SimpleNamespace(gradient_accumulation_steps=lambda: 4, train_micro_batch_size_per_gpu=lambda: 2)


def changed_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A file of this format with another header, or other data behind it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.8:
        header = change(rng, header)
    text = to_text(header).encode() + b" " * rng.randrange(9)
    if rng.random() < 0.2:
        body = rng.choice((body[: rng.randint(0, len(body))], body + bytes(rng.randint(1, 9)), b""))
    lengths = (len(text),) * 9 + (rng.choice((0, 1, len(text) + 1, len(text) - 1, len(data), 2**31, 2**63, 2**64 - 1)),)
    return rng.choice(lengths).to_bytes(8, "little") + text + body


def safetensors_reader(folder: Path) -> Reader:
    """A file of weights; what is taken, the safetensors library must take too, as the same bytes."""
    path = folder / "model.safetensors"
    whole = safetensors.torch.save(TENSORS, metadata={"format": "pt"})

    def write(rng: random.Random) -> None:
        path.write_bytes((damage_bytes if rng.random() < 0.5 else changed_safetensors)(rng, whole))

    def read() -> None:
        reader = FlatReader(path, ReplayError)
        try:
            found = {name: reader.read(name, 0, info.numel) for name, info in reader.tensors.items()}
        finally:
            reader.close()
        data = path.read_bytes()
        if b"-0" in data:  # a number that Python takes for the integer 0, the library for a float
            return
        theirs = safetensors.torch.load(data)
        assert theirs.keys() == found.keys()
        for name, tensor in found.items():
            assert reader.tensors[name].shape == tuple(theirs[name].shape) and tensor.dtype == theirs[name].dtype
            assert bytes(raw_bytes(tensor)) == bytes(raw_bytes(theirs[name]))

    return Reader(write, read, (ReplayError,))


def task_reader(folder: Path) -> Reader:
    """A task file of any kind, as JSON or YAML, and prompts made by it."""
    paths = [folder / "topic.json", folder / "topic.yaml"]
    common = {
        "name": "topic",
        "template": "{a}: {b} Topic:",
        "train_file": "train",
        "validation_file": "held_out.jsonl",
        "hub_path": None,
        "hub_name": None,
        "num_dev": 3,
        "fields": {
            "b": {"column": "c.d", "transforms": ["lower", {"replace": ["won", "lost"]}, {"map": {"they lost.": "no"}}]}
        },
    }
    words = {"label_words": {"0": " sports", "1": " science"}, "label_column": "label", "score": "sum"}
    tasks = [
        common | words | {"metric": ["accuracy", "f1"]},
        common | {"kind": "multiple_choice", "options": [" {a}", " {b}"], "objective": "accuracy"},
        common | {"kind": "multiple_choice", "options": [" {option}"], "options_column": "all", "answers_column": "right"},
        common | {"kind": "generation", "answer": " {answer}.", "answers_column": "right", "max_new_tokens": 7},
        common | {"kind": "text", "metric": "loss"},
        {"kind": "chat", "messages_column": "messages"},
    ]
    messages = [{"role": "assistant", "content": "yes"}]
    row = {"a": "Cup", "c": {"d": "They won."}, "label": 1, "all": ["x", "y"], "right": ["y"], "messages": messages}
    for name in ("train.jsonl", "held_out.jsonl", "validation.jsonl"):
        (folder / name).write_text(json.dumps(row) + "\n")

    def write(rng: random.Random) -> None:
        task, path = rng.choice(tasks), rng.choice(paths)
        for other in paths:
            other.unlink(missing_ok=True)
        whole = json.dumps(task, indent=1).encode()
        path.write_bytes(damage_bytes(rng, whole) if rng.random() < 0.5 else to_text(change(rng, task)).encode())

    def read() -> None:
        task = load_task(str(next(path for path in paths if path.exists())))
        for split in ("train", "validation"):
            task.rows(split, str(folder))

    return Reader(write, read, (InputError,))


READERS = {"journal": journal_reader, "checkpoint": checkpoint_reader, "safetensors": safetensors_reader, "task": task_reader}


def fuzz(name: str, cases: int, seed: int, folder: Path) -> Counter:
    """How many files of a reader were taken, and refused by which error. Raises AssertionError, naming the case, for one that
    ended in another way."""
    outcomes: Counter = Counter()
    reader = READERS[name](folder)
    for case in range(cases):
        reader.write(random.Random(f"{seed} {name} {case}"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                reader.read()
            outcomes["taken"] += 1
        except reader.errors as e:
            message = str(e)
            if "\n" in message or not message.isprintable() or len(message) > 1500 or str(folder) not in message:
                raise AssertionError(f"{name}, seed {seed}, case {case}: not one line that names the file: {message!r}") from e
            outcomes[type(e).__name__] += 1
        except Exception as e:
            raise AssertionError(f"{name}, seed {seed}, case {case}: {type(e).__name__}: {e}") from e
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="files for each reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, help="this one only")
    args = parser.parse_args()
    for name in [args.reader] if args.reader else READERS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            outcomes = fuzz(name, args.cases, args.seed, Path(folder))
            seconds = time.process_time() - began
        print(f"{name:12} {', '.join(f'{k} {v}' for k, v in sorted(outcomes.items()))}; {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
