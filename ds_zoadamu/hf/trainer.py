"""Transformers' Trainer with zeroth-order steps: a mixin over its public methods, and the ready class.

The Trainer's own loop, its data, callbacks, evaluation and checkpoints stay as they are. The engine is made where the Trainer
makes its own, in ``accelerator.prepare``; ``training_step`` takes a step once its micro-batches are there, and the Trainer's
``optimizer.step`` and ``lr_scheduler.step`` do nothing under DeepSpeed. Checked against Transformers 5.24.
"""

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed
from transformers.trainer_pt_utils import find_batch_size

from ..distributed import collective
from ..errors import ConfigError, HubError
from ..files.hub_access import one_line
from ..zero3.optimizer import ZerothOrderOptimizer
from .accelerate import zeroth_order
from .arguments import finished, prepare_arguments, say
from .cards import RunCard
from .journaling import NAME, RunJournal, newest_checkpoint
from .saving import save_for_trainer


class ZOTrainerMixin:
    """Zeroth-order steps for a class over ``transformers.Trainer``: ``class Mine(ZOTrainerMixin, MyTrainer)``.

    Args, beside those of the trainer: ``zo``: the rule and its options where there is no DeepSpeed JSON, of ``ZOAdaMUConfig``
    or ``MeZOConfig``; ``journal``: whether every step is recorded in ``output_dir/journal.jsonl``, or the path of the journal.

    Raises ConfigError, before the model is moved, for arguments that cannot work.
    """

    def __init__(self, *args: Any, zo: Any = None, journal: bool | str | Path = True, **kwargs: Any):
        if any(given is not None for given in (*kwargs.get("optimizers", ()), kwargs.get("optimizer_cls_and_kwargs"))):
            raise ConfigError("optimizers= is given; the rule of the DeepSpeed JSON or of zo= makes the steps: leave it out")
        self._zo, self._micro_batches, self._run_journal, self._run_card = zo, [], RunJournal(None, {}), RunCard(None)
        super().__init__(*args, **kwargs)
        if journal is not False:
            path = Path(self.args.output_dir) / NAME if journal is True else Path(journal)
            self._run_journal = RunJournal(path.absolute(), self._task())
        self._run_card = RunCard(self._run_journal.path)
        self.add_callback(_Beginning(self))

    # --- the engine

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, with arguments that have a DeepSpeed configuration, and an accelerator that makes our engine."""
        zo = None if hasattr(self, "_config") else self._zo  # a search calls again, with the rule in the arguments already
        self._config = prepare_arguments(self.args, zo, self.model)
        super().create_accelerator_and_postprocess()
        self._prepare = self.accelerator.prepare
        self.accelerator.prepare = self._prepared

    def _prepared(self, *objects: Any, **kwargs: Any) -> Any:
        if not any(isinstance(given, torch.nn.Module) for given in objects):
            return self._prepare(*objects, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if "optimizer" in plugin.deepspeed_config:  # else for an evaluation before training
            model_info = getattr(self.model, "config", None)
            config = finished(self._config, self.args, self.state.max_steps, model_info)
            plugin.deepspeed_config.clear()
            plugin.deepspeed_config.update(copy.deepcopy(config.deepspeed))
        with zeroth_order(loss_fn=self._loss):
            return self._prepare(*objects, **kwargs)

    @property
    def _engine(self) -> Any:
        """The zeroth-order engine; None before training."""
        engine = getattr(self, "deepspeed", None)
        return engine if isinstance(getattr(engine, "optimizer", None), ZerothOrderOptimizer) else None

    # --- training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's. With ``resume_from_checkpoint=True`` the run goes on where it was killed, on any number of ranks:
        from the newest whole checkpoint, if there is one, and the journal's later steps."""
        self._forget_engine()
        resumed_from = self._resumed_from(resume_from_checkpoint)
        self._run_card.begin()
        try:
            return super().train(resumed_from, *args, **kwargs)
        finally:
            if self._engine is not None:  # a notebook may go on with the run in another trainer
                self._engine.close_journal()
            self._run_card.end()

    def _resumed_from(self, asked: str | bool | None) -> str | None:
        """The checkpoint that training goes on from; None where it begins, or goes on from the journal alone."""
        self._run_journal.resuming = bool(asked)
        if not asked:
            self._run_journal.require_new()
            return None
        found = newest_checkpoint(self.args.output_dir) if asked is True else asked
        if found is None and not self._run_journal.exists():
            raise collective.everywhere(
                ValueError(f"{self.args.output_dir!r} has neither a whole checkpoint nor a journal to resume from")
            )
        return None if found is None else str(found)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep a micro-batch; with the last of a step take it. The step's loss, 0 before."""
        model.train()  # callbacks and metrics go by it; the passes themselves run in eval mode
        self._micro_batches.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        micro_batches, self._micro_batches = self._micro_batches, []
        if self._engine.optimizer.step_count >= self.state.max_steps:  # the Trainer resumes a finished run with one more step
            say(f"the run has its {self.state.max_steps} steps: no further one is taken")
            return torch.zeros((), device=self.args.device)
        return torch.tensor(self._engine.train_batch(micro_batches=micro_batches), device=self.args.device)

    def _loss(self, module: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, Any]:
        """The trainer's own loss of a micro-batch, weighted by its labels, or its examples where there are none."""
        _, count = self.get_batch_samples(iter([batch]), 1, self.args.device)
        with _marked_as_training(module):
            loss = self.compute_loss(module, dict(batch), num_items_in_batch=count)
        return loss, find_batch_size(batch) or 1 if count is None else count

    def _begin(self) -> None:
        if self._engine is None:
            raise ConfigError("the trainer's accelerator has made no zeroth-order engine; do not replace trainer.accelerator")
        self._micro_batches = []
        if not self.state.is_hyper_param_search:
            self._run_journal.open(self._engine, self.model)

    def _task(self) -> dict[str, Any]:
        try:
            count = len(self.train_dataset)
        except TypeError:
            count = None
        return {"num_train_examples": count, "data_seed": self.args.data_seed}

    # --- evaluation before training, and training again

    def _forget_engine(self) -> None:
        """An engine of an evaluation before training, or of an earlier training, is given up, and what it has used up of the
        configuration is put back."""
        if self.deepspeed is not None:
            self.accelerator.free_memory()
            self.deepspeed, self.model_wrapped, self.optimizer, self.lr_scheduler = None, self.model, None, None
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config.clear()
        config.update(copy.deepcopy(self._config))
        self.args.hf_deepspeed_config.trainer_config_process(self.args)

    # --- reports and files

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, and what is known of the last step beside its loss."""
        if self._engine is not None and (record := self._engine.last_step) is not None and "loss" in logs:
            logs["learning_rate"] = record.lrs[0]  # the scheduler has gone on to the next step's
            logs |= {"loss_plus": record.loss_plus, "loss_minus": record.loss_minus}
            options = self._engine.optimizer.rule.config
            logs |= {name: value for name, value in record.monitored() if name != "train_loss"}
            logs.setdefault("effective_zo_eps", options.zo_eps)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model as ``from_pretrained`` reads it, of PEFT its adapters, gathered parameter by parameter. On all ranks."""
        directory = self.args.output_dir if output_dir is None else output_dir
        processor = self.processing_class
        if processor is None:
            processor = getattr(self.data_collator, "tokenizer", None)
        engine = getattr(self, "deepspeed", None)
        save_for_trainer(engine, self.model, directory, [processor] if processor is not None else [], self.args)
        if _internal_call:
            return
        self._run_card.note(self._engine, self.model)
        with collective.on_all_ranks(OSError):
            if collective.rank() == 0:
                self._run_card.write(Path(directory), self.state.log_history)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # --- the hub

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the rule, the memory, and how the weights are made again, once ``save_model`` or ``push_to_hub``
        has noted them."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._run_card.complete(Path(self.args.output_dir), self.hub_model_id)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's. Raises HubError on all ranks: no token, no network."""
        with collective.on_all_ranks(HubError) as made, one_line("the repository cannot be made on the hub"):
            super().init_hf_repo(*args, **kwargs)
            made.mine = self.hub_model_id
        self.hub_model_id = made.all[0]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's: the model is saved, then sent. Raises HubError on all ranks, with everything on the disk."""
        if self.hub_model_id is None:  # here, on all ranks: the Trainer's own call would be on the first alone
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        self._run_card.note(self._engine, self.model)
        sent, failure, folder = None, None, self.args.output_dir
        try:
            again = f"everything is in {folder}: `hf upload {self.hub_model_id} {folder}` tries again"
            with one_line(f"{folder!r} cannot be sent to {self.hub_model_id!r}", again):
                sent = super().push_to_hub(*args, **kwargs)
        except HubError as error:  # of the first rank, behind all that ranks do together
            failure = error
        with collective.on_all_ranks(HubError):
            if failure is not None:
                raise failure
        return sent


class _Beginning(transformers.TrainerCallback):
    """What a trainer does when the engine has its weights, and before the data of an epoch are put in order."""

    def __init__(self, trainer: ZOTrainerMixin):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Some samplers draw from the global generator: an epoch's order must not depend on what was drawn before a kill.
        set_seed(args.data_seed + int(state.epoch or 0))


@contextmanager
def _marked_as_training(module: torch.nn.Module):
    """Inside, the root alone says that it trains: trainers choose the place of their metrics by it."""
    module.training = True
    try:
        yield
    finally:
        module.training = False


class ZOTrainer(ZOTrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with zeroth-order steps; see ``ZOTrainerMixin``."""
