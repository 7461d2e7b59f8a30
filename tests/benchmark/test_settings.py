"""What launch/benchmark.py refuses before anything runs, and what it makes of its arguments."""

import json
import shlex
from pathlib import Path

import pytest

from ds_zoadamu.benchmark.arguments import benchmark_parser, check_numbers
from ds_zoadamu.benchmark.contenders import choose_contenders
from ds_zoadamu.benchmark.folder import check_folder, claim_folder
from ds_zoadamu.benchmark.grid import Point, make_grids
from ds_zoadamu.benchmark.main import benchmark
from ds_zoadamu.benchmark.settings import check_settings
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import InputError
from ds_zoadamu.training import lomo
from tests.helpers.tiny_lm import save_model, write_data

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "model")
    write_data(folder / "data")
    return folder


def arguments(tiny, text):
    base = ["--model_name_or_path", tiny / "model", "--data_dir", tiny / "data", "--num_train", 40, "--num_dev", 13]
    base += ["--output_dir", tiny / "out"]
    return benchmark_parser().parse_args([*map(str, base), *shlex.split(text)])


def write_config(tiny, name, **changes):
    """The small ZO-AdaMU JSON with changes; returns NAME=FILE."""
    config = json.loads((CONFIGS / "cpu-small_zoadamu.json").read_text()) | changes
    (tiny / f"{name}.json").write_text(json.dumps(config))
    return f"{name}={tiny / f'{name}.json'}"


def test_the_built_in_contenders_are_all_momentum_modes_mezo_adamw_and_the_plain_loop(tiny):
    contenders = choose_contenders(arguments(tiny, "--max_steps 400"), CONFIGS)
    modes = [c.config["optimizer"]["params"]["momentum"]["dtype"] for c in contenders if c.name.startswith("zoadamu-")]
    assert modes == ["fp32", "bf16", "fp16", "int8", "replay"]
    assert [c.name for c in contenders if not c.name.startswith("zoadamu-")] == ["mezo", "adamw", "plain-mezo"]
    assert [c.name for c in contenders if not c.zeroth_order] == ["adamw"]
    # One schedule of the lr for all: without it AdamW would be made to look worse than it is.
    schedules = [c.config["scheduler"] for c in contenders if not c.plain]
    assert schedules == [schedules[0]] * 7 and schedules[0]["type"] == "WarmupDecayLR"


def test_given_configs_stand_beside_the_plain_loop_alone(tiny):
    given = write_config(tiny, "mine")
    names = [c.name for c in choose_contenders(arguments(tiny, f"--max_steps 400 --configs {given}"), CONFIGS)]
    assert names == ["mine", "plain-mezo"]
    chosen = arguments(tiny, f"--max_steps 400 --configs {given} --contenders adamw mine")
    assert [c.name for c in choose_contenders(chosen, CONFIGS)] == ["adamw", "mine"]


def test_lomo_takes_part_where_it_is_named_and_can_do_what_is_asked(tiny, monkeypatch):
    def settings(words):
        args = arguments(tiny, f"--max_steps 400 --contenders lomo plain-mezo {words}")
        contenders = choose_contenders(args, CONFIGS)
        assert [(c.optimizer, c.zeroth_order, c.config) for c in contenders] == [
            ("LOMO", False, None),
            ("plain MeZO", True, None),
        ]
        return check_settings(args, contenders, make_grids(args, contenders))[0]["batch"]

    monkeypatch.setattr(lomo, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="lomo-optim, which is not installed: pip install --no-deps lomo-optim"):
        settings("")
    monkeypatch.setattr(lomo, "PACKAGE", "json")  # whatever is there
    assert settings("--bf16 --ranks 2")["train_batch_size"] == 16
    with pytest.raises(InputError, match="gradient_accumulation_steps is 2; .* must be 1"):
        settings("--gradient_accumulation_steps 2")
    with pytest.raises(InputError, match="fp16: LOMO .* take bf16 or fp32"):
        settings("--fp16")
    with pytest.raises(InputError, match="--objective accuracy has no gradient, and LOMO needs one"):
        settings("--objective accuracy")


def test_grids_by_name_pattern_have_as_many_trials_for_all(tiny):
    args = arguments(
        tiny, "--max_steps 400 --contenders adamw mezo plain-mezo --lr_grid 1e-4,1e-3 adamw=1,2,3,4 --zo_eps_grid 1e-3,1e-2"
    )
    grids = make_grids(args, choose_contenders(args, CONFIGS))
    assert grids["adamw"] == [Point(1, None), Point(2, None), Point(3, None), Point(4, None)]
    assert grids["mezo"] == grids["plain-mezo"] == [Point(lr, eps) for eps in (1e-3, 1e-2) for lr in (1e-4, 1e-3)]
    args.lr_grid = ["*-mezo=7,8", "adamw=1,2,3,4", "mezo=5,6"]
    assert {p.lr for p in make_grids(args, choose_contenders(args, CONFIGS))["plain-mezo"]} == {7, 8}


