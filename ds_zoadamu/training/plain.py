"""MeZO as it is run without ZeRO-3: the whole model on one device, its weights perturbed in place by noise that is drawn again
from a seed. Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023.
"""

import math
from argparse import Namespace
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig

from ds_zoadamu.distributed.start import launched_world_size
from ds_zoadamu.errors import NonFiniteLossError
from ds_zoadamu.hf.kinds import model_kind
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training.arguments import check_arguments, refuse_search
from ds_zoadamu.training.plan import Plan, encode_splits, read_model_input
from ds_zoadamu.training.steps import Section, make_dataloader
from ds_zoadamu.zero3.data import repeat
from ds_zoadamu.zero3.start import init_distributed

_LR, _ZO_EPS, _MAX_SKIPPED = 1e-6, 1e-3, 10


def make_plain_plan(args: Namespace) -> Plan:
    """As `make_plan`, of `finetune_parser`'s arguments; a DeepSpeed JSON is not read.

    Raises:
        InputError: as `make_plan`; more than one rank, a weight decay.
    """
    check_arguments(args)
    if launched_world_size() != 1:
        raise InputError(f"the plain MeZO loop holds the whole model: it runs on 1 rank, not on {launched_world_size()}")
    if args.weight_decay:
        raise InputError(f"--weight_decay {args.weight_decay}: the plain MeZO loop has none; leave it out")
    refuse_search(args, "the plain MeZO loop")
    model_input = read_model_input(args)
    model_input.tuning.require_full("the plain MeZO loop")
    return encode_splits(args, None, model_input)


class PlainMeZO:
    """theta <- theta - lr g z with z ~ N(0, I) and g = (L(theta + zo_eps z) - L(theta - zo_eps z)) / (2 zo_eps).

    A `Stepper` without partitions: what a user would take instead of this project.
    """

    optimizer = "plain MeZO"
    durable = None
    passes_a_step = {"forward": 2, "backward": 0}

    def __init__(self, plan: Plan):
        init_distributed()
        args = plan.args
        self._loss_of, self._trust = plan.task.loss, args.trust_remote_code
        self._lr = _LR if args.learning_rate is None else args.learning_rate
        self._zo_eps = _ZO_EPS if args.zo_eps is None else args.zo_eps
        self._accumulation = args.gradient_accumulation_steps or 1
        self._batches = repeat(make_dataloader(plan, args.per_device_train_batch_size or 8, self._accumulation))
        self._dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.load(args.model_name_or_path)
        self._seeds = torch.Generator().manual_seed(args.seed)
        self._noise = torch.Generator(next(self.model.parameters()).device)
        self._count = self._skipped_in_a_row = self.skipped_steps = 0

    @torch.no_grad()
    def step(self) -> dict:
        """One step; its record has loss_plus, loss_minus and what follows from them."""
        micro_batches = [next(self._batches) for _ in range(self._accumulation)]
        seed, zo_eps = int(torch.randint(2**62, (1,), generator=self._seeds)), self._zo_eps
        self.perturb(seed, zo_eps)
        loss_plus = self.loss(micro_batches)
        self.perturb(seed, -2 * zo_eps)
        loss_minus = self.loss(micro_batches)
        self.perturb(seed, zo_eps)
        projected_grad = (loss_plus - loss_minus) / (2 * zo_eps)
        self._count += 1
        if skipped := not math.isfinite(projected_grad):
            self._skip()
        else:
            self.update(seed, -self._lr * projected_grad)
            self._skipped_in_a_row = 0
        losses = {"loss": (loss_plus + loss_minus) / 2, "loss_plus": loss_plus, "loss_minus": loss_minus}
        return {"step": self._count, **losses, "projected_grad": projected_grad, "lr": self._lr, "skipped": skipped}

    def perturb(self, seed: int, scale: float) -> None:
        """theta <- theta + scale z, with the z of a seed."""
        self._noise.manual_seed(seed)
        for p in self.model.parameters():
            p.add_(torch.empty_like(p).normal_(generator=self._noise), alpha=scale)

    update = perturb  # another part of a profile

    def loss(self, micro_batches: list) -> float:
        """The mean loss of a step's micro-batches."""
        pairs = [tuple(map(float, self._loss_of(self.model, batch))) for batch in micro_batches]
        return sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)

    def _skip(self) -> None:
        self.skipped_steps, self._skipped_in_a_row = self.skipped_steps + 1, self._skipped_in_a_row + 1
        if self._skipped_in_a_row == _MAX_SKIPPED:
            raise NonFiniteLossError(
                f"step {self._count}: the loss of {_MAX_SKIPPED} steps in a row was not finite; lower the lr"
            )

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder: str | Path) -> None:
        auto = model_kind(AutoConfig.from_pretrained(folder, trust_remote_code=self._trust)).auto
        model = auto.from_pretrained(folder, dtype=self._dtype, trust_remote_code=self._trust)
        self.model = model.to(get_accelerator().current_device_name()).eval()

    def nonfinite_parameter(self) -> str | None:
        return next((name for name, p in self.model.named_parameters() if not p.isfinite().all()), None)

    def stored_bytes(self) -> dict[str, int]:
        return {"weights_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters())}

    def sections(self) -> list[Section]:
        return [(self, "loss", "forward"), (self, "perturb", "perturb"), (self, "update", "update")]

    def close(self) -> None:
        del self.model
