"""No step is lost: whenever and wherever a run dies, the resumed run ends with the bits of one that never stopped."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from ds_zoadamu.files.crash_points import SAVE_POINTS, STEP_POINTS
from tests.crash_test import crash_test

from ..helpers import runs
from ..helpers.crashes import run_outcomes, run_to_crash
from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks

STEPS = 10
SETTINGS = {
    "fp32": {"dtype": "fp32", "momentum": "bf16", "scheduler": True},
    "bf16": {"dtype": "bf16", "momentum": "int8", "bad_steps": (5,)},
}


def uninterrupted(rank, world_size, folder, settings):
    return runs.run(rank, world_size, folder, STEPS, **settings)


def crashing(rank, world_size, folder, settings):
    return runs.run(rank, world_size, folder, STEPS, save_every=3, **settings)


def resume_all(rank, world_size, folders, settings):
    return [runs.run(rank, world_size, folder, STEPS, resume=True, save_every=3, **settings) for folder in folders]


@pytest.mark.parametrize("dtype", SETTINGS)
def test_every_crash_point(tmp_path, dtype):
    """Two ranks die at each named point, alternately both and one of them; resumed on 1 and on 4 ranks."""
    settings = SETTINGS[dtype]
    expected, *_ = run_ranks(2, uninterrupted, str(tmp_path / "whole"), settings)
    whole = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    assert expected["counters"][2] == len(settings.get("bad_steps", ()))
    folders = []
    points = [("journal_linked", 0)] + [(name, 5) for name in STEP_POINTS] + [(name, 6) for name in SAVE_POINTS]
    for index, (name, step) in enumerate(points):
        folder = tmp_path / name
        folder.mkdir()
        only = f":{index // 2 % 2}" if name in ("mid_update", "save_in_file", "save_begun", "save_files") and index % 2 else ""
        ends = run_to_crash(2, f"{name}:{step}{only}", crashing, str(folder), settings)
        hows = [end.how for end in ends]
        assert "killed" in hows and set(hows) <= {"killed", "raised"}, (name, ends)
        recorded = (folder / "journal.jsonl").read_bytes().count(b"\n") - 1
        assert recorded == (step - 1 if name == "before_append" else step), name
        folders.append(str(folder))
    for world_size, part in ((1, folders[::2]), (4, folders[1::2])):
        for folder, state in zip(part, run_ranks(world_size, resume_all, part, settings)[0], strict=True):
            assert state == expected, folder
            assert (Path(folder) / "journal.jsonl").read_bytes() == whole, folder
            assert [name for name in os.listdir(folder) if name.startswith(".")] == [".lock"], folder


def many_stops(rank, world_size, folder, settings):
    """Stopped after every few steps, with and without checkpoints, in one process."""
    results = []
    for name, save_every, stops in (("with", 2, (1, 4, 5, 8)), ("without", 0, (1, 6, 6, 7))):
        place = Path(folder) / name
        state = runs.run(rank, world_size, str(place), stops[0], save_every=save_every, **settings)
        for stop in (*stops[1:], STEPS):
            state = runs.run(rank, world_size, str(place), stop, resume=True, save_every=save_every, **settings)
        results.append(state)
    results.append(runs.run(rank, world_size, None, STEPS, **settings))
    return results


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_momentum_mode_with_and_without_checkpoints(tmp_path, world_size):
    modes = [
        ("fp32", "fp32"),
        ("bf16", "fp32"),
        ("int8", "fp32"),
        ("replay", "fp32"),
        ("fp32", "bf16"),
        ("int8", "bf16"),
        ("replay", "bf16"),
    ]
    results = run_ranks(world_size, all_modes, str(tmp_path), modes)[0]
    for mode, (with_checkpoints, without, expected) in zip(modes, results, strict=True):
        assert with_checkpoints == expected, mode
        assert without == expected, mode


def all_modes(rank, world_size, folder, modes):
    return [
        many_stops(
            rank,
            world_size,
            f"{folder}/{momentum}-{dtype}",
            {"momentum": momentum, "dtype": dtype, "scheduler": dtype == "fp32"},
        )
        for momentum, dtype in modes
    ]


# --- what a resume refuses ----------------------------------------------------------------------------------------------------


def refusals(rank, world_size, folder):
    """The message of each resume that must fail; the same on all ranks, and the journal's bytes unchanged."""
    from ds_zoadamu.errors import CheckpointError, JournalError

    folder = Path(folder)
    journal = folder / "journal.jsonl"
    runs.run(rank, world_size, str(folder), 7, save_every=3)
    runs.run(rank, world_size, str(folder / "other"), 7, save_every=3, seed=6)
    messages = {}

    def attempt(name, checkpoints=None, path=journal, **settings):
        engine, _ = runs.make_engine(world_size, **settings)
        before = path.read_bytes() if path.exists() else None
        weights = [partition.weight.clone() for partition in engine.optimizer.partitions]
        try:
            engine.resume(path, checkpoints)
            messages[name] = "resumed"
        except (JournalError, CheckpointError) as e:
            messages[name] = str(e)
            after = path.read_bytes() if path.exists() else None
            assert before == after
            assert all((p.weight == w).all() for p, w in zip(engine.optimizer.partitions, weights, strict=True))
        engine.destroy()

    def damaged(name, change):
        path = folder / f"{name}.jsonl"
        if rank == 0:
            path.write_bytes(change(journal.read_bytes()))
        import torch.distributed as dist

        dist.barrier()
        attempt(name, path=path)

    attempt("seed", seed=6)
    attempt("zo_eps", zo_eps=2e-2)
    attempt("schedule", t2=7)
    attempt("momentum", momentum="bf16")
    attempt("dtype", dtype="bf16")
    attempt("model", model="opt")
    attempt("missing", path=folder / "none.jsonl")
    attempt("other checkpoints", checkpoints=folder / "other")
    damaged("empty", lambda data: b"")
    damaged("flipped", lambda data: data.replace(b",0,[0,12]", b",0,[0,13]", 1))
    damaged("shortened", lambda data: data[: data.rindex(b"\n", 0, -1) + 1][: data.rindex(b"\n", 0, -1) - 40])
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged("lost end", lambda data: b"".join(lines[:4]))
    attempt("lost end with checkpoints", checkpoints=folder, path=folder / "lost end.jsonl")
    attempt("longer", total_steps=20)
    return messages


