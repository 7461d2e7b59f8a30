"""Whatever one rank meets alone, no other waits for it: all of them end, or all of them go on, and the reason is named."""

import math
import os
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_lm import save_model

from ..helpers import jobs, runs
from ..helpers.disks import file_size_limit
from ..helpers.harness import run_ranks
from ..helpers.models import OddModel, odd_batches
from ..hf.test_models import task_and_examples

pytestmark = pytest.mark.ranks

LIMIT = 12.0
"""Seconds that ranks wait for each other at most where one fails alone: it gives the others a quarter of it to fail alike."""


def _limited() -> None:
    from ds_zoadamu.distributed.waiting import limit_waits, time_limit

    limit_waits(time_limit(LIMIT))


def _outcome(function, *args, **kwargs) -> str:
    try:
        return repr(function(*args, **kwargs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# --- data ---------------------------------------------------------------------------------------------------------------------


class Numbered:
    """An iterator over micro-batches that meets ``error`` behind the last one; with a state that cannot be told."""

    def __init__(self, batches: list, error: Exception):
        self._left, self._error = list(batches), error

    def __iter__(self):
        return self

    def __next__(self):
        if not self._left:
            raise self._error
        return self._left.pop(0)

    def state_dict(self):
        raise self._error

    def load_state_dict(self, state):
        raise NotImplementedError


def _data(rank, world_size, folder):
    engine = jobs.engine_for(OddModel(), jobs.config(world_size, 2))
    batches = odd_batches(16)
    outcomes, steps = {}, []

    def attempt(name, call, mine, alone):
        outcomes[name] = _outcome(call, alone if rank == 1 else mine)
        steps.append(engine.optimizer.step_count)

    attempt("train: no step left", engine.train_batch, iter(batches[:2]), iter([]))
    attempt("eval: no step left", engine.eval_batch, iter(batches[:2]), iter([]))
    attempt("half a step left", engine.train_batch, iter(batches[:2]), iter(batches[:1]))
    attempt("broken data", engine.train_batch, iter(batches[:2]), Numbered(batches[:1], OSError(5, "Input/output error", "a")))
    attempt("no iterator", engine.train_batch, iter(batches[:2]), batches[0])
    attempt("whole", engine.train_batch, iter(batches[:2]), Numbered(batches[:3], KeyError("position")))
    attempt("state_dict", lambda _: engine.save_checkpoint(folder), None, None)
    return outcomes, steps, os.listdir(folder)


def test_data_that_ends_or_fails_on_one_rank(tmp_path):
    (first, *rest), (second, *same) = run_ranks(2, _data, str(tmp_path))
    assert rest == same == [[0, 0, 0, 0, 0, 1, 1], []]  # nothing has stepped but the whole batch, and no checkpoint is there
    assert first["train: no step left"] == second["train: no step left"] == "StopIteration: "
    none = "ValueError: rank 1 has no micro-batch to evaluate, others have 2; give each rank at least one"
    assert first["eval: no step left"] == second["eval: no step left"] == none
    half = "the iterator ended after 1 of the 2 micro-batches of a step"
    assert first["half a step left"].startswith(f"ValueError: rank 1: {half}")
    assert second["half a step left"].startswith(f"ValueError: {half}")
    assert first["broken data"] == "ValueError: rank 1: 'a': Input/output error"
    assert second["broken data"] == "ValueError: 'a': Input/output error"
    assert first["no iterator"].startswith("ValueError: rank 1: gradient_accumulation_steps is 2")
    assert math.isfinite(float(first["whole"])) and first["whole"] == second["whole"]
    failed = "the data iterator's state_dict() raised KeyError: 'position'; nothing was saved"
    assert first["state_dict"] == f"CheckpointError: rank 1: {failed}"
    assert second["state_dict"] == f"CheckpointError: {failed}"


def _other_calls(rank, world_size, folder):
    """The data of rank 1 ends earlier in a loop that train_batch does not see: it goes on to what is behind the loop."""
    engine = jobs.engine_for(OddModel(), jobs.config(world_size))
    error = None
    try:
        for batch in odd_batches(3 - rank):
            engine.train_batch(batch)
        engine.save_checkpoint(folder)
    except Exception as e:
        error = e
    return f"{type(error).__name__}: {error}", engine.optimizer.step_count


def test_a_loop_that_ends_earlier_on_one_rank_is_named(tmp_path):
    expected = "rank 0 at train_batch of step 3; rank 1 at save_checkpoint. All must make the same calls"
    for outcome, steps in run_ranks(2, _other_calls, str(tmp_path)):
        assert outcome.startswith("RankError") and expected in outcome and steps == 2


# --- the loss -----------------------------------------------------------------------------------------------------------------


def _raising_loss(rank, world_size, method, failing, call):
    calls = 0

    def loss_fn(module, batch):
        nonlocal calls
        calls += 1
        loss = module(**batch).loss
        if rank == failing and calls == call:
            raise MemoryError(f"call {calls}")
        return loss, 1.0

    engine = jobs.engine_for(OddModel(), jobs.config(world_size), loss_fn=loss_fn)
    _limited()
    before = jobs.as_bytes({p.name: p.weight for p in engine.optimizer.partitions})
    outcome = _outcome(getattr(engine, method), odd_batches(1)[0])
    # The script has caught it and goes on.
    again = _outcome(getattr(engine, method), odd_batches(1)[0])
    return outcome, again, before == jobs.as_bytes({p.name: p.weight for p in engine.optimizer.partitions})


@pytest.mark.parametrize("method, failing, call", [("train_batch", 1, 1), ("train_batch", 0, 2), ("eval_batch", 1, 1)])
def test_a_loss_that_raises_on_one_rank(method, failing, call):
    """In the first pass the others wait in a gather of the second, in the last one at the end of the step."""
    place = "train_batch of step 1" if method == "train_batch" else "eval_batch"
    named = f"RankError: rank {failing}, at {place}: MemoryError: call {call}"
    for rank, (outcome, again, unchanged) in enumerate(run_ranks(2, _raising_loss, method, failing, call)):
        assert outcome == (f"MemoryError: call {call}" if rank == failing else named)
        assert again in (named, "RankError: rank 0's process has ended; its own output says why")
        assert unchanged


# --- models on the disk -------------------------------------------------------------------------------------------------------


def _saving_and_loading(rank, world_size, source, folder):
    import ds_zoadamu
    from ds_zoadamu.hf.models import load_weights, save_pretrained

    config = jobs.config(world_size)
    model = ds_zoadamu.load_model(str(source), config=config)
    engine, outcomes = jobs.engine_for(model, config), {}
    with file_size_limit(20_000) if rank == 0 else nullcontext():
        for name, size in (("in the middle", "15KB"), ("at the end", "5GB")):
            outcomes[name] = _outcome(save_pretrained, engine, folder / "saved", max_shard_size=size)
    left = sorted(path.name for path in folder.iterdir())
    before = jobs.as_bytes(jobs.whole_model(engine))
    for other in ("shape", "shape [1]", "cut off", "missing"):
        outcomes[other] = _outcome(load_weights, engine, folder / other)
    assert jobs.as_bytes(jobs.whole_model(engine)) == before
    save_pretrained(engine, folder / "saved")
    load_weights(engine, folder / "saved")
    return outcomes, left, _failing_evaluation(rank, engine)


def _failing_evaluation(rank, engine) -> str:
    task, examples = task_and_examples()

    def collate(examples):
        raise IndexError("no such token")

    task.collate = collate if rank == 1 else task.collate
    _limited()
    return _outcome(task.evaluate, engine.module, examples)


def test_a_model_that_one_rank_cannot_save_load_or_evaluate(tmp_path):
    source, folder = save_model(tmp_path / "source"), tmp_path / "there"
    tensors = load_file(source / "model.safetensors")
    name = "model.decoder.layers.0.fc1.bias"
    for kind, changed in (
        ("shape", {name: torch.zeros(30)}),
        ("shape [1]", {name: torch.zeros(1)}),  # copy_ would broadcast it
        ("cut off", {}),
        ("missing", {name: None}),
    ):
        (folder / kind).mkdir(parents=True)
        kept = {key: value for key, value in (tensors | changed).items() if value is not None}
        save_file(kept, folder / kind / "model.safetensors", metadata={"format": "pt"})
    path = folder / "cut off" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (first, left, scored), (second, _, same) = run_ranks(2, _saving_and_loading, source, folder)
    assert left == ["cut off", "missing", "shape", "shape [1]"]  # of what could not be saved nothing is there
    expected = {
        "in the middle": ("OSError", f"{folder}/.saved.writing/model-00001-of-00003.safetensors cannot be written"),
        "at the end": ("OSError", f"{folder}/.saved.writing/model.safetensors cannot be written"),
        "shape": ("ValueError", f"{folder}/shape has '{name}' of shape (30,), in this model it is (31,)"),
        "shape [1]": ("ValueError", f"{folder}/shape [1] has '{name}' of shape (1,), in this model it is (31,)"),
        "cut off": ("ValueError", f"{path} cannot be read"),
        "missing": ("ValueError", f"{folder}/missing has no weights for '{name}' (1 missing)"),
    }
    for kind, (error, message) in expected.items():
        assert first[kind].startswith(f"{error}: {message}"), first[kind]
        assert second[kind].startswith(f"{error}: rank 0: {message}"), second[kind]
    assert scored == "RankError: rank 1, at evaluate: IndexError: no such token" and same == "IndexError: no such token"


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def _newest_cannot_be_read(rank, world_size, folder):
    from ds_zoadamu.files import safetensors_io

    folder = Path(folder)
    engine, batches = runs.make_engine(world_size)
    engine.open_journal(folder / "journal.jsonl")
    runs.train(engine, batches, 4, save_every=2, folder=folder)
    expected = runs.state(engine)
    engine.destroy()
    read = safetensors_io.FlatReader.read

    def shortened(reader, *args):
        if rank == 1 and reader.path.parent.name == "global_step4":  # somebody shortens the file behind its check
            os.truncate(reader.path, 8)
        return read(reader, *args)

    safetensors_io.FlatReader.read = shortened
    engine, _ = runs.make_engine(world_size)
    resumed = engine.resume(folder / "journal.jsonl", folder)
    return resumed.checkpoint.name, resumed.replayed, runs.state(engine) == expected


def test_a_newest_checkpoint_that_one_rank_cannot_read_is_passed_over_by_all(tmp_path):
    assert run_ranks(2, _newest_cannot_be_read, str(tmp_path)) == [("global_step2", 2, True)] * 2


# --- settings -----------------------------------------------------------------------------------------------------------------


def _different_settings(rank, world_size):
    import ds_zoadamu

    outcomes = {}
    touched = []

    def attempt(name, change, **arguments):
        config, model = jobs.config(world_size), OddModel()
        if rank == world_size - 1:
            change(config, model, arguments)
        outcomes[name] = _outcome(ds_zoadamu.initialize, model=model, config=config, **arguments)
        touched.append(any(hasattr(p, "ds_id") for p in model.parameters()))

    def option(key, value):
        return lambda config, model, arguments: config["optimizer"]["params"].update({key: value})

    def batches(config, model, arguments):
        config.update(train_micro_batch_size_per_gpu=4, train_batch_size=4 * world_size)

    def accumulation(config, model, arguments):
        config.update(gradient_accumulation_steps=2, train_batch_size=2 * 2 * world_size)

    attempt("seed", option("seed", 6))
    attempt("optimizer", lambda config, *_: config.update(optimizer={"type": "AdamW", "params": {"lr": 1e-3}}))
    attempt("option", option("update_rounding", "nearest"))
    attempt("micro-batch", batches)
    attempt("accumulation", accumulation)
    attempt("zero", lambda config, *_: config["zero_optimization"].update(stage3_param_persistence_threshold=7))
    attempt("dtype of the run", lambda config, *_: config.update(bf16={"enabled": True}))
    attempt("data", lambda c, m, a: a.update(training_data=runs.Sentences(23)), training_data=runs.Sentences(24))
    attempt("frozen", lambda config, model, _: model.mix.bias.requires_grad_(False))
    attempt("dtype", lambda config, model, _: model.mix.to(torch.float64))
    attempt("name", lambda config, model, _: model.register_parameter("more", torch.nn.Parameter(torch.ones(1))))
    attempt("order", lambda config, model, _: model._modules.update(mix=model._modules.pop("mix")))
    attempt("refused", option("zo_eps", 0))
    attempt("twice", lambda c, m, arguments: arguments.update(args=Namespace(deepspeed_config="another")))
    attempt("no time", lambda c, m, arguments: arguments.update(timeout=0), timeout=1200)
    attempt("timeout", lambda c, m, arguments: arguments.update(timeout=1201), timeout=1200)
    return outcomes, touched


def test_settings_that_differ_between_ranks_are_named_before_the_model_is_touched():
    expected = {
        "seed": "optimizer.params.seed is 5 on ranks 0, 1, 6 on rank 2.",
        "optimizer": 'optimizer.type is "ZOAdaMU" on ranks 0, 1, "AdamW" on rank 2; ',
        "option": 'optimizer.params.update_rounding is nothing on ranks 0, 1, "nearest" on rank 2.',
        "micro-batch": "train_micro_batch_size_per_gpu is 2 on ranks 0, 1, 4 on rank 2.",
        "accumulation": "gradient_accumulation_steps is 1 on ranks 0, 1, 2 on rank 2.",
        "zero": "zero_optimization.stage3_param_persistence_threshold is nothing on ranks 0, 1, 7 on rank 2.",
        "dtype of the run": "bf16.enabled is nothing on ranks 0, 1, true on rank 2.",
        "data": "len(training_data) is 24 on ranks 0, 1, 23 on rank 2.",
        "frozen": """'mix.bias' is "[13] torch.float32 trained" on ranks 0, 1, "[13] torch.float32 frozen" on rank 2.""",
        "dtype": """parameter 'mix.weight' is "[13, 7] torch.float32 trained" on ranks 0, 1, "[13, 7] torch.float64""",
        "name": """parameter 'more' is nothing on ranks 0, 1, "[1] torch.float32 trained" on rank 2.""",
        "order": "the order of parameters is ",
        "timeout": "timeout is 1200.0 on ranks 0, 1, 1201.0 on rank 2.",
    }
    own = {
        "refused": "ConfigError: optimizer.params: zo_eps is 0; it must be finite and >= 1e-08",
        "twice": "ValueError: pass the DeepSpeed configuration once",
        "no time": "ConfigError: timeout is 0; ranks can wait for each other 1 to 604800 seconds",
    }
    for rank, (outcomes, touched) in enumerate(run_ranks(3, _different_settings)):
        assert not any(touched)
        for name, part in expected.items():
            assert outcomes[name].startswith("ConfigError: the ranks were given different settings: "), outcomes[name]
            assert part in outcomes[name], outcomes[name]
        for name, message in own.items():
            error, _, rest = message.partition(": ")
            if rank < 2:
                error = "RankError: rank 2: ValueError" if error == "ValueError" else f"{error}: rank 2"
            assert outcomes[name].startswith(f"{error}: {rest}"), outcomes[name]


# --- the time limit -----------------------------------------------------------------------------------------------------------


def _limits(rank, world_size):
    import torch.distributed as dist

    from ds_zoadamu.distributed import waiting

    def seconds():
        groups = dist.distributed_c10d._world.pg_map
        return sorted(g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups)

    at_start = seconds()
    engine = jobs.engine_for(OddModel(), jobs.config(world_size))
    kept = seconds()
    engine.destroy()
    jobs.engine_for(OddModel(), jobs.config(world_size), timeout=90)
    return at_start, kept, seconds(), waiting.DEFAULT_TIME_LIMIT


def test_all_process_groups_have_the_time_limit():
    for at_start, kept, changed, default in run_ranks(2, _limits):
        assert at_start == [default] and default == 3600.0
        assert len(kept) > 1 and set(kept) == {default}  # those that DeepSpeed makes too
        assert len(changed) == len(kept) and set(changed) == {90.0}


# --- scripts ------------------------------------------------------------------------------------------------------------------


def _script(rank, world_size, folder):
    import sys

    from ds_zoadamu.distributed import collective
    from ds_zoadamu.training.main import run_script

    _limited()
    sys.stderr = open(folder / f"stderr-{rank}", "w")

    def body():
        if rank == 1:
            raise OSError(28, "No space left on device", "metrics.jsonl")
        collective.gather_json("behind the write that failed")

    try:
        return run_script(body)
    finally:
        sys.stderr.close()


def test_a_script_whose_rank_0_fails_between_collectives(tmp_path):
    assert run_ranks(2, _script, tmp_path) == [1, 1]
    (line,) = (tmp_path / "stderr-1").read_text().splitlines()
    assert line.endswith("error on rank 1: 'metrics.jsonl': No space left on device")
    (line,) = (tmp_path / "stderr-0").read_text().splitlines()
    assert "rank 0 ends: rank 1, at " in line and line.endswith("[Errno 28] No space left on device: 'metrics.jsonl'")


def _groups_and_lrs(rank, world_size):
    import ds_zoadamu

    outcomes = {}
    for key, value in (("weight_decay", 0.5), ("lr", 0.05)):
        model = OddModel()
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], key: value if rank else 0.01}]
        outcomes[key] = _outcome(ds_zoadamu.initialize, model=model, model_parameters=groups, config=jobs.config(world_size))

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 or rank == 0 else 0.5)

    engine = jobs.engine_for(OddModel(), jobs.config(world_size), lr_scheduler=scheduler)
    batch = odd_batches(1)[0]
    engine.train_batch(batch)
    outcomes["scheduler"] = _outcome(engine.train_batch, batch)
    return outcomes, engine.optimizer.step_count


