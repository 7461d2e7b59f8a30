"""What of a configuration must be the same on all ranks."""

from ds_zoadamu.config import load
from ds_zoadamu.zero3.agreement import of_config

from ..helpers.runs import config


def test_a_section_that_is_switched_off_is_as_one_that_is_left_out():
    plain, off = config(1), config(1)
    off |= {"bf16": {"enabled": False}, "fp16": {"enabled": False, "loss_scale": 0}}
    off["zero_optimization"]["offload_param"] = {"device": "none", "pin_memory": True}
    assert of_config(load(off)) == of_config(load(plain))
    assert of_config(load(plain | {"bf16": {"enabled": True}})) != of_config(load(plain))