def test_refusals_on_two_ranks(tmp_path):
    ours, theirs = run_ranks(2, refusals, str(tmp_path))
    expected = {
        "seed": "seed is 6 here and 5 there",
        "zo_eps": "zo_eps is 0.02 here and 0.01 there",
        "schedule": "t2 is 7 here and 6 there",
        "momentum": "momentum.dtype is 'bf16' here and 'int8' there (a stored momentum cannot change its mode",
        "dtype": "dtype of 'embed.weight' is 'bfloat16' here and 'float32' there",
        "model": "is trained here and not there",
        "missing": "No such file or directory",
        "other checkpoints": "was not saved by the run of journal",
        "empty": "is empty, not even the header is there",
        "flipped": "line 4: its checksum does not fit",
        "lost end with checkpoints": "ends at step 3, but checkpoint",
    }
    for name, message in expected.items():
        assert message in ours[name], (name, ours[name])
        assert message in theirs[name], (name, theirs[name])
    # Whole records cannot be missed at the end: the run is shorter, and goes on from there. A torn line is cut off. total_steps
    # may change.
    assert [ours[name] for name in ("lost end", "shortened", "longer")] == ["resumed"] * 3


def other_batch(rank, world_size, folder):
    engine, _ = runs.make_engine(1)  # 4 micro-batches on each of 2 ranks: twice as many a step
    engine.resume(Path(folder) / "journal.jsonl")


def test_ranks_times_accumulation_must_stay(tmp_path):
    run_ranks(1, uninterrupted, str(tmp_path), {})
    for end in run_outcomes(2, other_batch, str(tmp_path)):
        assert end.how == "raised"
        assert "micro_batches_a_step is 8 here and 4 there (ranks x gradient_accumulation_steps: keep it constant" in end.value


def other_weights(rank, world_size, folder):
    import torch

    engine, _ = runs.make_engine(world_size)
    with torch.no_grad():
        engine.optimizer.partitions[0].weight.add_(1.0)
    engine.resume(Path(folder) / "journal.jsonl")


def test_base_weights_are_verified_without_a_checkpoint(tmp_path):
    run_ranks(1, uninterrupted, str(tmp_path), {})
    for end in run_outcomes(2, other_weights, str(tmp_path)):
        assert end.how == "raised" and "began with other weights: 1 of 7 parameters differ" in end.value


# --- damaged checkpoints are passed over --------------------------------------------------------------------------------------


def resumed_from(rank, world_size, folder, settings):
    engine, batches = runs.make_engine(world_size, **settings)
    resumed = engine.resume(Path(folder) / "journal.jsonl", folder)
    runs.train(engine, batches, STEPS)
    return runs.state(engine), resumed.checkpoint and resumed.checkpoint.name, resumed.replayed, resumed.step


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    settings = {"dtype": "bf16"}
    folder = str(tmp_path / "run")
    [expected] = run_ranks(1, crashing, folder, settings)
    newest = tmp_path / "run" / "global_step9"
    [file] = newest.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    for state, checkpoint, replayed, step in run_ranks(2, resumed_from, folder, settings):
        assert (checkpoint, replayed, step) == ("global_step6", 4, 10)
        assert state == expected
    for manifest in (tmp_path / "run").glob("*/manifest.json"):
        manifest.write_text(json.dumps({"format": "something else"}))
    [(state, checkpoint, replayed, _)] = run_ranks(1, resumed_from, folder, settings)
    assert (checkpoint, replayed) == (None, 10) and state == expected


