"""One optimizer step on a prompt task, with forward passes only or with backward passes."""

from dataclasses import asdict
from typing import Protocol

import torch
from deepspeed import comm as dist

import ds_zoadamu
from ds_zoadamu.config import Config
from ds_zoadamu.hf.models import load_causal_lm
from ds_zoadamu.tasks import prompt_loss
from ds_zoadamu.training.plan import Plan
from ds_zoadamu.zero3.data import MicroBatchSampler, repeat
from ds_zoadamu.zero3.losses import as_pair, global_means


class Stepper(Protocol):
    """An engine and how it makes a step."""

    engine: "ds_zoadamu.ZerothOrderEngine"
    journaled: bool
    """Whether its steps can be written to a journal."""
    passes_a_step: dict[str, int]
    """Passes over a step's examples: {"forward": ..., "backward": ...}."""

    def step(self) -> dict:
        """Makes one step; returns its record for metrics.jsonl, with at least `loss`, `lr` and a gradient figure."""


def make_stepper(plan: Plan, config: Config | None = None) -> Stepper:
    """Loads the model into partitions and sets up the engine that the configuration's optimizer asks for.

    Args:
        plan: model, training set and seed of the data order with backward passes (a zeroth-order optimizer has a seed of its
            own).
        config: in place of the plan's.
    """
    args, config, collate = plan.args, config or plan.config, plan.model_input.collate
    model = load_causal_lm(args.model_name_or_path, config, trust_remote_code=args.trust_remote_code)
    zeroth_order = config.rule is not None
    engine, _, dataloader, _ = ds_zoadamu.initialize(
        model=model,
        model_parameters=None if zeroth_order else list(model.parameters()),
        config=config,
        training_data=plan.train if zeroth_order else None,
        collate_fn=collate,
        loss_fn=prompt_loss,
    )
    if zeroth_order:
        return _ForwardOnly(engine, dataloader)
    return _WithBackward(engine, _dataloader(engine, plan.train, collate, args.seed))


class _ForwardOnly:
    journaled = True

    def __init__(self, engine, dataloader):
        self.engine = engine
        self.passes_a_step = {"forward": 2 * engine.optimizer.rule.config.num_perturbations, "backward": 0}
        self._batches = repeat(dataloader)

    def step(self) -> dict:
        self.engine.train_batch(self._batches)
        record = asdict(self.engine.last_step)
        del record["projected_grads"], record["lrs"]
        return record | record.pop("figures") | step_scalars(self.engine.last_step)


class _WithBackward:
    """DeepSpeed's own optimizers, for comparison and pre-training; sees the same micro-batches in the same order."""

    journaled = False
    passes_a_step = {"forward": 1, "backward": 1}

    def __init__(self, engine, dataloader):
        self.engine = engine
        self._batches = repeat(dataloader)
        self._count = 0

    def step(self) -> dict:
        engine = self.engine
        engine.train()
        lr = float(engine.get_lr()[0])
        pairs = []
        for _ in range(engine.gradient_accumulation_steps()):
            loss, weight = prompt_loss(engine, next(self._batches))
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


def step_scalars(record) -> dict:
    """Of a step's record, as metrics.jsonl has them: a number, a list for several directions; the first group's lr."""
    grads = record.projected_grads
    return {"projected_grad": grads[0] if len(grads) == 1 else list(grads), "lr": record.lrs[0]}


def _dataloader(engine, examples, collate, seed) -> torch.utils.data.DataLoader:
    sampler = MicroBatchSampler(
        len(examples),
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
        dist.get_rank(),
        dist.get_world_size(),
        seed,
    )
    return torch.utils.data.DataLoader(examples, batch_sampler=sampler, collate_fn=collate)
