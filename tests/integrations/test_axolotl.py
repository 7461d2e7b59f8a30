"""The plugin of Axolotl: against the interface of Axolotl 0.19, and against Axolotl itself where it is installed."""

import importlib
import importlib.util
import json
import sys
from types import ModuleType

import pytest
from pydantic import BaseModel, ConfigDict

from ds_zoadamu.durability.journal import read_journal

from ..helpers.harness import run_ranks
from ..helpers.tiny_lm import save_model, sentences
from ..hf import trainer_runs as runs

pytestmark = pytest.mark.ranks

PLUGIN = "ds_zoadamu.integrations.axolotl.ZOPlugin"
ZO = {"zo_eps": "1e-2", "t1": 1, "t2": 3, "t3": 6, "momentum": {"dtype": "int8"}}  # YAML takes 1e-2 for text


def _interface() -> None:
    """What of Axolotl the plugin meets: a base class of plugins, and a trainer over Transformers' with arguments of its own."""
    from transformers import Trainer

    class BasePlugin:
        def register(self, cfg): ...

        def get_input_args(self): ...

        def get_trainer_cls(self, cfg): ...

    class AxolotlTrainer(Trainer):
        def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
            self.dataset_tags = dataset_tags
            super().__init__(*args, **kwargs)

    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.core", "axolotl.core.trainers"):
        sys.modules[name] = ModuleType(name)
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    sys.modules["axolotl.core.trainers"].AxolotlTrainer = AxolotlTrainer


def _named(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _by_the_interface(rank, world_size, folder):
    from transformers import DataCollatorForSeq2Seq

    from ds_zoadamu.errors import ConfigError

    _interface()
    plugin, cfg = _named(PLUGIN)(), {"zo": ZO}
    plugin.register(cfg)
    plugin.register(cfg)  # Axolotl does it twice

    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        deepspeed: dict | None = None

    merged = type("Merged", (Config, _named(plugin.get_input_args())), {})
    checked = merged(**cfg).model_dump(exclude_none=True)
    assert checked["zo"]["zo_eps"] == "1e-2" and checked["deepspeed"]["optimizer"]["params"]["zo_eps"] == 1e-2
    args = runs.arguments(folder / "axolotl", world_size, deepspeed=checked["deepspeed"], use_cpu=True)
    tokenizer = runs.make_tokenizer()
    made = plugin.get_trainer_cls(cfg)(
        model=runs.make_model(num_hidden_layers=1), args=args, train_dataset=runs.rows(),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer, dataset_tags=["mine"], bench_data_collator=None,
    )  # fmt: skip
    digests = runs.trained(made), runs.trained(runs.trainer(folder / "plain", world_size))

    messages = {}
    for name, given in {
        "option": {"zo": {"zo_epsilon": 1}},
        "value": {"zo": {"zo_eps": 0}},
        "rule": {"zo": {"type": "AdamW"}},
        "kind": {"zo": 3},
        "rl": {"zo": ZO, "rl": "dpo"},
        "two": {"zo": ZO, "deepspeed": {"optimizer": {"type": "MeZO", "params": {"lr": "auto"}}}},
    }.items():
        with pytest.raises(ConfigError) as raised:
            plugin.register(given)
        messages[name] = str(raised.value)
    with pytest.raises(ValueError, match="unknown 'zo_epsilon'"):
        merged(zo={"zo_epsilon": 1})
    mezo = {"zo": {"type": "MeZO"}, "deepspeed": {"zero_optimization": {"stage": 3}}}
    plugin.register(mezo)
    assert mezo["deepspeed"]["optimizer"]["type"] == "MeZO" and mezo["deepspeed"]["zero_optimization"] == {"stage": 3}
    return digests, messages


def test_the_plugin_trains_as_zotrainer_does(tmp_path):
    (digests, messages), (same, _) = run_ranks(2, _by_the_interface, tmp_path)
    assert digests == same and digests[0] == digests[1]
    for name, start in {
        "option": "zo: unknown 'zo_epsilon' (did you mean 'zo_eps'?)",
        "value": "zo: zo_eps is 0; it must be finite and >= 1e-08",
        "rule": "zo.type is 'AdamW'; known: ",
        "kind": "zo is 3; it must be a section",
        "rl": "rl is 'dpo'; the plugin is for plain causal language models",
        "two": 'zo: and the "optimizer" of the DeepSpeed JSON both name a rule',
    }.items():
        assert messages[name].startswith(start), messages[name]


def _by_axolotl(rank, world_size, folder):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    do_train(load_cfg(str(folder / "run.json")), TrainerCliArgs())


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="Axolotl is not installed")
def test_axolotl_trains_a_yaml(tmp_path):
    model, data = save_model(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": row["sentence"]}) + "\n" for row in sentences(32, 1)))
    config = {
        "base_model": str(model),
        "plugins": [PLUGIN],
        "zo": ZO,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "val_set_size": 0,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "constant",
        "output_dir": str(tmp_path / "out"),
        "logging_steps": 1,
        "save_steps": 3,
        "bf16": False,
    }
    (tmp_path / "run.json").write_text(json.dumps(config))  # JSON is YAML
    run_ranks(1, _by_axolotl, tmp_path)
    journal = read_journal(tmp_path / "out" / "journal.jsonl")
    assert len(journal.records) == 6 and journal.header["options"]["zo_eps"] == 1e-2
    assert journal.header["base"]["name"] == model.name
    assert runs.saved(tmp_path / "out").keys() == runs.saved(model).keys()
