"""Checkpoints: whole or not at all, on any number of ranks, checked before anything is changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ..helpers import runs
from ..helpers.crashes import run_outcomes
from ..helpers.disks import fill, small_disk
from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks

MODES = [("fp32", "fp32"), ("bf16", "fp32"), ("int8", "bf16"), ("replay", "bf16"), ("fp16", "bf16")]


def save_all(rank, world_size, folder):
    """One short run a mode, saved after step 3; returns the states."""
    states = []
    for momentum, dtype in MODES:
        engine, batches = runs.make_engine(world_size, momentum=momentum, dtype=dtype, scheduler=True)
        runs.train(engine, batches, 3)
        assert engine.save_checkpoint(f"{folder}/{momentum}-{dtype}", client_state={"note": [1, "two"], "rank": rank}) is True
        states.append(runs.state(engine))
        engine.destroy()
    return states


def load_each(rank, world_size, folders):
    return [load_all(rank, world_size, folder) for folder in folders]


def load_all(rank, world_size, folder):
    states, others = [], []
    for momentum, dtype in MODES:
        engine, batches = runs.make_engine(world_size, momentum=momentum, dtype=dtype, scheduler=True)
        path, client_state = engine.load_checkpoint(f"{folder}/{momentum}-{dtype}")
        assert path.endswith("global_step3") and client_state == {"note": [1, "two"], "rank": 0}
        states.append(runs.state(engine))
        runs.train(engine, batches, 5)
        others.append(runs.state(engine)["weights"])
        engine.destroy()
    return states, others


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the same runs, saved by 1, 2, 3 and 4 ranks: {ranks: (folder, states)}. On 3 ranks a step has other
    batches."""
    folders = {w: str(tmp_path_factory.mktemp(f"saved{w}")) for w in (1, 2, 3, 4)}
    return {w: (folder, run_ranks(w, save_all, folder)[0]) for w, folder in folders.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_loads_on_any_number_of_ranks(saved, world_size):
    results = dict(zip(saved, run_ranks(world_size, load_each, [folder for folder, _ in saved.values()])[0], strict=True))
    for w, (loaded, _) in results.items():
        assert loaded == saved[w][1], f"saved on {w}, loaded on {world_size}"
    assert results[1][1] == results[2][1] == results[4][1]  # and they go on alike


def test_every_rank_writes_its_own_part(saved):
    folder = Path(saved[4][0]) / "int8-bf16" / "global_step3"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(os.listdir(folder)) == ["manifest.json", *(f"rank-0000{r}-of-00004.safetensors" for r in range(4))]
    numel = {p["name"]: torch.Size(p["shape"]).numel() for p in manifest["identity"]["parameters"]}
    assert "frozen.weight" not in numel and "head.weight" not in numel
    for entry in manifest["files"]:
        for name, (start, stop) in entry["ranges"].items():
            assert 0 < stop - start <= -(-numel[name] // 4)
        assert (folder / entry["file"]).stat().st_size == entry["size"]
    for name, count in numel.items():
        ranges = sorted(entry["ranges"][name] for entry in manifest["files"] if name in entry["ranges"])
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), count]


# --- as DeepSpeed users expect ------------------------------------------------------------------------------------------------


def tags_and_limits(rank, world_size, folder):
    engine, batches = runs.make_engine(world_size)
    assert engine.load_checkpoint(folder) == (None, None)
    runs.train(engine, batches, 2)
    engine.save_checkpoint(folder, "mine", save_latest=False)
    after_two = runs.state(engine)
    assert engine.load_checkpoint(folder) == (None, None)
    for step in range(3, 8):
        runs.train(engine, batches, step)
        engine.save_checkpoint(folder, save_total_limit=3)
    engine.save_checkpoint(folder, "global_step7", client_state={"again": True}, save_total_limit=3)
    listed = sorted(os.listdir(folder))
    after_seven = runs.state(engine)
    engine.destroy()
    engine, batches = runs.make_engine(world_size)
    client_state = engine.load_checkpoint(folder)[1]
    assert runs.state(engine) == after_seven and client_state == {"again": True}
    engine.load_checkpoint(folder, "global_step5")
    assert engine.global_steps == 5
    engine.destroy()
    engine, batches = runs.make_engine(world_size, zo_eps=0.5, lr=1.0)  # other options: a new run from these weights
    engine.load_checkpoint(folder, "global_step7", load_module_only=True)
    state = runs.state(engine)
    assert state["weights"] == after_seven["weights"] and state["step"] == 0 and state["lr"] == [1.0]
    assert after_two["weights"] != after_seven["weights"]
    return listed, (Path(folder) / "latest").read_text().strip()