# --- a user's own iterator ----------------------------------------------------------------------------------------------------


class Counting:
    """Micro-batches out of a generator that knows its place."""

    def __init__(self, world_size: int, rank: int):
        self.world_size, self.rank, self.drawn = world_size, rank, 0

    def __iter__(self):
        return self

    def __next__(self):
        from ..helpers.models import odd_batches

        self.drawn += 1
        return odd_batches(1, seed=100 + (self.drawn - 1) * self.world_size + self.rank)[0]

    def state_dict(self) -> dict:
        return {"drawn_by_all": self.drawn * self.world_size}

    def load_state_dict(self, state: dict) -> None:
        self.drawn = state["drawn_by_all"] // self.world_size


def own_iterator(rank, world_size, folder, steps, resume, save_every):
    engine, _ = runs.make_engine(world_size)
    data = Counting(world_size, rank)
    journal = Path(folder) / "journal.jsonl"
    if resume:
        engine.resume(journal, folder, data=data)
    else:
        engine.open_journal(journal)
    runs.train(engine, data, steps, save_every=save_every, folder=Path(folder))
    return runs.state(engine), data.drawn * world_size


def test_a_users_iterator_hands_over_its_state(tmp_path):
    expected = run_ranks(2, own_iterator, str(tmp_path / "whole"), STEPS, False, 0)[0]
    for save_every in (0, 3):
        folder = str(tmp_path / f"every{save_every}")
        run_ranks(2, own_iterator, folder, 7, False, save_every)
        assert run_ranks(1, own_iterator, folder, STEPS, True, 0)[0] == expected


# --- kill -9 at random moments, the short version ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "momentum", "seed"), [("fp32", "fp32", 1), ("bf16", "int8", 2)])
def test_random_kills(tmp_path, dtype, momentum, seed):
    """``python -m tests.crash_test`` does as many as one likes."""
    said: list[str] = []
    crash_test(tmp_path, 3, dtype, momentum, seed, say=said.append)  # raises where a bit differs
    assert ["killed" in line for line in said] == [True, True, True, False] and "the same bits" in said[-1]


# --- the frozen parameters ----------------------------------------------------------------------------------------------------


def frozen_base(rank, world_size, folder):
    """A run, and what a resume and a load say on another frozen parameter; the digest of the frozen ones."""
    import ds_zoadamu
    from ds_zoadamu.durability.journal import Journal, read_journal

    from ..helpers.models import OddModel

    journal, checkpoints = f"{folder}/journal.jsonl", f"{folder}/checkpoints"
    engine, batches = runs.make_engine(world_size)
    digest = ds_zoadamu.frozen_digest(engine)
    engine.open_journal(journal)
    runs.train(engine, batches, 3, save_every=3, folder=checkpoints)
    engine.destroy()
    if rank == 0:  # as an older release wrote it
        header = {k: v for k, v in read_journal(journal).header.items() if k not in ("format", "version", "fields")}
        header["untrained"] = [entry[:2] for entry in header["untrained"]]
        del header["frozen_sha256"], header["model_class"]
        Journal.create(f"{folder}/old.jsonl", header).close()
    torch.distributed.barrier()
    model = OddModel()
    model.frozen.weight.data[0, 0] += 1
    engine, _ = runs.engine_of(model, world_size)
    errors = []
    for attempt in (lambda: engine.resume(journal), lambda: engine.load_checkpoint(checkpoints)):
        with pytest.raises((ds_zoadamu.JournalError, ds_zoadamu.CheckpointError)) as error:
            attempt()
        errors.append(str(error.value))
    assert engine.load_checkpoint(checkpoints, load_module_only=True)[0] is not None  # a new run, from these weights
    engine.destroy()
    engine, _ = runs.make_engine(world_size)
    assert engine.resume(f"{folder}/old.jsonl").step == 0
    engine.destroy()
    return digest, errors


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_parameters_are_part_of_a_run(tmp_path, world_size):
    from ..helpers.models import OddModel

    sha = hashlib.sha256(OddModel().frozen.weight.detach().numpy().tobytes()).hexdigest()
    expected = hashlib.sha256(f"frozen.weight float32 5x13 {sha}\n".encode()).hexdigest()
    for digest, errors in run_ranks(world_size, frozen_base, str(tmp_path)):
        assert digest == expected
        assert all("the frozen parameters have SHA-256" in e and f"here and {expected} there" in e for e in errors)
