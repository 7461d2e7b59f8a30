"""LOMO, the paper's rival with backward passes: gradient descent whose update of a weight is made while the backward pass goes
on, so that no gradient is kept. Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
Resources", 2023; the optimizer is that of their package lomo-optim, an optional one.
"""

import importlib.util
from argparse import Namespace

import torch

import ds_zoadamu
from ds_zoadamu.config import load
from ds_zoadamu.config.settings import check_precision
from ds_zoadamu.distributed.start import launched_world_size
from ds_zoadamu.hf.models import load_model
from ds_zoadamu.tasks import InputError, Task
from ds_zoadamu.training.arguments import check_arguments, refuse_search
from ds_zoadamu.training.plan import Plan, encode_splits, read_model_input
from ds_zoadamu.training.steps import Partitioned, Section, make_dataloader
from ds_zoadamu.zero3.hf import zero3_known
from ds_zoadamu.zero3.losses import as_pair, global_means
from ds_zoadamu.zero3.partition import find_partitions

PACKAGE = "lomo_optim"
_LR = 1e-3  # of the package
# LOMO changes partitions in the middle of a step: a gathered copy that stayed would be an old one.
_SETTINGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": 0},
}


def check_lomo(accumulation: int, precision: str, task: Task) -> None:
    """Raises InputError where LOMO cannot do what is asked."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError("LOMO is the package lomo-optim, which is not installed: pip install --no-deps lomo-optim")
    if accumulation > 1:
        raise InputError(
            f"gradient_accumulation_steps is {accumulation}; LOMO updates within a backward pass and keeps no gradients to add "
            "up: it must be 1"
        )
    if precision == "fp16":
        raise InputError("fp16: LOMO scales losses of 16 bits only, and tasks give theirs in 32; take bf16 or fp32")
    if not task.differentiable:
        raise InputError(f"--objective {task.details['objective']} has no gradient, and LOMO needs one: take another objective")


def make_lomo_plan(args: Namespace) -> Plan:
    """As `make_plan`, of `finetune_parser`'s arguments; a DeepSpeed JSON is not read.

    Raises:
        InputError, ConfigError: as `make_plan`; what `check_lomo` finds.
    """
    check_arguments(args)
    refuse_search(args, "LOMO")
    model_input = read_model_input(args)
    model_input.tuning.require_full("LOMO")
    sizes = {"world_size": launched_world_size(), "model_info": model_input}
    config = load(_SETTINGS, **sizes, overrides=_without_optimizer(args))
    check_precision(config)
    check_lomo(config.batch.accumulation, config.precision, model_input.task)
    return encode_splits(args, config, model_input)


class Lomo(Partitioned):
    """theta <- theta - lr (gradient + weight_decay theta) on ZeRO-3 partitions, without clipping; the lr falls linearly to 0.

    A `Stepper`. DeepSpeed 0.19.8 refuses a backward pass that is not its own behind ``engine(...)``; the module's own forward
    gathers all the same. Behind it parameters whose inputs need no gradient stay gathered: they are released here.
    """

    passes_a_step = {"forward": 1, "backward": 1}

    def __init__(self, plan: Plan):
        from lomo_optim import Lomo as Optimizer

        args = plan.args
        model = load_model(args.model_name_or_path, plan.config, trust_remote_code=args.trust_remote_code)
        engine = ds_zoadamu.initialize(model=model, config=plan.config)[0]
        super().__init__(plan, engine, make_dataloader(plan, engine.train_micro_batch_size_per_gpu(), 1))
        self.optimizer = "LOMO"
        self._lr = _LR if args.learning_rate is None else args.learning_rate
        with zero3_known(model.hf_deepspeed_config):  # it asks Transformers whether parameters are partitioned
            self.lomo = Optimizer(engine.module, lr=self._lr, weight_decay=args.weight_decay or 0.0)
        self._count = 0

    def step(self) -> dict:
        """One step; its record has no gradient figure, since no gradient is there at its end."""
        lr = self._lr * max(0.0, 1.0 - self._count / self._plan.args.max_steps)
        self.model.train()
        loss, weight = self.loss(next(self._batches))
        self.lomo.fused_backward(loss, lr)
        self.engine.empty_partition_cache()
        self._count += 1
        mean = global_means([[as_pair((loss.detach(), weight), self.engine.device)]], self.engine.device)[0]
        return {"step": self._count, "loss": mean, "lr": lr, "grad_norm": None, "skipped": False}

    def loss(self, batch) -> tuple[torch.Tensor, float]:
        """(mean loss, weight) of a micro-batch."""
        return self._plan.task.loss(self.model, batch)

    def stored_bytes(self) -> dict[str, int]:
        weights = sum(p.allocated_bytes for p in find_partitions(self.model))
        return {"weights_bytes": weights, "optimizer_state_bytes": 0, "gradients_bytes": 0}

    def sections(self) -> list[Section]:
        return [*super().sections(), (self, "loss", "forward"), (self.lomo, "fused_backward", "backward")]


def _without_optimizer(args: Namespace) -> Namespace:
    """The command line without what an optimizer's section takes."""
    own = ("learning_rate", "weight_decay", "zo_eps", "max_grad_norm")
    return Namespace(**{name: value for name, value in vars(args).items() if name not in own})