def test_parameter_groups_and_lrs_that_differ_between_ranks_are_named():
    for outcomes, steps in run_ranks(2, _groups_and_lrs):
        assert "parameter group 0.weight_decay is 0.01 on rank 0, 0.5 on rank 1" in outcomes["weight_decay"]
        assert "parameter group 0.lr is 0.01 on rank 0, 0.05 on rank 1" in outcomes["lr"]
        assert outcomes["scheduler"] == (
            "ConfigError: step 2: the lr is 0.01 on rank 0, 0.005 on rank 1; give all ranks the same lr scheduler"
        )
        assert steps == 1


def _raised_again(rank, world_size):
    """The same exception object, first on all ranks, then on one: as of a reader that keeps its error."""
    kept = LookupError("no more rows")

    def broken():
        raise kept
        yield

    def of_a_kind(failing):
        return broken() if failing else iter(odd_batches(1))

    engine = jobs.engine_for(OddModel(), jobs.config(world_size))
    _limited()
    first = _outcome(engine.train_batch, of_a_kind(True))
    return first, _outcome(engine.eval_batch, of_a_kind(rank == 1))


def test_an_exception_object_that_is_raised_again_by_one_rank_alone_is_told():
    (first, second), (other, again) = run_ranks(2, _raised_again)
    assert first == other == again == "LookupError: no more rows"
    assert second == "RankError: rank 1, at eval_batch: LookupError: no more rows"
