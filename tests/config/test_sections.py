"""DeepSpeed's other sections: each works and changes no bit of the losses, or is refused before the model is touched."""

import pytest

from ..helpers.harness import run_ranks
from ..helpers.jobs import config, engine_for
from ..helpers.models import OddModel, odd_batches

pytestmark = pytest.mark.ranks

WORKS = {
    "none": {},
    "wall_clock_breakdown": {"wall_clock_breakdown": True, "steps_per_print": 1},
    "dump_state": {"dump_state": True},
    "no throughput timer": {"timers": {"throughput": {"enabled": False}}},
    "data_types": {"data_types": {"grad_accum_dtype": "fp32"}},
    "communication_data_type": {"communication_data_type": "fp16", "seq_parallel_communication_data_type": "fp32"},
    "prescale_gradients": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "activation_checkpointing": {"activation_checkpointing": {"partition_activations": True}},
    "checkpoint": {"checkpoint": {"tag_validation": "Fail", "use_node_local_storage": True, "load_universal": False}},
    "data_efficiency off": {"data_efficiency": {"enabled": False}},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "csv_monitor": {"csv_monitor": {"enabled": True, "job_name": "job"}},
    "untested optimizers": {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": True},
    "sections that are off": {
        "flops_profiler": {"enabled": False}, "autotuning": {"enabled": False}, "comms_logger": {"enabled": False}
    },
    "comms_logger": {"comms_logger": {"enabled": True, "prof_all": True, "verbose": True}},
}  # fmt: skip

REFUSED = {
    "flops_profiler": ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled is set; .*--profile_steps: remove it"),
    "autotuning": ({"autotuning": {"enabled": True}}, "autotuning.enabled is set; it ends the run"),
    "weight_quantization": ({"weight_quantization": {"post_init_quant": {"mix": {"num_bits": 8}}}}, "weight_quantization is"),
    "writer": ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer is set; checkpoints are written by"),
    "datastates": ({"datastates_ckpt": {"host_cache_size": 1}}, "datastates_ckpt is set; checkpoints are written by"),
    # By DeepSpeed itself, with its own words.
    "elasticity": ({"elasticity": {"enabled": True}}, "'elasticity' configuration block is no longer supported"),
    "eigenvalue": ({"eigenvalue": {"enabled": True}}, "'eigenvalue' configuration block is no longer supported"),
    "progressive_layer_drop": ({"progressive_layer_drop": {"enabled": True}}, "'progressive_layer_drop' .* no longer"),
    "sparse_attention": ({"sparse_attention": {"mode": "fixed"}}, "'sparse_attention' .* no longer supported"),
    "compression": ({"compression_training": {"weight_quantization": {}}}, "compression library has been removed"),
    "nebula": ({"nebula": {"enabled": True}}, "Nebula checkpointing has been removed"),
    "curriculum": ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
    "random_ltd": ({"data_efficiency": {"enabled": True, "data_routing": {"enabled": True}}}, "data_efficiency.enabled is"),
}


def _sections(rank, world_size, folder):
    losses = {}
    for name, sections in WORKS.items():
        if "csv_monitor" in sections:
            sections["csv_monitor"]["output_path"] = folder
        engine = engine_for(OddModel(), config(world_size, 2) | sections, loss_fn=_asks_all_ranks)
        batches = odd_batches(12)
        losses[name] = []
        for step in range(3):
            first = 4 * step + 2 * rank
            engine.train_batch(iter(batches[first : first + 2]))
            losses[name].append((engine.last_step.loss_plus, engine.last_step.loss_minus))
        losses[name].append(engine.eval_batch(iter(batches[:2])))
        engine.save_checkpoint(f"{folder}/{name}")
        engine.load_checkpoint(f"{folder}/{name}")
        assert engine.global_steps == 3
        engine.destroy()
    return losses


def _asks_all_ranks(module, batch):
    """The model's loss, after a collective that DeepSpeed's comms_logger has no formula for."""
    from deepspeed import comm

    gathered = [None] * comm.get_world_size()
    comm.all_gather_object(gathered, comm.get_rank())
    assert gathered == list(range(comm.get_world_size()))
    return module(**batch).loss, 1.0


def test_sections_that_work_change_no_loss(tmp_path):
    for losses in run_ranks(2, _sections, str(tmp_path)):
        assert {name for name, values in losses.items() if values != losses["none"]} == set()


def _refusals(rank, world_size):
    messages = {}
    for name, (sections, _) in REFUSED.items():
        model = OddModel()
        try:
            engine_for(model, config(world_size, 2) | sections)
            messages[name] = "accepted"
        except Exception as error:
            messages[name] = str(error)
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
    return messages


def test_sections_that_cannot_work_are_refused_by_name():
    [messages] = run_ranks(1, _refusals)
    for name, (_, words) in REFUSED.items():
        with pytest.raises(ValueError, match=words):
            raise ValueError(messages[name])
