"""Models that bring Python code of their own: run where --trust_remote_code says so, elsewhere refused by name."""

import builtins
import json

import pytest

from tests.helpers.harness import run_ranks
from tests.helpers.tiny_lm import save_model, write_data

pytestmark = pytest.mark.ranks

CONFIGURATION = """
import transformers

class MineConfig(transformers.OPTConfig):
    model_type = "mine"
"""
MODELING = """
import transformers
from .configuration_mine import MineConfig

class MineForCausalLM(transformers.OPTForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny OPT as an architecture that only the files beside its weights know."""
    folder = save_model(tmp_path_factory.mktemp("own") / "model")
    (folder / "configuration_mine.py").write_text(CONFIGURATION)
    (folder / "modeling_mine.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": names}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture
def asked(monkeypatch):
    """What was asked on the terminal."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "n")
    return questions


def test_every_command_names_its_option_and_asks_nothing(model, data, tmp_path, asked):
    from ds_zoadamu.benchmark.arguments import benchmark_parser
    from ds_zoadamu.benchmark.settings import finetune_args
    from ds_zoadamu.errors import ConfigError
    from ds_zoadamu.plan.models import load_config
    from ds_zoadamu.tasks import InputError
    from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
    from ds_zoadamu.training.plan import read_model_input

    given = ["--model_name_or_path", str(model)]
    written = ["--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    for args in (
        finetune_parser().parse_args([*given, *written]),
        evaluate_parser().parse_args(given),
        finetune_args(benchmark_parser().parse_args([*given, *written]), max_steps=1),
    ):
        with pytest.raises(InputError, match="its config is Python code in that folder.*give --trust_remote_code"):
            read_model_input(args)
    with pytest.raises(ConfigError, match="--model .*Python code of its own, which the plan does not run"):
        load_config(str(model))
    assert asked == []
    # What the benchmark is given reaches its runs.
    args = benchmark_parser().parse_args([*given, *written, "--trust_remote_code"])
    assert finetune_args(args, max_steps=1).trust_remote_code


def _evaluated(rank, world_size, folders, data, modules):
    """Accuracy and loss of each model, trusted; what the library says of the first where it is not; the questions asked."""
    import transformers.dynamic_module_utils as dynamic

    from ds_zoadamu.hf.models import load_model
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.measure import measure

    questions, figures = [], []
    builtins.input = lambda text="": questions.append(text) or "n"
    dynamic.HF_MODULES_CACHE = f"{modules}/{rank}"
    for folder in folders:
        words = ["--model_name_or_path", folder, "--data_dir", data, "--trust_remote_code"]
        measured = measure(evaluate_parser().parse_args(words))
        figures.append((measured["accuracy"], measured["loss"]))
    refused = ""
    try:
        load_model(folders[0], {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"})
    except ValueError as error:
        refused = str(error)
    return figures, refused, questions


def test_trusted_code_is_run(model, data, tmp_path):
    plain = save_model(tmp_path / "plain")
    for (own, known), refused, questions in run_ranks(2, _evaluated, [str(model), str(plain)], str(data), str(tmp_path)):
        assert own == known
        assert "trust_remote_code=True" in refused and questions == []