def test_tags_latest_client_state_and_save_total_limit(tmp_path):
    for listed, latest in run_ranks(2, tags_and_limits, str(tmp_path)):
        assert listed == [".lock", "global_step5", "global_step6", "global_step7", "latest"]
        assert latest == "global_step7"


def old_ones_cannot_be_removed(rank, world_size, folder):
    """Returns what was logged, and what is there after each of two saves."""
    from deepspeed.utils import logger

    from ds_zoadamu.durability import checkpoint_store as store

    remove, stuck, warnings, listed = store.folders.remove, [True], [], []

    def remove_others(path):
        if stuck and path.name == ".removing-global_step1":  # as a file that another machine holds open
            raise OSError(16, "Device or resource busy", str(path))
        remove(path)

    store.folders.remove, warn = remove_others, logger.warning
    logger.warning = warnings.append
    engine, batches = runs.make_engine(world_size)
    for step in range(1, 5):
        runs.train(engine, batches, step)
        if step == 4:
            stuck.clear()
        engine.save_checkpoint(folder, save_total_limit=1)
        listed.append(sorted(name for name in os.listdir(folder) if name != ".lock"))
    logger.warning = warn
    return warnings, listed


def test_a_checkpoint_is_saved_though_an_older_one_cannot_be_removed(tmp_path):
    (warnings, listed), (others, _) = run_ranks(2, old_ones_cannot_be_removed, str(tmp_path))
    assert warnings == [
        f"checkpoint '{tmp_path}/global_step2' is saved, but an older one beyond save_total_limit 1 cannot be removed: "
        f"'{tmp_path}/.removing-global_step1': Device or resource busy. The next save tries again"
    ]
    assert others == [] and listed == [
        ["global_step1", "latest"],
        [".removing-global_step1", "global_step2", "latest"],
        [".removing-global_step1", "global_step3", "latest"],
        ["global_step4", "latest"],
    ]


# --- refusals -----------------------------------------------------------------------------------------------------------------


def _rewritten(file, change):
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


def _save_too_much(engine, folder):
    from ds_zoadamu.durability import checkpoint_store as store

    store._MAX_BYTES, bound = 20_000, store._MAX_BYTES
    try:
        engine.save_checkpoint(folder, client_state={"text": "x" * 30_000})
    finally:
        store._MAX_BYTES = bound


def _forged(change):
    """With another manifest, whose checksum is right."""
    from ds_zoadamu.durability import checkpoint_store as store

    def rewrite(path):
        manifest = store.read_manifest(path)
        change(manifest)
        (path / "manifest.json").write_bytes(store.encode_manifest(manifest))

    return rewrite


def refused(rank, world_size, folder):
    """The message of each load or save that must fail. Nothing in memory and no earlier checkpoint may change."""
    import torch.distributed as dist

    from ds_zoadamu.errors import CheckpointError

    folder = Path(folder)
    engine, batches = runs.make_engine(world_size)
    runs.train(engine, batches, 3)
    engine.save_checkpoint(folder / "good")
    engine.destroy()
    messages = {}

    def attempt(name, call, **settings):
        engine, batches = runs.make_engine(world_size, **settings)
        runs.train(engine, batches, 1)
        before = runs.state(engine)
        try:
            call(engine)
            messages[name] = "accepted"
        except CheckpointError as e:
            messages[name] = str(e)
            assert runs.state(engine) == before
        engine.destroy()

    def damaged(name, change):
        if rank == 0:
            shutil.copytree(folder / "good", folder / name)
            change(folder / name / "global_step3")
        dist.barrier()
        attempt(name, lambda engine: engine.load_checkpoint(folder / name))

    second = "rank-00001-of-00002.safetensors"
    damaged("missing file", lambda path: (path / second).unlink())
    damaged("shortened file", _rewritten(second, lambda data: data[:-8]))
    damaged("flipped bit", _rewritten(second, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]))
    damaged("no manifest", lambda path: (path / "manifest.json").unlink())
    damaged("changed manifest", _rewritten("manifest.json", lambda data: data.replace(b'"step": 3', b'"step": 4', 1)))
    damaged("latest astray", lambda path: (path.parent / "latest").write_text("global_step9"))
    damaged("latest outside", lambda path: (path.parent / "latest").write_text("../../etc"))
    damaged("a gap", _forged(lambda manifest: manifest["files"][1]["ranges"].update({"embed.weight": [40, 77]})))
    damaged("an attribute", _forged(lambda manifest: manifest["counters"].update(train_batch=0)))
    good = folder / "good"
    attempt("other model", lambda engine: engine.load_checkpoint(good), model="opt")
    attempt("other dtype", lambda engine: engine.load_checkpoint(good), dtype="bf16")
    attempt("other momentum", lambda engine: engine.load_checkpoint(good), momentum="fp32")
    attempt("other seed", lambda engine: engine.load_checkpoint(good), seed=7)
    attempt("scheduler", lambda engine: engine.load_checkpoint(good), scheduler=True)
    attempt("weights of other dtype", lambda engine: engine.load_checkpoint(good, load_module_only=True), dtype="bf16")
    attempt("client_state", lambda engine: engine.save_checkpoint(good, client_state={"model": torch.nn.Linear(1, 1)}))
    deep = {"tree": json.loads("[" * 120 + "]" * 120)}
    attempt("too deep", lambda engine: engine.save_checkpoint(good, client_state=deep))
    attempt("too large", lambda engine: _save_too_much(engine, folder / "large"))
    attempt("tag", lambda engine: engine.save_checkpoint(good, "a/b"))
    attempt("limit", lambda engine: engine.save_checkpoint(good, save_total_limit=0))
    attempt("different tags", lambda engine: engine.save_checkpoint(good, f"rank{rank}"))
    attempt("not a folder", lambda engine: engine.save_checkpoint(good / "latest"))
    attempt("intact", lambda engine: engine.load_checkpoint(good))
    return messages