def test_a_batch_that_all_share_comes_from_the_arguments(tiny):
    args = arguments(tiny, "--max_steps 400 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --ranks 2 --bf16")
    contenders = choose_contenders(args, CONFIGS)
    common, metric = check_settings(args, contenders, make_grids(args, contenders))
    assert common["batch"] == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "precision": "bf16",
    }
    assert metric.name == "accuracy" and common["majority"].keys() == {"dev", "test"}
    assert common["num_examples"] == {"train": 40, "dev": 13, "test": 21}


REFUSED = {
    "": "give one of --max_steps, --max_items, --max_seconds; got none of them",
    "--max_steps 400 --max_items 9": "got max_steps, max_items",
    "--max_steps 0": "--max_steps is 0, a budget of nothing",
    "--max_seconds 0": "--max_seconds is 0.0, a budget of nothing",
    "--max_steps 400 --ranks 0": "--ranks must be at least 1, got 0",
    "--max_steps 400 --seeds 1 1": "--seeds are [1, 1]; give different numbers",
    "--max_steps 400 --target 80": "--target must be above 0 and at most 1 (accuracy), got 80.0",
    "--max_steps 400 --configs": "--configs has no value; give NAME=FILE",
    "--max_steps 400 --contenders": "--contenders is empty",
    "--max_steps 400 --contenders sgd": "unknown contender 'sgd'; known: zoadamu-fp32",
    "--max_steps 400 --contenders mezo mezo": "names one twice",
    "--max_steps 400 --configs {tiny}/small.json": "write NAME=FILE",
    "--max_steps 400 --configs a={tiny}/nowhere.json": "cannot be read",
    "--max_steps 400 --configs a={tiny}/sgd.json": "a: optimizer.type is 'SGD'; known: ZOAdaMU, MeZO, FZOO, ",
    "--max_steps 400 --configs a={tiny}/stage2.json": "a: zero_optimization.stage is 2; set it to 3",
    "--max_steps 400 --configs a={tiny}/seeded.json": "a: optimizer.params.seed is 5, the benchmark gives every run its own",
    "--max_steps 400 --configs a={tiny}/unclipped.json": "a: gradient_clipping is missing",
    "--max_steps 400 --configs a={tiny}/small.json b={tiny}/large.json": "contenders differ in what must be equal: "
    "train_batch_size is 8 in a, 16 in b; train_micro_batch_size_per_gpu is 4 in a, 8 in b; precision is fp32 in a, bf16 in b",
    "--max_steps 400 --configs a={tiny}/small.json --per_device_train_batch_size 2": "a: --per_device_train_batch_size 2 "
    "contradicts the DeepSpeed JSON",
    "--max_steps 400 --lr_grid 1e-3 adamw=1,2": "different numbers of trials (lr x zo_eps): zoadamu-fp32 1",
    "--max_steps 400 --lr_grid adam=1": "'adam' matches none of zoadamu-fp32",
    "--max_steps 400 --lr_grid mezo=1": "--lr_grid has no values for zoadamu-fp32",
    "--max_steps 400 --lr_grid 1,x": "write numbers with commas",
    "--max_steps 400 --lr_grid 0": "every value must be finite and above 0",
    "--max_steps 400 --lr_grid 1,1": "stands there twice",
    "--max_steps 400 --task sst3": "unknown task 'sst3'",
    "--max_steps 400 --objective accuracy": "adamw: --objective accuracy has no gradient, and AdamW needs one",
    "--max_steps 400 --per_device_train_batch_size 30": "--num_train 40 is less than one step's 60 examples",
    "--max_steps 400 --output_dir {tiny}/small.json": "is a file, not a folder",
    "--max_steps 400 --output_dir {tiny}/data": "holds files but no benchmark",
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(tiny, text):
    write_config(tiny, "small", train_micro_batch_size_per_gpu=4)
    write_config(tiny, "large", train_micro_batch_size_per_gpu=8, bf16={"enabled": True})
    write_config(tiny, "stage2", zero_optimization={"stage": 2})
    write_config(tiny, "sgd", optimizer={"type": "SGD", "params": {}})
    write_config(tiny, "seeded", optimizer={"type": "ZOAdaMU", "params": {"lr": "auto", "total_steps": "auto", "seed": 5}})
    write_config(tiny, "unclipped", optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    before = sorted(tiny.rglob("*"))
    with pytest.raises((InputError, ConfigError)) as caught:
        benchmark(arguments(tiny, text.format(tiny=tiny)))
    assert REFUSED[text] in str(caught.value)
    assert sorted(tiny.rglob("*")) == before


def test_a_folder_keeps_its_settings(tmp_path):
    settings, config = {"ranks": 2, "arguments": ["--task", "sst2"]}, {"train_batch_size": "auto"}
    check_folder(tmp_path / "new")
    claim_folder(tmp_path / "new", settings, {"a": config})
    check_folder(tmp_path / "new")
    claim_folder(tmp_path / "new", settings, {"a": config, "b": config})
    with pytest.raises(InputError, match="ranks is 4, was 2"):
        claim_folder(tmp_path / "new", settings | {"ranks": 4}, {"a": config})
    with pytest.raises(InputError, match="the JSON of b is another one"):
        claim_folder(tmp_path / "new", settings, {"b": {"train_batch_size": 8}})


def test_every_budget_is_one_of_three(tiny):
    for text in ("--max_steps 3", "--max_items 100", "--max_seconds 0.5"):
        check_numbers(arguments(tiny, text))
