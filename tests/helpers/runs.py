"""Short training runs with a journal, for the tests of checkpoints, resume and replay. What they return is small: digests and
numbers."""

import hashlib
from pathlib import Path

import torch

from .models import OddModel, tiny_opt

MICRO_BATCHES_A_STEP = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def options(total_steps: int = 12, **changes) -> dict:
    """Optimizer options whose schedule goes through warm-up, annealing and plateau in a few steps."""
    return {
        "lr": 2e-3,
        "zo_eps": 1e-2,
        "seed": 5,
        "total_steps": total_steps,
        "t1": 2,
        "t2": 6,
        "t3": 12,
        "weight_decay": 0.1,
    } | changes


def config(
    world_size: int, dtype: str = "fp32", momentum: str = "int8", scheduler: bool = False, rule: str = "ZOAdaMU", **changes
) -> dict:
    """A DeepSpeed configuration of 4 micro-batches a step on 1, 2 or 4 ranks; on 3 ranks 6 of them."""
    accumulation = max(1, MICRO_BATCHES_A_STEP // world_size) if world_size != 3 else 2
    storage = {"dtype": momentum}
    if momentum == "replay":
        storage |= {"window_tolerance": 0.05, "max_window": 200}
    params = options(momentum=storage, **changes)
    from ds_zoadamu.rules import RULES

    params = {key: value for key, value in params.items() if key in RULES[rule].config_class.names()}
    result = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 10**9,
        "optimizer": {"type": rule, "params": params},
    }
    if scheduler:
        result["scheduler"] = {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 3e-3, "warmup_num_steps": 7, "warmup_type": "linear"},
        }
    if dtype != "fp32":
        result[dtype] = {"enabled": True}
    return result


class Sentences(torch.utils.data.Dataset):
    """Random token sequences with labels, the same for everyone."""

    def __init__(self, num: int = 24, vocab: int = 11, length: int = 6):
        self.ids = torch.randint(0, vocab, (num, length), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def skipping_loss(bad_steps: tuple[int, ...], counter: dict):
    """The model's loss, but infinite in the given steps, as an overflow in fp16 would make it."""
    from ds_zoadamu.zero3.losses import model_loss

    def loss(module, batch):
        value, weight = model_loss(module, batch)
        return (value * float("inf") if counter["engine"].optimizer.next_step in bad_steps else value), weight

    return loss


def make_engine(world_size: int, *, model: str = "odd", dtype: str = "fp32", frozen: str = "", **settings):
    """(engine, endless iterator of micro-batches) of a run that is the same for 1, 2 and 4 ranks. ``model``: "odd", "opt" or a
    folder; ``frozen``: the end of the name of a parameter that is not trained."""
    if model == "odd":
        module, vocab = OddModel(DTYPES[dtype]), 11
    elif model == "opt":
        module, vocab = tiny_opt(DTYPES[dtype]), 67
    else:
        from ds_zoadamu.hf.models import load_causal_lm

        module, vocab = load_causal_lm(model, config(world_size, dtype), dtype=DTYPES[dtype]), 67
    for name, param in module.named_parameters():
        if frozen and name.endswith(frozen):
            param.requires_grad_(False)
    return engine_of(module, world_size, dtype=dtype, vocab=vocab, **settings)


def engine_of(module, world_size: int, *, bad_steps: tuple[int, ...] = (), dtype: str = "fp32", vocab: int = 11, **settings):
    """As ``make_engine``, for a model. In ``bad_steps`` the loss is infinite."""
    import ds_zoadamu
    from ds_zoadamu.zero3.data import repeat

    counter: dict = {}
    engine, _, loader, _ = ds_zoadamu.initialize(
        model=module,
        config=config(world_size, dtype, **settings),
        training_data=Sentences(vocab=vocab),
        loss_fn=skipping_loss(bad_steps, counter) if bad_steps else None,
    )
    counter["engine"] = engine
    return engine, repeat(loader)


def state(engine) -> dict:
    """What must be equal between an interrupted and an uninterrupted run."""
    from ds_zoadamu.durability.checkpoint import weights_digest

    return {
        "weights": weights_digest(engine),
        "momentum": momentum_digest(engine),
        "step": engine.optimizer.step_count,
        "counters": [engine.global_steps, engine.global_samples, engine.skipped_steps],
        "lr": [float(group["lr"]) for group in engine.optimizer.param_groups],
    }


def momentum_digest(engine) -> str:
    """Over the momentum of all ranks, in the order of elements."""
    import torch.distributed as dist

    digest = hashlib.sha256()
    for partition in engine.optimizer.partitions:
        for momentum in engine.optimizer.stored_state(partition).values():
            mine = bytes(momentum.contiguous().view(torch.uint8).numpy())
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
            digest.update(b"".join(parts))
    return digest.hexdigest()


def train(engine, batches, until: int, *, save_every: int = 0, folder: Path | None = None, **save_options) -> None:
    """Steps up to step ``until``, saving on the way."""
    while engine.optimizer.step_count < until:
        engine.train_batch(batches)
        if save_every and engine.optimizer.step_count % save_every == 0:
            engine.save_checkpoint(folder, **save_options)


def run(
    rank: int,
    world_size: int,
    folder: str | None,
    steps: int,
    *,
    resume: bool = False,
    save_every: int = 0,
    base=None,
    **settings,
) -> dict:
    """One run in ``folder`` (none: without journal), from the start or resumed, to step ``steps``; returns ``state``."""
    engine, batches = make_engine(world_size, **settings)
    if folder is not None and resume:
        engine.resume(Path(folder) / "journal.jsonl", folder, base=base)
    elif folder is not None:
        engine.open_journal(Path(folder) / "journal.jsonl", base=base)
    train(engine, batches, steps, save_every=save_every, folder=Path(folder) if folder else None)
    result = state(engine)
    engine.destroy()
    return result