def test_refusals_on_two_ranks(tmp_path):
    expected = {
        "missing file": "rank-00001-of-00002.safetensors' cannot be read: No such file",
        "shortened file": "bytes, it was saved with",
        "flipped bit": "its SHA-256 does not fit",
        "no manifest": "is not whole: manifest.json cannot be read",
        "changed manifest": "manifest.json is damaged",
        "latest astray": "no checkpoint 'global_step9' in",
        "latest outside": "latest': tag is '../../etc'; it must be the name of a folder",
        "a gap": "the ranges of 'embed.weight' are not its 77 elements, each once",
        "an attribute": "counters.train_batch is 0: extra inputs are not permitted",
        "other model": "is trained here and not there",
        "other dtype": "dtype of 'temperature' is 'bfloat16' here and 'float32' there",
        "other momentum": "momentum.dtype is 'fp32' here and 'int8' there (a stored momentum cannot change",
        "other seed": "seed is 7 here and 5 there",
        "scheduler": "was saved with the lr scheduler None, this run has WarmupLR",
        "weights of other dtype": "dtype of 'temperature' is 'bfloat16' here",
        "client_state": "client_state['model'] is a Linear; kept are numbers, strings",
        "too deep": "a checkpoint cannot hold all of client_state: lists or objects more than 100 deep",
        "too large": " bytes, 30012 of them for client_state; it can have at most 20000: keep less there",
        "tag": "tag is 'a/b'; it must be the name of a folder",
        "limit": "save_total_limit is 0; it must be an integer >= 1",
        "different tags": "the ranks disagree about the tag",
        "not a folder": "latest'",
        "intact": "accepted",
    }
    for messages in run_ranks(2, refused, str(tmp_path)):
        assert {name for name, part in expected.items() if part not in messages[name]} == set(), messages


# --- whose a folder is --------------------------------------------------------------------------------------------------------


def two_engines(rank, world_size, folder):
    """Engines of one process and one folder: the same run in two of them, then another run. Returns messages and tags."""
    from ds_zoadamu.errors import CheckpointError

    messages = []

    def refused(engine):
        with pytest.raises(CheckpointError) as e:
            engine.save_checkpoint(folder, save_total_limit=1)
        messages.append(str(e.value))

    first, batches = runs.make_engine(world_size)
    runs.train(first, batches, 2, save_every=1, folder=folder)
    second, batches = runs.make_engine(world_size)
    second.load_checkpoint(folder)
    refused(second)
    first.destroy()
    runs.train(second, batches, 3, save_every=1, folder=folder, save_total_limit=2)
    second.destroy()
    for settings in ({}, {"load_module_only": True}):
        other, batches = runs.make_engine(world_size)
        if settings:
            other.load_checkpoint(folder, **settings)
        runs.train(other, batches, 1)
        refused(other)
        other.destroy()
    return messages, sorted(os.listdir(folder))


def go_on(rank, world_size, folder):
    engine, batches = runs.make_engine(world_size)
    engine.load_checkpoint(folder)
    runs.train(engine, batches, 5, save_every=1, folder=folder, save_total_limit=2)
    return sorted(os.listdir(folder))


