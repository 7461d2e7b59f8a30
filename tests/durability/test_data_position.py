"""A resumed run sees the micro-batches that the uninterrupted one would have seen, however its script reads them."""

import itertools
import multiprocessing
from pathlib import Path

import pytest
import torch

from ..helpers import runs
from ..helpers.harness import run_ranks

pytestmark = pytest.mark.ranks

STEPS, STOP = 8, 4  # an epoch has 3 steps


class Stream(torch.utils.data.IterableDataset):
    """The sentences of ``runs`` in another order each epoch, as Hugging Face's streams have it."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        data = runs.Sentences()
        for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield data[index]


def streamed():
    """The same data as a stream of Hugging Face's."""
    import datasets

    def rows():
        for ids in runs.Sentences().ids.tolist():
            yield {"input_ids": ids, "labels": ids}

    return datasets.IterableDataset.from_generator(rows).shuffle(seed=1, buffer_size=7).with_format("torch")


DATA = {"list": lambda: list(map(runs.Sentences().__getitem__, range(24))), "stream": Stream, "hugging face": streamed}


def plain(loader):
    from ds_zoadamu.zero3.data import repeat

    return repeat(loader)


def read_ahead(loader, num=5):
    """Micro-batches, of which some are always drawn and not yet given out."""
    batches = plain(loader)
    waiting = list(itertools.islice(batches, num))
    while True:
        waiting.append(next(batches))
        yield waiting.pop(0)


def copies_read_ahead(loader):
    """As a user does who moves batches to a GPU ahead of time."""
    return ({name: value.clone() for name, value in batch.items()} for batch in read_ahead(loader))


def looked_at(loader):
    next(iter(loader))
    return plain(loader)


def filtered(loader):
    """Some batches are passed over, as with a rule of the user's."""
    return (batch for batch in plain(loader) if int(batch["input_ids"].sum()) % 3)


def evaluated_too(loader):
    """Each batch is evaluated before it is taken, others are between, and at times all of the data."""
    engine, others = evaluated_too.engine, [{"input_ids": ids[None], "labels": ids[None]} for ids in runs.Sentences(3).ids]
    for number, batch in enumerate(plain(loader)):
        engine.eval_batch(iter([batch]))
        engine.eval_batch(iter([others[number % 3]]))
        if number % 5 == 4:
            engine.eval_batch(loader)
        yield batch


WAYS = {way.__name__: way for way in (plain, read_ahead, copies_read_ahead, filtered, evaluated_too)}


def _run(rank, world_size, folder, data, way, steps, resume=False, workers=0):
    import ds_zoadamu

    multiprocessing.current_process()._config["daemon"] = False  # a rank of these tests may start workers
    engine, _, loader, _ = ds_zoadamu.initialize(
        model=runs.OddModel(), config=runs.config(world_size), training_data=DATA[data]()
    )
    if workers:
        loader = engine.training_dataloader = engine.deepspeed_io(DATA[data](), num_local_io_workers=workers)
    if resume:
        engine.resume(Path(folder) / "journal.jsonl", folder)
    else:
        engine.open_journal(Path(folder) / "journal.jsonl")
    evaluated_too.engine = engine
    batches = way(loader)
    runs.train(engine, batches, steps, save_every=3, folder=Path(folder))
    state = runs.state(engine), [record.data_position for record in _records(folder)]
    engine.destroy()
    return state


def _records(folder):
    from ds_zoadamu.durability.journal import read_journal

    return read_journal(Path(folder) / "journal.jsonl").records


def _interrupted(rank, world_size, folder):
    """For each way of reading: (the uninterrupted run, the one that was stopped and resumed, also with a look at a batch)."""
    results = {}
    for data in DATA:
        for name, way in WAYS.items():
            if data != "list" and way is not read_ahead and way is not plain:
                continue
            place = f"{folder}/{data}-{name}"
            whole = _run(rank, world_size, f"{place}-whole", data, way, STEPS)
            _run(rank, world_size, place, data, way, STOP)
            again = looked_at if way is plain else way
            results[data, name] = whole, _run(rank, world_size, place, data, again, STEPS, resume=True)
    return results


def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(tmp_path):
    [results] = run_ranks(1, _interrupted, str(tmp_path))
    for way, (whole, resumed) in results.items():
        assert whole == resumed, way
    positions = results["list", "plain"][0][1]
    assert positions == [(0, 4), (0, 8), (0, 12), (1, 4), (1, 8), (1, 12), (2, 4), (2, 8)]
    for way in (("list", "read_ahead"), ("list", "copies_read_ahead"), ("list", "evaluated_too")):
        assert results[way] == results["list", "plain"], way
    assert len({str(results[data, "plain"][0][0]["weights"]) for data in DATA}) == len(DATA)


def _with_workers(rank, world_size, folder):
    whole = _run(rank, world_size, f"{folder}/whole", "list", plain, STEPS)
    _run(rank, world_size, f"{folder}/part", "list", plain, STOP, workers=2)
    return whole, _run(rank, world_size, f"{folder}/part", "list", looked_at, STEPS, resume=True, workers=2)


def test_workers_that_read_ahead_lose_nothing(tmp_path):
    [(whole, resumed)] = run_ranks(1, _with_workers, str(tmp_path))
    assert whole == resumed


def _streams(rank, world_size, folder, stop):
    place = f"{folder}/run"
    return _run(rank, world_size, place, "stream", plain, stop or STEPS, resume=stop is None)


def test_a_stream_gives_the_same_run_on_1_2_and_4_ranks_and_resumes_on_another_number(tmp_path):
    wholes = [run_ranks(w, _streams, str(tmp_path / str(w)), STEPS)[0] for w in (1, 2, 4)]
    assert wholes[0] == wholes[1] == wholes[2]
    run_ranks(2, _streams, str(tmp_path / "resumed"), STOP)
    assert run_ranks(4, _streams, str(tmp_path / "resumed"), None)[0] == wholes[0]


def _kinds(rank, world_size):
    import ds_zoadamu

    losses = {}
    for kind, data in {
        "list": DATA["list"](), "tuple": tuple(DATA["list"]()), "dataset": runs.Sentences(), "hugging face": streamed(),
    }.items():  # fmt: skip
        engine, _, loader, _ = ds_zoadamu.initialize(model=runs.OddModel(), config=runs.config(world_size), training_data=data)
        losses[kind] = engine.train_batch(iter(loader))
        engine.destroy()
    model = runs.OddModel()
    with pytest.raises(ds_zoadamu.ConfigError, match="training_data is a generator: it can be gone through only once"):
        ds_zoadamu.initialize(model=model, config=runs.config(world_size), training_data=(x for x in DATA["list"]()))
    assert not any(hasattr(p, "ds_id") for p in model.parameters())
    return losses


def test_kinds_of_training_data():
    [losses] = run_ranks(1, _kinds)
    assert losses["list"] == losses["tuple"] == losses["dataset"] != losses["hugging face"]
