"""MeZO as it is run without ZeRO-3: the whole model on one device, its weights perturbed in place by noise that is drawn again
from a seed. What a user would take instead of this project; launch/benchmark.py runs it beside the others.

    python launch/plain_mezo.py --model_name_or_path facebook/opt-125m --task sst2 --max_steps 1000 --output_dir outputs/plain

Takes launch/finetune.py's arguments but for the DeepSpeed JSON, on one rank, and writes the same metrics.jsonl and results.json
(or profile.json). Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
"""

import math
import time

import torch
from deepspeed.accelerator import get_accelerator

from ds_zoadamu.benchmark.plain import run_plain
from ds_zoadamu.distributed.ending import run_command
from ds_zoadamu.tasks import prompt_loss
from ds_zoadamu.training.arguments import finetune_parser
from ds_zoadamu.training.main import run_script


class PlainMeZO:
    """theta <- theta - lr g z with z ~ N(0, I) and g = (L(theta + zo_eps z) - L(theta - zo_eps z)) / (2 zo_eps)."""

    def __init__(self, model: torch.nn.Module, lr: float, zo_eps: float, seed: int):
        self.model, self.lr, self.zo_eps = model, lr, zo_eps
        self.split = {"forward": 0.0, "perturb": 0.0, "update": 0.0}
        self._seeds = torch.Generator().manual_seed(seed)
        self._noise = torch.Generator(next(model.parameters()).device)

    def _add_noise(self, seed: int, scale: float, part: str) -> None:
        start = time.perf_counter()
        self._noise.manual_seed(seed)
        for p in self.model.parameters():
            p.add_(torch.empty_like(p).normal_(generator=self._noise), alpha=scale)
        get_accelerator().synchronize()
        self.split[part] += time.perf_counter() - start

    def _loss(self, micro_batches: list) -> float:
        start = time.perf_counter()
        pairs = [prompt_loss(self.model, batch) for batch in micro_batches]
        loss = sum(loss.item() * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)
        self.split["forward"] += time.perf_counter() - start
        return loss

    @torch.no_grad()
    def step(self, micro_batches: list) -> dict:
        """One step; returns loss_plus, loss_minus and what follows from them."""
        seed = int(torch.randint(2**62, (1,), generator=self._seeds))
        self._add_noise(seed, self.zo_eps, "perturb")
        loss_plus = self._loss(micro_batches)
        self._add_noise(seed, -2 * self.zo_eps, "perturb")
        loss_minus = self._loss(micro_batches)
        self._add_noise(seed, self.zo_eps, "perturb")
        projected_grad = (loss_plus - loss_minus) / (2 * self.zo_eps)
        skipped = not math.isfinite(projected_grad)
        if not skipped:
            self._add_noise(seed, -self.lr * projected_grad, "update")
        losses = {"loss": (loss_plus + loss_minus) / 2, "loss_plus": loss_plus, "loss_minus": loss_minus}
        return {**losses, "projected_grad": projected_grad, "lr": self.lr, "skipped": skipped}


def main() -> int:
    args = finetune_parser().parse_args()
    return run_script(lambda: run_plain(args, PlainMeZO))


if __name__ == "__main__":
    run_command(main)
