"""Partitions on NVMe give the same bits as partitions in memory: real ranks, real files, DeepSpeed's own operator."""

import json
import os
from pathlib import Path

import deepspeed
import pytest
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

import ds_zoadamu
from ds_zoadamu.durability.digest import weights_digest
from ds_zoadamu.zero3 import nvme

from ..helpers import commands
from ..helpers.harness import free_port, run_ranks
from ..helpers.jobs import as_bytes, config, engine_for, my_share, whole_model

pytestmark = [pytest.mark.ranks, pytest.mark.nvme]

WIDTH, STEPS = 513, 4
TIMES = {"t1": 1, "t2": 3, "t3": 4, "zo_eps": 1e-2}  # STEPS cross both t1 and t2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_NVME = ["up.weight", "down.weight", "frozen.weight"]  # above 1 MiB a rank, in bf16 on 2 ranks too


class WideModel(torch.nn.Module):
    """A language model with large and small parameters, trained and frozen; an odd number of elements in most."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = torch.nn.Embedding(11, WIDTH)
        self.up = torch.nn.Linear(WIDTH, 4 * WIDTH - 3)
        self.down = torch.nn.Linear(4 * WIDTH - 3, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.out = torch.nn.Linear(4 * WIDTH, 11)
        self.frozen.weight.requires_grad_(False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.04)
        self.to(dtype)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        x = x + self.down(torch.tanh(self.up(x)))
        logits = self.out(torch.tanh(self.frozen(x))).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.fixture(scope="module", autouse=True)
def operator():
    """DeepSpeed's ``async_io``, built once: with it a rank starts in no time."""
    try:
        nvme._load_operator()
    except ds_zoadamu.ConfigError as error:
        pytest.skip(f"no NVMe offload here: {error}")


@pytest.fixture
def drive(tmp_path):
    """A folder with direct input and output, on a machine where the buffers can be page-locked."""
    try:
        nvme._check_folder(tmp_path)
        nvme._check_page_locking(4 * 4 * 1_100_000)
    except ds_zoadamu.ConfigError as error:
        pytest.skip(f"no NVMe offload here: {error}")
    return tmp_path


def zero_section(device: str, drive: Path, **changes) -> dict:
    offload = {"device": device}
    if device == "nvme":
        offload |= {"nvme_path": str(drive), "buffer_count": 4, "buffer_size": 1_100_000}
    return {"offload_param": offload | changes, "stage3_param_persistence_threshold": 0}


def precision(dtype: str) -> dict:
    return {} if dtype == "fp32" else {dtype: {"enabled": True}}


def engine_on(device: str, drive: Path, world_size: int, dtype: str = "fp32", momentum: str = "int8", accumulation=1, **kwargs):
    storage = {"dtype": momentum} | ({"window_tolerance": 0.05} if momentum == "replay" else {})
    settings = config(
        world_size,
        accumulation,
        zero=zero_section(device, drive),
        params={"momentum": storage, "weight_decay": 0.1, **TIMES},
        **precision(dtype),
    )
    return engine_for(WideModel(DTYPES[dtype]), settings, **kwargs)


