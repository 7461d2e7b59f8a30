"""A folder of checkpoints on disk: one writer, one run, links, and kills between any two acts that change it."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from ds_zoadamu.durability import checkpoint_store as store
from ds_zoadamu.durability.checkpoint_owner import CheckpointOwner
from ds_zoadamu.durability.journal import Journal, Record
from ds_zoadamu.errors import CheckpointError
from ds_zoadamu.files.crash_points import FOLDER_POINTS, VARIABLE

FILE = "rank-00000-of-00001.safetensors"
IDENTITY = {
    "noise_version": 1, "optimizer": "MeZO", "options": {"seed": 3, "lr": 1e-3}, "groups": [{"weight_decay": 0.0}],
    "micro_batch_size": 2, "micro_batches_a_step": 4, "data": None, "parameters": [],
}  # fmt: skip


def manifest_of(step, content=b"", **marks):
    file = {"file": FILE, "size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "ranges": {}}
    return {
        "step": step, "identity": IDENTITY, "world_size": 1, "skipped_in_a_row": 0, "lrs": [1e-3], "lr_scheduler": None,
        "counters": {"global_steps": step, "global_samples": 8 * step, "skipped_steps": 0}, "data_position": None,
        "client_state": {}, "data_state": None, "files": [file], **marks,
    }  # fmt: skip


def save(owner, directory, step, content=b"", tag=None, limit=None):
    """What checkpoint.save does on rank 0, with a file of any content."""
    owner.claim(directory)
    tag = tag or f"step{step}"
    folder = store.begin(directory, tag)
    (folder / FILE).write_bytes(content)
    checksum = owner.journal and owner.journal.checksum_at(step)
    manifest = manifest_of(step, content, run_id=owner.run_id, journal_checksum=checksum)
    store.publish(folder, tag, manifest, save_latest=True)
    if limit is not None:
        store.prune(directory, limit, tag, owner.owns)


def listed(directory):
    return sorted(name for name in os.listdir(directory) if name != store.LOCK)


def contents(directory):
    """Everything in a folder: {path: bytes, or what a link points to}."""
    paths = [path for path in directory.rglob("*") if path.name != store.LOCK]
    return {p: p.readlink() if p.is_symlink() else p.read_bytes() for p in paths if p.is_symlink() or p.is_file()}


# --- one writer ---------------------------------------------------------------------------------------------------------------


def test_one_engine_writes_at_a_time(tmp_path):
    ours = CheckpointOwner()
    save(ours, tmp_path, 1)
    other = CheckpointOwner()
    other.run_id = ours.run_id
    code = "import sys; from pathlib import Path; from ds_zoadamu.durability.checkpoint_owner import CheckpointOwner as Owner; "
    code += "Owner().claim(Path(sys.argv[1]))"
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 1 and f"checkpoint folder '{tmp_path}' is being written by another run" in process.stderr
    with pytest.raises(CheckpointError, match=r"is being written by another run or engine; .*engine.destroy\(\)"):
        save(other, tmp_path, 2)
    assert listed(tmp_path) == ["latest", "step1"]
    ours.release()
    save(other, tmp_path, 2)
    other.release()


def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    ours = CheckpointOwner()
    save(ours, tmp_path, 1)
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    try:
        for lock in ours._locks.values():
            lock.close()  # as a kill does: without unlocking
        again = CheckpointOwner()
        again.run_id = ours.run_id
        save(again, tmp_path, 2)
        again.release()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(reader)
        os.close(writer)


def test_a_folder_that_was_removed_is_claimed_anew(tmp_path):
    ours, directory = CheckpointOwner(), tmp_path / "checkpoints"
    save(ours, directory, 1)
    store.folders.remove(directory)
    save(ours, directory, 2)
    with pytest.raises(CheckpointError, match="is being written by another"):
        save(CheckpointOwner(), directory, 3)
    assert listed(directory) == ["latest", "step2"] and len(ours._locks) == 1
    ours.release()


# --- one run ------------------------------------------------------------------------------------------------------------------


def journal_of(path, losses):
    base = {"name": None, "revision": None, "sha256": None, "files": None, "note": "the model was not loaded from files"}
    journal = Journal.create(path, {**IDENTITY, "tied": {}, "untrained": [], "base": base})
    for step, loss in enumerate(losses, 1):
        journal.append(Record(step, loss, loss, (0.0,), (1e-3,), False))
    return journal


@pytest.mark.parametrize("journaled", [(False, False), (True, False), (False, True), (True, True)])
def test_another_runs_checkpoints_are_left_alone(tmp_path, journaled):
    """Two runs with journals have the same settings, and the same losses up to step 2."""
    first, second = CheckpointOwner(), CheckpointOwner()
    for owner, name, loss in ((first, "1", 3.0), (second, "2", 4.0)):
        if journaled[owner is second]:
            owner.hold_journal(journal_of(tmp_path / name, [1.0, 2.0, loss]))
    directory = tmp_path / "checkpoints"
    for step in (1, 3):
        save(first, directory, step)
    first.release()
    before = contents(directory)
    with pytest.raises(CheckpointError, match=rf"{directory}' holds checkpoint 'step3' \(step 3\) of another run; give this"):
        save(second, directory, 3, limit=1)
    assert contents(directory) == before
    save(second, tmp_path / "own", 3, limit=1)
    save(first, directory, 3, limit=1)  # it has not lost the folder
    for owner in (first, second):
        owner.release()
        if owner.journal is not None:
            owner.journal.close()


@pytest.mark.parametrize("journaled", [False, True])
def test_a_resumed_run_goes_on_and_prunes_its_own(tmp_path, journaled):
    path, directory = tmp_path / "journal.jsonl", tmp_path / "checkpoints"
    first = CheckpointOwner()
    if journaled:
        first.hold_journal(journal_of(path, [1.0, 2.0]))
    save(first, directory, 1)
    save(first, directory, 2)
    first.release()
    again = CheckpointOwner()
    if journaled:  # without a checkpoint that is whole
        first.journal.close()
        again.hold_journal(Journal.open(path)[0])
        again.journal.append(Record(3, 3.0, 3.0, (0.0,), (1e-3,), False))
    else:
        again.go_on(store.find(directory, "step2").manifest)
    save(again, directory, 3, limit=1)
    assert listed(directory) == ["latest", "step3"]
    again.release()
    if journaled:
        again.journal.close()


def test_checkpoints_of_older_releases(tmp_path):
    """Without an id they keep nobody away and are not removed; with a journal's checksum it is known whose they are."""
    journal = journal_of(tmp_path / "journal.jsonl", [1.0, 2.0, 3.0])
    directory = tmp_path / "checkpoints"
    for step, checksum in ((1, None), (2, journal.checksum_at(2))):
        (directory / f"step{step}").mkdir(parents=True)
        manifest = manifest_of(step, journal_checksum=checksum)
        (directory / f"step{step}" / store.MANIFEST).write_bytes(store.encode_manifest(manifest))
    without, ours = CheckpointOwner(), CheckpointOwner()
    without.go_on(store.find(directory, "step1").manifest)
    save(without, directory, 3, tag="plain", limit=1)
    without.release()
    assert listed(directory) == ["latest", "plain", "step1", "step2"]
    store.folders.remove(directory / "plain")
    ours.hold_journal(journal)
    save(ours, directory, 3, limit=1)
    assert listed(directory) == ["latest", "step1", "step3"]
    ours.release()
    journal.close()


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    owner = CheckpointOwner()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "notes").write_text("mine")
    before = contents(tmp_path)
    for tag in ("model", "notes"):
        with pytest.raises(CheckpointError, match=f"{tag}' is there and is no checkpoint; it is not replaced: move it away"):
            save(owner, tmp_path, 1, tag=tag)
    assert contents(tmp_path) == before
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / FILE).write_bytes(b"a checkpoint whose manifest was removed")
    save(owner, tmp_path, 1, tag="half")
    owner.release()


