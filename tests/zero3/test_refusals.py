"""What an engine refuses on real ranks: settings, models and changes that cannot work; and what it fills in."""

import math
from pathlib import Path

import pytest
import torch

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for, raised
from ..helpers.models import OddModel, odd_batches, tiny_opt

pytestmark = pytest.mark.ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"


REFUSED = [
    ("optimizer.params.zo_epsilon", 1, ["zo_epsilon", "did you mean 'zo_eps'"]),
    ("optimizer.params.zo_eps", 0, ["zo_eps", ">= 1e-08"]),
    ("zero_optimization.stage", 2, ["zero_optimization.stage is 2", "3"]),
    ("zero_optimization.offload_optimizer", {"device": "cpu"}, ["offload_optimizer", "offload_param"]),
    ("zero_optimization.zero_hpz_partition_size", 2, ["hpz", "1"]),
    ("gradient_clipping", 1.0, ["gradient_clipping is 1.0", "0.0"]),
]


def _refused(rank, world_size):
    import ds_zoadamu

    outcomes = []
    for path, value, _ in REFUSED:
        settings = section = config(world_size)
        *parents, last = path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
        model = OddModel()
        error = raised(ds_zoadamu.initialize, model=model, config=settings)
        outcomes.append((error, any(hasattr(p, "ds_id") for p in model.parameters())))
    return outcomes


def test_settings_that_cannot_work_are_refused_on_all_ranks_before_the_model_is_touched():
    for outcomes in run_ranks(2, _refused):
        for (error, touched), (_, _, words) in zip(outcomes, REFUSED, strict=True):
            assert error.startswith("ConfigError") and all(word in error for word in words), error
            assert not touched, error


def _empty_parameter(rank, world_size):
    import ds_zoadamu

    model = OddModel()
    model.nothing = torch.nn.Parameter(torch.empty(0, 3))
    error = raised(ds_zoadamu.initialize, model=model, config=config(world_size))
    return error, any(hasattr(p, "ds_id") for p in model.parameters())


def test_a_parameter_of_no_elements_works_on_one_rank_and_is_named_on_several():
    assert run_ranks(1, _empty_parameter) == [("nothing was raised", True)]
    for error, touched in run_ranks(2, _empty_parameter):
        assert error.startswith("ConfigError") and "'nothing' has 0 elements" in error and not touched


def _two_parameters_of_one_name(rank, world_size):
    import ds_zoadamu

    class Wrapper(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.module = net
            self.head = torch.nn.Linear(11, 11, bias=False)

        def forward(self, **batch):
            return self.module(**batch)

    model = Wrapper(OddModel())
    model.module.head.weight = torch.nn.Parameter(torch.zeros(11, 7))  # not tied, so a parameter of its own
    error = raised(ds_zoadamu.initialize, model=model, config=config(world_size))
    touched = any(hasattr(p, "ds_id") for p in model.parameters())
    del model.head
    engine = engine_for(model, config(world_size))
    return error, touched, [p.name for p in engine.optimizer.partitions]


def test_two_parameters_of_one_canonical_name_are_refused():
    for error, touched, names in run_ranks(2, _two_parameters_of_one_name):
        assert error.startswith("ConfigError: parameters 'module.head.weight' and 'head.weight' of Wrapper are both ")
        assert not touched and "head.weight" in names


def _requires_grad_in_the_middle(rank, world_size):
    engine = engine_for(OddModel(), config(world_size))
    batch = odd_batches(1)[0]
    engine.train_batch(batch)
    errors = []
    for name, value in (("mix.bias", False), ("frozen.weight", True)):
        param = engine.module.get_parameter(name)
        param.requires_grad_(value)
        errors.append(raised(engine.train_batch, batch))
        param.requires_grad_(not value)
    engine.module.extra = torch.nn.Parameter(torch.zeros(3))
    errors.append(raised(engine.train_batch, batch))
    del engine.module.extra
    engine.optimizer.param_groups[0]["weight_decay"] = math.nan
    errors.append(raised(engine.train_batch, batch))
    engine.optimizer.param_groups[0]["weight_decay"] = 0.0
    engine.train_batch(batch)
    return errors, engine.global_steps


def test_requires_grad_cannot_change_in_the_middle_of_a_run():
    for errors, steps in run_ranks(2, _requires_grad_in_the_middle):
        assert errors[0].startswith("ConfigError: requires_grad of 'mix.bias' is False and was True when the engine was made")
        assert errors[1].startswith("ConfigError: requires_grad of 'frozen.weight' is True and was False")
        assert errors[2].startswith(
            "ConfigError: parameter 'extra' was added, taken away or replaced after the engine was made"
        )
        assert errors[3].startswith("ConfigError: step 2, parameter group 0: weight_decay is nan")
        assert steps == 2


def _from_the_json_as_it_is(rank, world_size, data):
    """The README's lines with a JSON of ds_configs, "auto" values and all."""
    import ds_zoadamu

    model = tiny_opt()
    engine, optimizer, dataloader, _ = ds_zoadamu.initialize(
        model=model, config=str(CONFIGS / "cpu-small_zoadamu.json"), training_data=data
    )
    losses = [engine.train_batch(batch) for batch in dataloader]
    options = optimizer.rule.config
    return losses, engine.train_batch_size(), options.total_steps, options.lr, options.seed


def test_auto_values_are_filled_from_the_training_data():
    ids = torch.randint(3, 60, (52, 9), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]
    for losses, batch, total_steps, lr, seed in run_ranks(2, _from_the_json_as_it_is, data):
        assert (batch, total_steps, lr, seed) == (16, 3, 1e-6, 0)
        assert len(losses) == 3 and all(map(math.isfinite, losses))


def _without_a_length(rank, world_size):
    import ds_zoadamu

    with pytest.raises(ds_zoadamu.ConfigError, match='total_steps is "auto"; .* Give the number of steps, or pass'):
        ds_zoadamu.initialize(model=OddModel(), config=str(CONFIGS / "cpu-small_zoadamu.json"))


def test_auto_steps_need_training_data():
    run_ranks(2, _without_a_length)