def batches_for(num: int) -> list[dict]:
    ids = torch.randint(0, 11, (num, 2, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": i, "labels": i} for i in ids]


def swapped_out(engine) -> list[str]:
    """Names of the parameters whose partition is in a file and not in memory."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    return [n for n, p in engine.module.named_parameters() if p.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE]


def stored_bytes(engine) -> dict[str, bytes]:
    """Weights and momentum of this rank."""
    stored = {}
    for partition in engine.optimizer.partitions:
        with partition.loaded():
            tensors = engine.optimizer.stored(partition).items()
            stored |= as_bytes({f"{kind}/{partition.name}": tensor.clone() for kind, tensor in tensors})
    return stored


def _train_each(rank, world_size, devices, *settings):
    return {device: _train(rank, world_size, device, *settings) for device in devices}


def _train(rank, world_size, device, drive, dtype, momentum):
    accumulation = 2 // world_size
    seen = []

    def loss_fn(module, batch):
        result = module(**batch).loss, torch.tensor(1.0)
        seen.append(stored_bytes(engine))
        return result

    engine = engine_on(device, drive, world_size, dtype, momentum, accumulation, loss_fn=loss_fn)
    files = swapped_out(engine)
    batches, losses, kept = batches_for(2 * STEPS), [], []
    for step in range(STEPS):
        seen.clear()
        before = stored_bytes(engine)
        engine.train_batch(my_share(batches, step, accumulation, rank, world_size))
        kept.append(all(shards == before for shards in seen) and before != stored_bytes(engine))
        losses.append((engine.last_step.loss_plus, engine.last_step.loss_minus))
    losses.append(engine.eval_batch(my_share(batches, 0, accumulation, rank, world_size)))
    assert swapped_out(engine) == files  # every buffer has been given back
    losses.append(engine.optimizer.coinciding_share() if rank == 0 else None)
    held, weights = engine.memory_bytes(), as_bytes(whole_model(engine))
    engine.destroy()
    return files, kept, losses, held, weights


@pytest.mark.parametrize(
    "world_size,dtype,momentum", [(1, "fp32", "fp32"), (2, "fp32", "int8"), (2, "bf16", "int8"), (1, "bf16", "replay")]
)
def test_a_run_has_the_same_bits_on_nvme_as_in_memory(drive, world_size, dtype, momentum):
    for runs in run_ranks(world_size, _train_each, ("none", "cpu", "nvme"), drive, dtype, momentum):
        assert runs["nvme"][0] == ON_NVME
        assert runs["none"][0] == runs["cpu"][0] == []
        assert runs["nvme"][1:] == runs["none"][1:] == runs["cpu"][1:]
        assert runs["nvme"][1] == [True] * STEPS


def _read_ahead(rank, world_size, drive):
    engine = engine_for(WideModel(), config(world_size, zero=zero_section("nvme", drive, buffer_count=1), params=TIMES))
    (batch,) = batches_for(1)
    losses = [engine.eval_batch(batch)]
    later = dict(engine.module.named_parameters())["frozen.weight"]
    later.nvme_swapper.swap_in([later], async_op=True)  # as DeepSpeed does, of a parameter that is not the next one
    losses.append(engine.eval_batch(batch))
    return losses


def test_what_was_read_too_early_makes_room(drive):
    ((plain, crowded),) = run_ranks(1, _read_ahead, drive)
    assert plain == crowded


def _without_fp16(rank, world_size, drive):
    get_accelerator().is_fp16_supported = lambda: False  # as on most CPUs; DeepSpeed's own dtypes depend on it
    return _train(rank, world_size, "nvme", drive, "fp32", "int8")


def test_without_fp16_the_buffers_of_an_fp32_model_are_fp32(drive):
    assert run_ranks(2, _without_fp16, drive) == run_ranks(2, _train, "nvme", drive, "fp32", "int8")


def test_deepspeed_still_ignores_the_dtype_that_it_is_given_where_there_is_no_fp16(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    given = InsertPostInitMethodToModuleSubClasses(enabled=False, dtype=torch.float32)
    assert given.dtype == torch.bfloat16, "DeepSpeed has mended it: remove partition.partition_onto_nvme"


def _trained_with(rank, world_size, drive, changes):
    settings = config(world_size, zero=zero_section("nvme", drive, **changes), params=TIMES)
    engine = engine_for(WideModel(), settings)
    losses = [engine.train_batch(batch) for batch in batches_for(STEPS)]
    engine.empty_partition_cache()
    try:
        whole = [p for n, p in engine.module.named_parameters() if n in ON_NVME]
        with deepspeed.zero.GatheredParameters(whole):
            gathered = "all at once"
    except RuntimeError as error:
        gathered = str(error)
    return losses, gathered


def test_few_buffers_do_and_too_few_are_named(drive):
    one, four = (run_ranks(1, _trained_with, drive, {"buffer_count": count})[0] for count in (1, 4))
    assert one[0] == four[0]
    assert four[1] == "all at once"
    assert "3 partitions" in one[1] and "1 of 1 buffers" in one[1] and "buffer_count" in one[1]


# --- from one place to another


def _first_run(rank, world_size, device, drive, folder):
    engine, batches = engine_on(device, drive, world_size, "bf16"), batches_for(10)
    engine.open_journal(folder / "journal.jsonl")
    for step in range(3):
        engine.train_batch(batches[step])
        if step == 1:
            engine.save_checkpoint(folder)
    digest = weights_digest(engine)
    engine.close_journal()
    return digest, engine.train_batch(batches[3]), weights_digest(engine)


def _resumed(rank, world_size, device, drive, folder, checkpoints):
    engine, batches = engine_on(device, drive, world_size, "bf16"), batches_for(10)
    resumed = engine.resume(folder / "journal.jsonl", folder if checkpoints else None)
    engine.close_journal()
    digest = weights_digest(engine)
    return (resumed.step, resumed.replayed), (digest, engine.train_batch(batches[3]), weights_digest(engine))


@pytest.mark.parametrize("world_size,first,then", [(2, "nvme", "none"), (1, "cpu", "nvme")])
def test_checkpoint_and_journal_go_on_elsewhere(drive, world_size, first, then):
    expected = run_ranks(world_size, _first_run, first, drive / "drive", drive)
    for checkpoints, replayed in ((True, 1), (False, 3)):
        found = run_ranks(world_size, _resumed, then, drive / "drive", drive, checkpoints)
        assert found == [((3, replayed), answer) for answer in expected]


def _saved(rank, world_size, device, drive, base, target):
    settings = config(world_size, zero=zero_section(device, drive), params=TIMES, bf16={"enabled": True})
    engine = engine_for(ds_zoadamu.load_model(str(base), config=settings), settings)
    files = swapped_out(engine)
    for batch in batches_for(2):
        engine.train_batch(batch)
    ds_zoadamu.save_pretrained(engine, target)
    return len(files)


def test_save_pretrained_writes_the_same_model(drive):
    base = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=11,
            hidden_size=512,
            ffn_dim=2049,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            word_embed_proj_dim=512,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )  # fmt: skip
    )
    base.to(torch.bfloat16).save_pretrained(drive / "base")
    in_files = {device: run_ranks(2, _saved, device, drive, drive / "base", drive / device) for device in ("none", "nvme")}
    assert in_files == {"none": [0, 0], "nvme": [4, 4]}  # fc1 and fc2 of two layers
    written = {device: (drive / device / "model.safetensors").read_bytes() for device in ("none", "nvme")}
    assert written["none"] == written["nvme"] != (drive / "base" / "model.safetensors").read_bytes()


def test_a_rehearsal_runs_on_nvme(drive):
    path = drive / "ds.json"
    # Transformers gathers attention's four matrices at once to initialise them.
    zero = {"stage": 3, **zero_section("nvme", drive, buffer_count=4, buffer_size=40_000_000)}
    optimizer = {"type": "ZOAdaMU", "params": {"lr": 1e-6, "total_steps": 9}}
    path.write_text(json.dumps({"zero_optimization": zero, "optimizer": optimizer, "bf16": {"enabled": True}}))
    words = ["--model", "opt-125m", "--config", path, "--batch", "1", "--seq", "8", "--rehearse", "--rehearse-layers", "1"]
    # Status 0: weights and momentum are those planned, to the byte.
    done = commands.run(drive / "output", "-m", "ds_zoadamu.plan", *words, MASTER_PORT=str(free_port()))
    assert "rehearsal: 2 steps" in done.stdout
    assert len(list(drive.rglob("*.swp"))) >= 8  # two embeddings and the six matrices of a layer


# --- what is refused, on all ranks, before the model is touched


def _refused(rank, world_size, zero, environment):
    """The message, and whether the model was left alone; ``zero`` has a section for each rank."""
    os.environ.update(environment)
    model = WideModel()
    with pytest.raises(ds_zoadamu.ConfigError) as caught:
        engine_for(model, config(world_size, zero=zero[rank]))
    return str(caught.value), not any(hasattr(p, "ds_id") for p in model.parameters())


def _messages(zero: list[dict], environment: dict | None = None) -> list[str]:
    answers = run_ranks(len(zero), _refused, zero, environment or {})
    assert all(untouched for _, untouched in answers)
    return [message for message, _ in answers]


def test_a_path_that_cannot_be_written_on_one_rank_is_named_on_all(drive):
    (drive / "file").touch()
    messages = _messages([zero_section("nvme", drive), zero_section("nvme", drive / "file" / "below")])
    assert all("nvme_path" in m and "below" in m and "cannot be written" in m for m in messages)
    assert messages[0].startswith("rank 1: ")


def test_an_operator_that_cannot_be_built_is_named_with_what_to_install(drive):
    # A machine without compilers; the cache is empty, so nothing that was built before helps.
    (message,) = _messages(
        [zero_section("nvme", drive)], {"CC": "/none", "CXX": "/none", "TORCH_EXTENSIONS_DIR": str(drive / "empty")}
    )
    assert "async_io" in message and "apt-get install libaio-dev" in message


def test_buffers_smaller_than_a_partition_and_large_persistent_parameters_are_refused(drive):
    (message,) = _messages([zero_section("nvme", drive, buffer_size=1000)])
    assert "buffer_size is 1000" in message and "'up.weight' has 1051137" in message
    (message,) = _messages([zero_section("nvme", drive) | {"stage3_param_persistence_threshold": 1e6}])
    assert "stage3_param_persistence_threshold is 1e+06" in message and "below 262144" in message


def test_buffers_that_cannot_be_page_locked_are_refused(drive):
    terabytes = 10**13  # more than the memory of any machine that runs this
    (message,) = _messages([zero_section("nvme", drive, buffer_size=terabytes)])
    assert "buffer_count x buffer_size are" in message and "ulimit -l" in message


def test_a_drive_in_use_by_another_process_is_refused(drive):
    nvme._claim(drive)
    (message,) = _messages([zero_section("nvme", drive)])
    assert "another running process uses" in message


# --- models of several dtypes ------------------------------------------------------------------------------------------------


def _mixed(first: torch.dtype, **dtypes: torch.dtype) -> WideModel:
    model = WideModel(first)
    for name, dtype in dtypes.items():
        getattr(model, name).to(dtype)
    return model


def _mixed_dtypes(rank, world_size, drive):
    """The messages with which models of several dtypes are refused, and what a small parameter of its own dtype holds."""
    messages = {}
    for name, model in {
        "large": _mixed(torch.float32, frozen=torch.bfloat16),
        "first": _mixed(torch.float32, up=torch.bfloat16, down=torch.bfloat16, frozen=torch.bfloat16, out=torch.bfloat16),
        "small": _mixed(torch.float32, out=torch.bfloat16),
    }.items():
        settings = config(world_size, zero=zero_section("nvme", drive))
        try:
            engine = engine_for(model, settings)
            messages[name] = engine.module.out.weight.dtype, swapped_out(engine)
            engine.destroy()
        except ds_zoadamu.ConfigError as error:
            assert not any(hasattr(p, "ds_id") for p in model.parameters())
            messages[name] = str(error)
    return messages


def test_a_model_of_several_dtypes_is_refused_where_one_would_be_stored_in_another(drive):
    [messages] = run_ranks(1, _mixed_dtypes, str(drive))
    assert "'frozen.weight' is of torch.bfloat16, and offload_param to NVMe would store it as torch.fl" in messages["large"]
    assert "'up.weight' is of torch.bfloat16" in messages["first"] and "one dtype" in messages["first"]
    assert messages["small"] == (torch.bfloat16, ON_NVME)  # it stays in memory, where each has its own
