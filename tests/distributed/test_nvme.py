"""Partitions on NVMe give the same bits as partitions in memory: real ranks, real files, DeepSpeed's own operator."""

import os
from pathlib import Path

import pytest
import torch
import transformers

import ds_zoadamu

from .harness import run_ranks
from .jobs import as_bytes, config, engine_for, my_share, whole_model

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
    from ds_zoadamu import nvme

    try:
        nvme._load_operator()
    except ds_zoadamu.ConfigError as error:
        pytest.skip(f"no NVMe offload here: {error}")


@pytest.fixture
def drive(tmp_path):
    """A folder with direct input and output."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"{tmp_path} has no direct input and output: {error}")
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


def _train(rank, world_size, device, drive, dtype, momentum):
    accumulation = 2 // world_size
    seen = []

    def loss_fn(module, batch):
        result = module(**batch).loss, torch.tensor(1.0)
        seen.append({k: v for k, v in stored_bytes(engine).items()})
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


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("dtype,momentum", [("fp32", "fp32"), ("bf16", "int8"), ("bf16", "replay")])
def test_a_run_has_the_same_bits_on_nvme_as_in_memory(drive, world_size, dtype, momentum):
    runs = {device: run_ranks(world_size, _train, device, drive, dtype, momentum) for device in ("none", "cpu", "nvme")}
    for rank in range(world_size):
        assert runs["nvme"][rank][0] == ON_NVME
        assert runs["none"][rank][0] == runs["cpu"][rank][0] == []
        assert runs["nvme"][rank][1:] == runs["none"][rank][1:] == runs["cpu"][rank][1:]
        assert runs["nvme"][rank][1] == [True] * STEPS
