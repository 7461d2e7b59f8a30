"""LOMO on partitions against plain gradient descent, and its run with the files that every run writes."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.harness import run_ranks
from tests.helpers.tiny_lm import save_model, write_data

pytestmark = pytest.mark.ranks
pytest.importorskip("lomo_optim", reason="an optional package: pip install --no-deps lomo-optim")

LR, DECAY, STEPS = 0.05, 0.1, 3


def _arguments(folder, name, *more):
    return [
        "--model_name_or_path", f"{folder}/model", "--data_dir", f"{folder}/data", "--task", "sst2", "--num_train", "24",
        "--num_dev", "8", "--per_device_train_batch_size", "4", "--learning_rate", str(LR), "--max_steps", str(STEPS),
        "--output_dir", f"{folder}/{name}", *more,
    ]  # fmt: skip


def _steps(rank, world_size, folder):
    """Of single steps: {parameter: largest difference from gradient descent}, the largest change, lrs, losses, those expected,
    stored bytes; of a profile the parts; of a whole run its results."""
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.lomo import Lomo, make_lomo_plan
    from ds_zoadamu.training.profile import profile
    from ds_zoadamu.training.run import finetune
    from ds_zoadamu.zero3.data import repeat

    from ..helpers.jobs import whole_model

    args = finetune_parser().parse_args(_arguments(folder, f"steps-{world_size}", "--weight_decay", str(DECAY)))
    plan = make_lomo_plan(args)
    stepper = Lomo(plan)
    given, taken = stepper._batches, []
    stepper._batches = (taken.append(batch) or batch for batch in repeat(given))
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).train()
    before, lrs, losses = copy.deepcopy(plain), [], []
    for _ in range(STEPS):
        record = stepper.step()
        lrs.append(record["lr"])
        losses.append(record["loss"])
    batches = [None] * world_size
    torch.distributed.all_gather_object(batches, taken)
    expected = []
    for step, lr in enumerate(lrs):
        plain.zero_grad()
        loss = sum(plan.task.loss(plain, mine[step])[0] for mine in batches) / world_size
        loss.backward()
        expected.append(float(loss.detach()))
        with torch.no_grad():
            for p in plain.parameters():
                p -= lr * (p.grad + DECAY * p)
    found = whole_model(stepper.engine)
    wrong = {n: float((found[n] - p).detach().abs().max()) for n, p in plain.named_parameters()}
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(plain.parameters(), before.parameters(), strict=True))
    stored = stepper.stored_bytes()
    stepper.close()
    run = finetune_parser().parse_args(_arguments(folder, f"run-{world_size}", "--eval_steps", "2"))
    measured = finetune_parser().parse_args(_arguments(folder, f"profile-{world_size}", "--profile_steps", "1"))
    parts = profile(measured, make_lomo_plan, Lomo)["split_seconds"]
    return wrong, moved, lrs, losses, expected, stored, parts, finetune(run, make_lomo_plan, Lomo)


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_is_gradient_descent_on_partitions(tmp_path, world_size):
    save_model(tmp_path / "model", dropout=0.0)
    write_data(tmp_path / "data")
    wrong, moved, lrs, losses, expected, stored, parts, results = run_ranks(world_size, _steps, str(tmp_path))[0]
    assert lrs == [LR, LR * (1 - 1 / STEPS), LR * (1 - 2 / STEPS)]
    assert losses == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    assert max(wrong.values()) < 1e-4 * moved, wrong  # as above, over the gradient
    assert stored["optimizer_state_bytes"] == stored["gradients_bytes"] == 0 < stored["weights_bytes"]
    assert {"gather", "forward", "backward", "other"} <= parts.keys()
    assert results["optimizer"] == "LOMO" and results["passes_a_step"] == {"forward": 1, "backward": 1}
    assert (tmp_path / f"run-{world_size}" / "model" / "config.json").exists()