# --- links --------------------------------------------------------------------------------------------------------------------


def test_checkpoints_that_were_moved_away_behind_links(tmp_path):
    """Links in the place of a checkpoint that is replaced, of one that is pruned, and of ``latest``; one to nowhere."""
    owner, directory, away = CheckpointOwner(), tmp_path / "checkpoints", tmp_path / "away"
    for step in (1, 2):
        save(owner, directory, step, b"old")
    away.mkdir()
    for name in ("step1", "step2", "latest"):
        (directory / name).rename(away / name)
        (directory / name).symlink_to(away / name)
    (directory / "step3").symlink_to(tmp_path / "nowhere")
    before = contents(away)
    assert store.latest_tag(directory) == "step2" and [found.step for found in store.find_all(directory)] == [2, 1]
    for step in (2, 3, 4):
        save(owner, directory, step, b"new", limit=3)
        assert (directory / f"step{step}" / FILE).read_bytes() == b"new"
    assert listed(directory) == ["latest", "step2", "step3", "step4"]
    assert not any((directory / name).is_symlink() for name in listed(directory))
    assert contents(away) == before and not (tmp_path / "nowhere").exists()
    owner.release()


# --- kills --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("point", FOLDER_POINTS)
def test_a_kill_while_checkpoints_change_places(tmp_path, point, linked):
    """Replacing step 2 in a folder of 1 and 2, then pruning: before and afterwards every tag reads as the old or the new."""
    owner, again, directory = CheckpointOwner(), CheckpointOwner(), tmp_path / "checkpoints"
    for step in (1, 2):
        save(owner, directory, step, b"old")
        if linked:
            (directory / f"step{step}").rename(tmp_path / f"step{step}")
            (directory / f"step{step}").symlink_to(tmp_path / f"step{step}")
    owner.release()
    again.run_id = owner.run_id
    child = os.fork()
    if child == 0:
        os.environ[VARIABLE] = f"{point}:{1 if point == 'save_pruning' else 2}"
        save(owner, directory, 2, b"new", limit=1)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    found = {f.tag: (f.path / FILE).read_bytes() for f in store.find_all(directory)}
    assert found["step2"] == (b"new" if point in ("save_renamed", "save_latest", "save_pruning") else b"old")
    assert found.keys() >= {"step2"} if point == "save_pruning" else found.keys() == {"step1", "step2"}
    assert store.find(directory, store.latest_tag(directory)).tag == "step2"
    save(again, directory, 3, b"newer", limit=2)
    assert listed(directory) == ["latest", "step2", "step3"]
    again.release()
