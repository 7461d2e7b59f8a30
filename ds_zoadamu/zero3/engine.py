"""The DeepSpeed engine whose step is forward passes alone."""

import logging
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.constants import ROUTE_TRAIN
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import log_dist, logger

from .. import kernels
from ..config import Config
from ..config.learning_rate import begins_at_zero, beyond_plan, check_lrs, check_scheduler
from ..console.progress import say
from ..distributed import collective
from ..errors import ConfigError, NonFiniteLossError
from ..rules import RULES, Evaluation
from . import divergence, forward_hooks, nvme
from .batches import drawn_of, fresh, mapped
from .data import MicroBatchLoader, MicroBatchSampler, MicroBatchStream, TrainingData, check_training_data, is_stream
from .draws import CommonDraws, undrawn
from .evaluation import Evaluator, evaluating
from .losses import LossFn, as_pair, global_means, model_loss
from .optimizer import ZerothOrderOptimizer
from .partition import (
    Fill,
    PerturbedGathers,
    find_partitions,
    lift_scalars,
    lower_scalars,
    partition_onto_nvme,
    reject_stored_dtypes,
)
from .records import RunState, StepRecord
from .throughput import Pace, StepTimer
from .unusable import TrainedSet, reject_unusable


class ForwardOnlyEngine(DeepSpeedEngine):
    """A DeepSpeedEngine with ``train_batch`` and ``eval_batch`` for a zeroth-order optimizer on ZeRO-3 partitions.

    JSON scheduler, monitor, counters, batch arithmetic and ``engine.module`` are DeepSpeed's. The parameters are partitioned
    as for ZeRO-Inference: no fp32 master copy, no gradient buffers. For any other optimizer it is DeepSpeed's own engine.
    """

    optimizer: ZerothOrderOptimizer
    last_step: StepRecord | None = None

    def __init__(self, *args, settings: Config, loss_fn: LossFn | None = None, **kwargs):
        self.settings = settings  # before DeepSpeed's set-up, which calls what is below
        super().__init__(*args, **kwargs)
        self.loss_fn = loss_fn or model_loss
        self._skipped_in_a_row = 0
        self._pace = Pace()
        if "transformers" in sys.modules and self.zero_optimization_partition_weights():
            from . import hf as hf_zero3  # not above: importing Transformers takes seconds, and not every model is one of its

            hf_zero3.attach(self.module, self.config)
        self._told_beyond: set[str] = set()
        self._evaluator = Evaluator(self._evaluate)
        if self._is_zeroth_order:
            self.tput_timer = StepTimer(self._config.timers_config, self.train_batch_size(), 2, self.steps_per_print())

    # --- one step

    def train_batch(self, batch: Any = None, *, micro_batches: Sequence[Any] | None = None) -> float:
        """One zeroth-order step; returns the mean of loss_plus and loss_minus, the same on all ranks.

        Args: ``batch``: an iterator, from which gradient_accumulation_steps micro-batches are drawn, or one micro-batch where
        that is 1; or in its place ``micro_batches``, any number of them, as many on each rank. The model runs in eval mode (no
        dropout) and without gradients; the same micro-batches, and the same random numbers drawn by the loss, serve all
        perturbations, and the same perturbation both signs.

        Raises, on all ranks: StopIteration when a rank's iterator is empty; ValueError for one that ends within a step, and for
        weights that sum to 0; ConfigError where requires_grad of a parameter was changed; NonFiniteLossError after
        ``max_skipped_steps`` steps in a row whose loss was not finite; NonFiniteWeightsError at step 1 where the model's
        weights are the reason; what data or ``loss_fn`` raise, on other ranks a RankError that names the first rank and its
        error.
        """
        self._require_zeroth_order("train_batch")
        with collective.together(f"train_batch of step {self.optimizer.next_step}"):
            self._trained_set.reject_changes()
            self._check_lrs()
            drawn = self._draw(batch, micro_batches)
            self.tput_timer.begin_step()
            record = self.recorded_step() or self._evaluated_step(drawn)
            self.before_update(record, batch, drawn)
            self.optimizer.observe(None if record.skipped else record.projected_grads)
            with self.gathers.writing():
                self._step_and_count()
            self.last_step = record
            self._report(record)
        self._stop_if_diverged(record)
        return record.loss

    def recorded_step(self) -> StepRecord | None:
        """What is known of the next step without forwards."""
        return None

    def _evaluated_step(self, drawn: Sequence[Any]) -> StepRecord:
        """The next step's losses: a pass over its micro-batches for each evaluation that the rule wants."""
        micro_batches = [self._to_device(micro_batch) for micro_batch in drawn]
        passes, draws = [], CommonDraws()
        with evaluating(self.module):
            for evaluation in self.optimizer.rule.evaluations(self.optimizer.next_step):
                with self.gathers.perturbed(self._fill(evaluation)):
                    passes.append([self._loss(fresh(batch)) for batch in draws.before_each(micro_batches)])
        record = self._record(global_means(passes, self.device))
        if record.skipped and record.step == 1:
            divergence.refuse_nonfinite_weights(self, record)
        return record

    def eval_batch(self, batch: Any) -> float:
        """The loss at the unperturbed parameters, reduced as in ``train_batch``; changes nothing. The same on all ranks.

        Args: ``batch``: one micro-batch; an iterator, from which up to gradient_accumulation_steps micro-batches are drawn,
        fewer at its end, so that calls until StopIteration leave none out; or a data loader, of which all are taken. Ranks may
        have different numbers of them. Raises as ``train_batch`` does.
        """
        self._require_zeroth_order("eval_batch")
        over_training_data = batch.unchanged() if isinstance(batch, TrainingData) else nullcontext()
        with collective.together("eval_batch"), evaluating(self.module), undrawn(), over_training_data:
            return self._evaluator.mean(batch, self.gradient_accumulation_steps(), self.device)

    def _evaluate(self, micro_batch: Any) -> torch.Tensor:
        if (data := self.own_data) is not None:
            data.note_evaluated(micro_batch)
        return self._loss(fresh(self._to_device(micro_batch)))

    # --- where the run is

    @property
    def own_data(self) -> TrainingData | None:
        """The engine's own training data loader, or None where the user deals out the data."""
        loader = self.training_dataloader
        return loader if isinstance(loader, TrainingData) else None

    def state(self) -> RunState:
        """Where the run is, beside its partitions; the same on all ranks."""
        return RunState(
            step=self.optimizer.step_count,
            global_steps=self.global_steps,
            global_samples=self.global_samples,
            skipped_steps=self.skipped_steps,
            skipped_in_a_row=self._skipped_in_a_row,
            rule_scalars=self.optimizer.scalars,
            lrs=tuple(float(group["lr"]) for group in self.optimizer.param_groups),
            lr_scheduler=None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            data_position=None if self.own_data is None else self.own_data.position,
        )

    def restore(self, state: RunState) -> None:
        """Put the run to where ``state`` was taken; the partitions are as they are."""
        self.optimizer.step_count, self.optimizer.scalars = state.step, state.rule_scalars
        self.global_steps, self.global_samples = state.global_steps, state.global_samples
        self.skipped_steps, self._skipped_in_a_row = state.skipped_steps, state.skipped_in_a_row
        # DeepSpeed's micro_steps counts a rank's own micro-batches, so it is another number on another number of ranks.
        self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        for group, lr in zip(self.optimizer.param_groups, state.lrs, strict=True):
            group["lr"] = lr
        if state.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state.lr_scheduler)
        if self.own_data is not None and state.data_position is not None:
            self.own_data.restore(state.data_position)

    # --- what has no meaning here

    def backward(self, *args, **kwargs):
        """There is no backward pass: raises RuntimeError naming ``train_batch``."""
        if self._is_zeroth_order:
            raise RuntimeError(
                "a zeroth-order engine has no backward pass; call engine.train_batch(batch), which evaluates and steps"
            )
        return super().backward(*args, **kwargs)

    def step(self, *args, **kwargs):
        """A bare step has no projected gradient: raises RuntimeError naming ``train_batch``."""
        if self._is_zeroth_order:
            raise RuntimeError(
                "engine.step() alone has no loss to step along; call engine.train_batch(batch), which evaluates and steps"
            )
        return super().step(*args, **kwargs)

    def empty_partition_cache(self) -> None:
        """Free every gathered copy of a parameter."""
        if self._is_zeroth_order:
            self.gathers.release()
        else:
            super().empty_partition_cache()

    def memory_bytes(self) -> dict[str, int]:
        """Bytes that persist on this rank for the trained parameters: {"weights": partitions, "momentum": optimizer state}."""
        return self.optimizer.memory_bytes()

    def before_update(self, record: StepRecord, batch: Any, micro_batches: Sequence[Any]) -> None:
        """The step's losses are known and no partition has changed; what raises here ends the step before it begins.

        ``batch``: as given to ``train_batch``; ``micro_batches``: what was drawn of it.
        """
        for warning in () if self.own_data is None else self.own_data.take(micro_batches):
            if self.global_rank == 0:
                logger.warning(warning)

    def _draw(self, batch: Any, micro_batches: Sequence[Any] | None) -> list[Any]:
        """This rank's micro-batches of a step, once every rank has its own: before a gather waits for a rank without."""
        with collective.on_all_ranks(ValueError) as given:
            drawn = drawn_of(batch, micro_batches, self.gradient_accumulation_steps())
            given.mine = [len(drawn), *(float(group["lr"]) for group in self.optimizer.param_groups)]
        self._require_one_lr([lrs for _, *lrs in given.all])
        counts = [count for count, *_ in given.all]
        if all(counts):
            if len(set(counts)) > 1:
                by_count = collective.grouped(counts)
                found = ", ".join(f"{count} on {collective.by_rank(ranks)}" for count, ranks in by_count.items())
                raise collective.everywhere(ValueError(f"the micro-batches of a step are {found}; give all ranks as many"))
            return drawn
        ended = [number for number, count in enumerate(counts) if count == 0]
        if len(ended) < len(counts):
            log_dist(
                f"the iterator of {collective.by_rank(ended)} has ended before those of the others; the epoch ends for all "
                "ranks, and the others' last micro-batches are not used",
                ranks=[0],
                level=logging.WARNING,
            )
        raise collective.everywhere(StopIteration())

    def _require_one_lr(self, of_ranks: list[list[float]]) -> None:
        by_lrs = collective.grouped(map(tuple, of_ranks))
        if len(by_lrs) > 1:
            lrs = ", ".join(f"{'/'.join(map(repr, lrs))} on {collective.by_rank(ranks)}" for lrs, ranks in by_lrs.items())
            raise collective.everywhere(
                ConfigError(f"step {self.optimizer.next_step}: the lr is {lrs}; give all ranks the same lr scheduler")
            )

    def _to_device(self, batch: Any) -> Any:
        return mapped(batch, lambda tensor: tensor.to(self.device, non_blocking=True))

    def _loss(self, micro_batch: Any) -> torch.Tensor:
        return as_pair(self.loss_fn(self.module, micro_batch), self.device)

    def _fill(self, evaluation: Evaluation) -> Fill | None:
        """What the gathers of an evaluation see; None: the stored weights."""
        if evaluation.direction is None:
            return None
        return partial(self.optimizer.perturb_into, evaluation=evaluation)

    def _record(self, losses: list[float]) -> StepRecord:
        """The step's record, from the losses of its evaluations."""
        optimizer, step = self.optimizer, self.optimizer.next_step
        grads = tuple(map(kernels.round_grad, optimizer.rule.projected_grads(losses)))  # also those of a rule of one's own
        loss_plus, loss_minus = optimizer.rule.loss_pair(step, losses)
        lrs, skipped = tuple(float(group["lr"]) for group in optimizer.param_groups), not all(map(math.isfinite, grads))
        return StepRecord(
            step=step,
            loss=(loss_plus + loss_minus) / 2.0,
            loss_plus=loss_plus,
            loss_minus=loss_minus,
            projected_grads=grads,
            lrs=lrs,
            skipped=skipped,
            figures=optimizer.figures(None if skipped else grads, lrs[0]),
        )

    def _step_and_count(self) -> None:
        # DeepSpeed counts one micro-step for each call of step(), and steps on the last one of an accumulation.
        self.micro_steps += self.gradient_accumulation_steps() - 1
        super().step()

    def _check_lrs(self) -> None:
        check_lrs(self.optimizer, self.lr_scheduler)
        beyond = beyond_plan(self.optimizer, self.lr_scheduler, self._told_beyond)
        for warning in (beyond, begins_at_zero(self.optimizer, self.lr_scheduler)):
            if warning is not None and self.global_rank == 0:
                logger.warning(warning)

    # --- reports

    def _report(self, record: StepRecord) -> None:
        printing = self.steps_per_print() is not None and self.global_steps % self.steps_per_print() == 0
        self._pace.begin(record.step)
        if self.global_rank != 0 or not (printing or self.monitor.enabled):
            return
        coinciding = self.optimizer.coinciding_share()
        if printing:
            total = getattr(self.optimizer.rule.config, "total_steps", None)
            # Asked for, so it is printed; DeepSpeed's logger leaves out what is no warning.
            say(
                f"{record.line()} coinciding={coinciding:.4g} skipped={self.skipped_steps}{self._pace.line(record.step, total)}"
            )
        if self.monitor.enabled:
            values = [*record.monitored(), ("coinciding_share", coinciding), ("skipped_steps", self.skipped_steps)]
            self.monitor.write_events([(f"Train/Samples/{name}", value, self.global_samples) for name, value in values])

    def _stop_if_diverged(self, record: StepRecord) -> None:
        if not record.skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        limit = self.optimizer.rule.config.max_skipped_steps
        log_dist(
            f"step {record.step} skipped: loss_plus={record.loss_plus} loss_minus={record.loss_minus} is not finite "
            f"({self._skipped_in_a_row} in a row, {limit} end the run)",
            ranks=[0],
            level=logging.WARNING,
        )
        if self._skipped_in_a_row >= limit:
            raise NonFiniteLossError(
                f"the loss was not finite for {limit} steps in a row, the last at step {record.step} "
                f"(loss_plus={record.loss_plus}, loss_minus={record.loss_minus}). {divergence.advice(self, record)}; "
                "max_skipped_steps sets the limit"
            )

    # --- set-up, called by DeepSpeedEngine.__init__

    @property
    def _is_zeroth_order(self) -> bool:
        return isinstance(getattr(self, "optimizer", None), ZerothOrderOptimizer)

    def _require_zeroth_order(self, method: str) -> None:
        if not self._is_zeroth_order:
            raise RuntimeError(
                f"{method} needs a zeroth-order optimizer ({', '.join(RULES)}); this engine has "
                f"{type(self.optimizer).__name__}: use engine(batch), engine.backward(loss), engine.step()"
            )

    def _do_sanity_check(self) -> None:
        # The first thing of DeepSpeedEngine.__init__ that sees the configuration: the model has not been touched.
        if self.settings.rule is not None:
            nvme.prepare(self.settings)
        super()._do_sanity_check()

    def _is_supported_optimizer(self, optimizer_name: str) -> bool:
        return optimizer_name in RULES or super()._is_supported_optimizer(optimizer_name)

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        self._scalars = []
        if self.settings.rule is not None:
            reject_unusable(model, self.settings)
            self._scalars = lift_scalars(model)
        super()._configure_distributed_model(model)

    def _configure_optimizer(self, client_optimizer, model_parameters) -> None:
        if client_optimizer is None and self.settings.rule is not None:
            client_optimizer = ZerothOrderOptimizer(model_parameters, self.settings.make_rule())
        if not isinstance(client_optimizer, ZerothOrderOptimizer):
            super()._configure_optimizer(client_optimizer, model_parameters)
            return
        self._check_for_duplicates(client_optimizer)
        partition_onto_nvme(self.module, self.settings, self.mpu)
        # Without an optimizer DeepSpeed partitions as for ZeRO-Inference: weights only.
        self._offload = self._configure_zero_optimizer(optimizer=None)
        reject_stored_dtypes(self.module)
        lower_scalars(self._scalars)
        with collective.on_all_ranks(ConfigError):
            client_optimizer.bind(find_partitions(self.module))
        self._trained_set = TrainedSet(self.module)
        self.gathers = PerturbedGathers(self.module, client_optimizer.partitions, self._offload.partition_all_parameters)
        self.optimizer = self.basic_optimizer = client_optimizer
        log_dist(
            f"{client_optimizer.rule.name}: {len(client_optimizer.partitions)} trained parameters, momentum "
            f"{client_optimizer.memory_bytes()['momentum']:,} bytes on this rank, kernels {kernels.backend_name(self.device)}",
            ranks=[0],
        )

    def _create_module_forward_pre_hook(self):
        ours = self.settings.rule is not None
        return forward_hooks.before_forward(self) if ours else super()._create_module_forward_pre_hook()

    def _create_module_forward_post_hook(self):
        ours = self.settings.rule is not None
        return forward_hooks.after_forward(self) if ours else super()._create_module_forward_post_hook()

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self._is_zeroth_order:
            check_scheduler(self.lr_scheduler)

    def deepspeed_io(
        self, dataset, batch_size=None, route=ROUTE_TRAIN, pin_memory=True, data_sampler=None, collate_fn=None, **kwargs
    ):
        """DeepSpeed's data loader, except that training data is dealt out by micro-batches in one global order
        (MicroBatchLoader, MicroBatchStream). ``num_local_io_workers``: processes that read ahead (default: none), not for a
        stream. The loader takes the place of the engine's own where there is none, or one of the same data.
        """
        options = self.settings.options
        if options is None or route != ROUTE_TRAIN or data_sampler is not None:
            return super().deepspeed_io(dataset, batch_size, route, pin_memory, data_sampler, collate_fn, **kwargs)
        check_training_data(dataset)
        collate_fn = collate_fn or self.collate_fn
        batch_size = batch_size or self.train_micro_batch_size_per_gpu()
        deal = self.gradient_accumulation_steps(), dist.get_rank(), dist.get_world_size()
        if is_stream(dataset):
            loader = MicroBatchStream(dataset, collate_fn or torch.utils.data.default_collate, batch_size, *deal)
        else:
            loader = MicroBatchLoader(
                dataset,
                MicroBatchSampler(len(dataset), batch_size, *deal, options.seed),
                collate_fn=collate_fn,
                num_workers=kwargs.get("num_local_io_workers") or 0,
                pin_memory=pin_memory and not get_accelerator().is_synchronized_device(),
            )
        own = getattr(self, "training_dataloader", None)
        if getattr(own, "dataset", dataset) is dataset:  # not where an evaluation's data goes this way
            self.training_dataloader = loader
        return loader

    def destroy(self) -> None:
        """DeepSpeed's, and ZeRO-3's hooks off the module, and the swap buffers: weights on NVMe cannot be read any more.
        ``generate`` of a Transformers model does not know of the partitions any more."""
        super().destroy()
        if "transformers" in sys.modules:
            from . import hf as hf_zero3

            hf_zero3.detach(self.module)
        if gathers := self.__dict__.get("gathers"):
            gathers.close()
        if offload := self.__dict__.pop("_offload", None):
            offload.destroy()