def test_a_folder_is_of_one_run_and_one_engine(tmp_path):
    """Reached through a link. The run goes on in other engines and on another number of ranks."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for messages, listed in run_ranks(2, two_engines, str(tmp_path / "link")):
        assert "is being written by another run or engine; give each run a folder of its own" in messages[0]
        for message in messages[1:]:
            assert f"{tmp_path}/real' holds checkpoint 'global_step3' (step 3) of another run; give this run" in message
        assert len(messages) == 3 and listed == [".lock", "global_step2", "global_step3", "latest"]
    assert run_ranks(1, go_on, str(tmp_path / "link")) == [[".lock", "global_step4", "global_step5", "latest"]]


def dropped(rank, world_size, folder):
    """An engine whose name is given to another one, as in a notebook: the next goes on with its journal and its folder, and
    the model, which somebody still has, can be used."""
    engine, batches = runs.make_engine(world_size)
    engine.open_journal(Path(folder) / "journal.jsonl")
    runs.train(engine, batches, 2, save_every=2, folder=folder)
    module, batch = engine.module.eval(), runs.Sentences()[0]
    batch = {name: ids[None] for name, ids in batch.items()}
    engine.module.requires_grad_(False)
    before = float(module(**batch).loss)
    engine = None
    engine, batches = runs.make_engine(world_size)
    engine.resume(Path(folder) / "journal.jsonl", folder)
    runs.train(engine, batches, 4, save_every=2, folder=folder)
    return before == float(module(**batch).loss), sorted(os.listdir(folder))


def test_an_engine_that_nobody_has_any_more_gives_up_what_it_holds(tmp_path):
    for usable, listed in run_ranks(2, dropped, str(tmp_path)):
        assert usable and listed == [".lock", "global_step2", "global_step4", "journal.jsonl", "latest"]


# --- a full disk, no permission -----------------------------------------------------------------------------------------------


def save_until_full(rank, world_size, folder):
    from ds_zoadamu.errors import CheckpointError

    engine, batches = runs.make_engine(world_size, model="opt", momentum="fp32")
    states = {}
    for step in range(1, 20):
        runs.train(engine, batches, step)
        try:
            engine.save_checkpoint(folder)
        except CheckpointError as e:
            message = str(e)
            break
        states[step] = runs.state(engine)
    listed = sorted(os.listdir(folder))
    engine.destroy()
    engine, _ = runs.make_engine(world_size, model="opt", momentum="fp32")
    engine.load_checkpoint(folder)
    return message, listed, runs.state(engine) == states[step - 1], step


def test_a_full_disk_while_saving(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "1m") as why_not:
        if why_not:
            pytest.skip(why_not)
        ends = run_ranks(2, save_until_full, str(disk))
        for message, _, same, step in ends:
            assert f"'{disk}/.writing-global_step{step}/" in message and "No space left on device" in message and same
            assert 2 <= step < 19
        assert ends[0][1] == sorted([".lock", *(f"global_step{n}" for n in range(1, step)), "latest"])


def fill_while_journaling(rank, world_size, folder):
    """Returns the state before the step that failed, the state afterwards, the message and the step."""
    from ds_zoadamu.errors import JournalError

    engine, batches = runs.make_engine(world_size)
    engine.open_journal(Path(folder) / "journal.jsonl")
    runs.train(engine, batches, 3)
    if rank == 0:
        fill(Path(folder))
    try:
        while True:
            before = runs.state(engine)
            engine.train_batch(batches)
    except JournalError as e:
        after = runs.state(engine)
        engine.destroy()
        return before, after, str(e)


def resumed(rank, world_size, folder):
    return runs.run(rank, world_size, folder, 60, resume=True)


def test_a_full_disk_while_journaling(tmp_path):
    """All ranks end with the error, no partition was changed, and with room again the run goes on as if nothing had been."""
    disk = tmp_path / "disk"
    with small_disk(disk, "64k") as why_not:
        if why_not:
            pytest.skip(why_not)
        ends = run_outcomes(2, fill_while_journaling, str(disk))
        for end in ends:
            assert end.how == "returned", end.value
            before, after, message = end.value
            assert before == after
            assert f"the record of step {before['step'] + 1} cannot be written: No space left on device" in message
        (disk / "ballast").unlink()
        (disk / "rest").unlink()
        again = run_ranks(1, resumed, str(disk))
    assert again == run_ranks(1, runs.run, None, 60)


def without_permission(rank, world_size, folder):
    from ds_zoadamu.errors import CheckpointError, JournalError

    engine, batches = runs.make_engine(world_size)
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may do everything
    messages = []
    for call in (lambda: engine.open_journal(Path(folder) / "journal.jsonl"), lambda: engine.save_checkpoint(folder)):
        try:
            call()
        except (CheckpointError, JournalError) as e:
            messages.append(str(e))
    return messages


def test_no_permission(tmp_path):
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    for journal, checkpoint in run_ranks(2, without_permission, str(folder)):
        assert "Permission denied" in journal and "Permission denied" in checkpoint
    assert not os.listdir(folder)
