"""Every configuration of the repository, as it is, through ``initialize``: "auto" values and all."""

import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from ..helpers.harness import run_ranks
from ..helpers.models import tiny_opt

pytestmark = pytest.mark.ranks

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
NUM_EXAMPLES = 40


def _data():
    ids = torch.randint(3, 60, (NUM_EXAMPLES, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def _every_file(rank, world_size):
    import ds_zoadamu

    results = {}
    for path in CONFIGS:
        settings, config = json.loads(path.read_text()), str(path)
        if settings.get("fp16", {}).get("enabled") is True and not get_accelerator().is_fp16_supported():
            config = settings | {"fp16": {"enabled": False}, "bf16": {"enabled": True}}  # what the refusal says to do
        model = tiny_opt()
        engine, optimizer, loader, scheduler = ds_zoadamu.initialize(model=model, config=config, training_data=_data())
        if settings["optimizer"]["type"] == "AdamW":
            loss = engine(**torch.utils.data.default_collate(_data()[:8])).loss  # DeepSpeed's loader starts processes
            engine.backward(loss)
            engine.step()
            loss, steps = loss.item(), None
        else:
            loss = engine.train_batch(next(iter(loader)))
            steps = getattr(optimizer.rule.config, "total_steps", None), getattr(scheduler, "total_num_steps", None)
        results[path.stem] = loss, steps, engine.train_micro_batch_size_per_gpu()
        engine.destroy()
    return results


def test_every_file_takes_a_step():
    [results] = run_ranks(1, _every_file)
    assert len(results) == len(CONFIGS) >= 10
    for name, (loss, steps, micro_batch) in results.items():
        assert math.isfinite(loss) and 0 < loss < 10, name
        if steps is not None:
            assert any(steps) and set(steps) <= {None, NUM_EXAMPLES // micro_batch}, name
    assert results["cpu-small_mezo"][1] == (None, 5) and results["cpu-small_zoadamu"][1] == (5, 5)
