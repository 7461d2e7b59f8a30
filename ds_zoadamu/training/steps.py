"""One optimizer step on a task, with forward passes only or with backward passes, and what a run needs around it."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from deepspeed import comm as dist

import ds_zoadamu
from ds_zoadamu import kernels
from ds_zoadamu.config import Config
from ds_zoadamu.durability.engine import ZerothOrderEngine
from ds_zoadamu.hf.adapter_files import merge
from ds_zoadamu.hf.models import load_model, load_weights, save_pretrained
from ds_zoadamu.training.output import settings, step_scalars
from ds_zoadamu.training.plan import Plan
from ds_zoadamu.zero3.data import MicroBatchSampler, repeat
from ds_zoadamu.zero3.divergence import nonfinite_parameter
from ds_zoadamu.zero3.instruments import GATHER
from ds_zoadamu.zero3.losses import as_pair, global_means
from ds_zoadamu.zero3.memory import stored_bytes

Section = tuple[Any, str, str]
"""An object, the name of its function, and the part of a step that the function is."""


MakePlan = Callable[[Namespace], Plan]
MakeStepper = Callable[[Plan], "Stepper"]


class Stepper(Protocol):
    """A model, its optimizer and its data: what the loop of a run, a search and a profile step. All ranks call each method."""

    optimizer: str
    """What reports call it."""
    model: torch.nn.Module
    """As an evaluation takes it."""
    durable: ZerothOrderEngine | None
    """What writes its steps to a journal, and checkpoints; None: nothing does."""
    passes_a_step: dict[str, int]
    """Passes over a step's examples: {"forward": ..., "backward": ...}."""
    skipped_steps: int
    """Steps so far whose loss was not finite, so that the weights stood still."""

    def step(self) -> dict:
        """Makes one step; returns its record for metrics.jsonl, with at least `step`, `loss`, `lr`, `skipped` and a gradient
        figure. Raises NonFiniteLossError where it gives up.
        """

    def save(self, folder: Path) -> None:
        """Writes the model as `from_pretrained` reads it, in the place of one that is there."""

    def merge(self, folder: Path) -> None:
        """Writes the whole model with its LoRA adapter added to the weights, and gives the adapter up: it makes no steps after
        that.
        """

    def load(self, folder: Path) -> None:
        """Takes the weights that `save` has written. It makes no steps after that."""

    def nonfinite_parameter(self) -> str | None:
        """The first parameter that holds NaN or infinity."""

    def stored_bytes(self) -> dict[str, int]:
        """Bytes that persist on this rank between steps: weights_bytes and what else there is, see `zero3.memory`."""

    def sections(self) -> Sequence[Section]:
        """The functions that a profile of the parts of a step times."""

    def close(self) -> None:
        """Gives up the model."""


def make_stepper(plan: Plan, config: Config | None = None) -> Stepper:
    """Loads the model into partitions and sets up the engine that the configuration's optimizer asks for.

    Args:
        plan: model, training set and seed of the data order with backward passes (a zeroth-order optimizer has a seed of its
            own).
        config: in place of the plan's.
    """
    args, config = plan.args, config or plan.config
    model = load_model(args.model_name_or_path, config, trust_remote_code=args.trust_remote_code)
    model = plan.tuning.adapted(model, plan.tokenizer, args.seed)
    zeroth_order = config.rule is not None
    engine, _, dataloader, _ = ds_zoadamu.initialize(
        model=model,
        model_parameters=None if zeroth_order else [p for p in model.parameters() if p.requires_grad],
        config=config,
        training_data=plan.sets["train"] if zeroth_order else None,
        collate_fn=plan.task.collate,
        loss_fn=plan.task.loss,
    )
    if zeroth_order:
        return _ForwardOnly(plan, engine, dataloader)
    size, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    return _WithBackward(plan, engine, make_dataloader(plan, size, accumulation))


def make_dataloader(plan: Plan, micro_batch_size: int, accumulation: int) -> torch.utils.data.DataLoader:
    """This rank's micro-batches of the training set, in the order that a zeroth-order engine has with the seed of --seed."""
    deal = micro_batch_size, accumulation, dist.get_rank(), dist.get_world_size()
    sampler = MicroBatchSampler(len(plan.sets["train"]), *deal, plan.args.seed)
    return torch.utils.data.DataLoader(plan.sets["train"], batch_sampler=sampler, collate_fn=plan.task.collate)


def about(plan: Plan, stepper: Stepper) -> dict:
    """What was run and where, for results.json and profile.json."""
    return {
        "task": plan.task.name,
        **plan.task.details,
        **plan.tuning.details(),
        "model": plan.args.model_name_or_path,
        "optimizer": stepper.optimizer,
        "world_size": dist.get_world_size(),
        "passes_a_step": stepper.passes_a_step,
        **settings(plan.args, plan.config),
    }


class Partitioned:
    """What `Stepper`s with an engine on ZeRO-3 partitions have in common."""

    durable: ZerothOrderEngine | None = None

    def __init__(self, plan: Plan, engine, dataloader):
        self.optimizer, self.engine, self.model = plan.config.optimizer, engine, engine.module
        self._plan, self._batches = plan, repeat(dataloader)
        self.load = partial(load_weights, engine)
        self.nonfinite_parameter, self.close = partial(nonfinite_parameter, engine.module), engine.destroy

    @property
    def skipped_steps(self) -> int:
        return self.engine.skipped_steps

    def save(self, folder: Path) -> None:
        save_pretrained(self.engine, folder, self._plan.tokenizer, self._plan.args.max_shard_size, overwrite=True)

    def merge(self, folder: Path) -> None:
        merged = SimpleNamespace(module=merge(self.model))
        save_pretrained(merged, folder, self._plan.tokenizer, self._plan.args.max_shard_size, overwrite=True)

    def stored_bytes(self) -> dict[str, int]:
        return stored_bytes(self.engine)

    def sections(self) -> list[Section]:
        return [(*GATHER, "gather")]


class _ForwardOnly(Partitioned):
    def __init__(self, plan: Plan, engine, dataloader):
        super().__init__(plan, engine, dataloader)
        self.durable = engine
        self.passes_a_step = {"forward": len(engine.optimizer.rule.evaluations(1)), "backward": 0}

    def step(self) -> dict:
        self.engine.train_batch(self._batches)
        record = asdict(self.engine.last_step)
        del record["projected_grads"], record["lrs"]
        return record | record.pop("figures") | step_scalars(self.engine.last_step)

    def sections(self) -> list[Section]:
        engine = self.engine
        return [
            *super().sections(),
            (engine, "loss_fn", "forward"),
            (kernels, "perturb_", "perturb"),
            (engine.optimizer, "step", "update"),
            (engine, "before_update", "journal"),
        ]


class _WithBackward(Partitioned):
    """DeepSpeed's own optimizers, for comparison and pre-training; sees the same micro-batches in the same order."""

    passes_a_step = {"forward": 1, "backward": 1}
    _count = 0

    def step(self) -> dict:
        engine = self.engine
        engine.train()
        lr = float(engine.get_lr()[0])
        pairs = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss, weight = self._plan.task.loss(engine, next(self._batches))
            engine.backward(loss)
            engine.step()
            pairs.append(as_pair((loss, weight), engine.device))
        self._count += 1
        grad_norm = engine.get_global_grad_norm()
        return {
            "step": self._count,
            "loss": global_means([pairs], engine.device)[0],
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": False,
        }

    def sections(self) -> list[Section]:
        parts = (("forward", "forward"), ("backward", "backward"), ("step", "update"))
        return [*super().sections(), *((self.engine, name, part) for name, part in parts)]
