"""The paper's tables and settings as data, and what a budget makes of them."""

from types import SimpleNamespace

import pytest

from ds_zoadamu.config import load
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.plan.models import load_config
from ds_zoadamu.reproduce.arguments import reproduce_parser, with_budget
from ds_zoadamu.reproduce.cells import make_cells
from ds_zoadamu.reproduce.commands import Commands, config_of
from ds_zoadamu.reproduce.main import reproduce
from ds_zoadamu.reproduce.planned import planned
from ds_zoadamu.reproduce.published import TABLES, TASK_TITLES, method_of, metric_of, published_table, settings_of
from ds_zoadamu.tasks import TASKS, InputError
from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser


def cells_of(text, kind="causal"):
    args = with_budget(parsed(text))
    return {(c.method.name, c.task): c for c in make_cells(args, published_table(args.table), kind)}, args


def parsed(text):
    return reproduce_parser().parse_args([*text.split(), "--model", "m", "--output_dir", "out"])


def test_the_tables_are_the_papers():
    sizes = {number: (len(t.methods), len(t.tasks)) for number in TABLES if (t := published_table(number))}
    assert sizes == {1: (10, 11), 2: (8, 6), 3: (10, 3), 4: (3, 5)}
    first, second, third, fourth = map(published_table, TABLES)
    assert first.results["zoadamu", "rte"] == (72.9, None) and first.results["adam", "drop"] == (31.3, None)
    assert second.results["zoadamu-lora", "trec"] == (95.2, 0.5) and second.seeds == (13, 21, 42, 87, 100)
    # Table 3 has both halves of a column in one cell: momentum on the perturbation / on the gradient.
    assert (third.results["adamax-perturbation", "sst2"], third.results["adamax-gradient", "sst2"]) == (
        (87.9, None),
        (64.8, None),
    )
    assert fourth.results["mezo", "squad"] == (78.5, None) and fourth.objectives["sst5"] == "accuracy"
    for table in (first, second, third, fourth):
        assert {task for task in table.tasks} <= set(TASK_TITLES) & set(TASKS)
        for task in table.tasks:
            metric = TASKS[task].metric
            assert metric_of(task).name == (metric if isinstance(metric, str) else metric[0])


@pytest.mark.parametrize("kind", ["causal", "masked", "sequence-to-sequence"])
@pytest.mark.parametrize("number", TABLES)
def test_every_method_that_trains_has_settings_and_a_json_that_loads(number, kind, tmp_path):
    for method in published_table(number).methods:
        if method.optimizer is None:
            continue
        settings = settings_of(kind, method, "sst2")
        assert settings.steps(1000) > 0 and all(0 < lr < 1 for lr in settings.lr)
        words = ["--model_name_or_path", "m", "--max_steps", "10", "--output_dir", "o", "--learning_rate", "1e-5"]
        args = finetune_parser().parse_args(words)
        config = load(config_of(method), world_size=1, model_info=SimpleNamespace(hidden_size=32), overrides=args)
        assert (config.rule is not None) == method.zeroth_order
    assert settings_of("masked", method_of("zoadamu"), "sst2").zo_eps == (1e-3, 1e-2, 1e-1)
    assert settings_of("causal", method_of("mezo"), "squad").lr == (1e-6, 5e-7, 1e-7)
    assert settings_of("causal", method_of("adam"), "sst2").steps(1000) == 625
    assert settings_of("causal", method_of("zoadamu"), "sst2").note == "published for MeZO"


def test_the_papers_budget_is_the_papers():
    cells, _ = cells_of("--table 2", "masked")
    cell = cells["zoadamu", "trec"]
    assert (cell.max_steps, cell.settings.batch_size, len(cell.points), cell.examples_per_class) == (100_000, 64, 9, 512)
    assert cell.seeds == (13, 21, 42, 87, 100) and cells["zero-shot", "trec"].seeds == (13,)
    cells, args = cells_of("--table 1")
    assert cells["adam", "cb"].max_steps == 625 and cells["mezo", "cb"].max_steps == 20_000 and args.num_test == 1000
    assert cells["mezo", "squad"].examples_per_class is None and len(cells) == 110
    cells, _ = cells_of("--table 4", "causal")
    squad = cells["mezo", "squad"]
    assert (squad.objective, squad.method.tuning, squad.settings.lr) == ("f1", "prefix", (5e-2, 1e-2, 5e-3))
    assert squad.examples_per_class is None and cells["mezo", "sst2"].examples_per_class == 512
    assert cells["zero-shot", "squad"].objective is None


def test_a_budget_is_cut_and_what_is_given_counts_more():
    cells, args = cells_of(
        "--table 2 --budget tiny --num_seeds 2 --max_steps 20 --lr_grid 1e-4 mezo=1e-3,1e-2 --tasks sst2", "masked"
    )
    mezo, zoadamu = cells["mezo", "sst2"], cells["zoadamu", "sst2"]
    assert [(p.lr, p.zo_eps) for p in mezo.points] == [(1e-3, 1e-3)] and [p.lr for p in zoadamu.points] == [1e-4]
    assert mezo.seeds == (13, 21) and mezo.max_steps == 20 and mezo.settings.batch_size == args.batch_size == 8
    cells, _ = cells_of(
        "--table 2 --lr_grid mezo=1e-3,1e-2 --zo_eps_grid mezo*=1e-2,1e-1 --seeds 5 --methods mezo adam", "masked"
    )
    assert len(cells["mezo", "rte"].points) == 4 and len(cells["adam", "rte"].points) == 3
    assert {method for method, _ in cells} == {"mezo", "adam"} and cells["adam", "rte"].seeds == (5,)


def test_the_commands_are_those_of_finetune_and_evaluate(tmp_path):
    cells, args = cells_of("--table 2 --data_dir data --ranks 2 --per_device_train_batch_size 8 --bf16", "masked")
    commands, cell = Commands(args), cells["zoadamu-lora", "trec"]
    run = commands.run(cell, 21, cell.points[0])
    found = finetune_parser().parse_args([*run.arguments, *run.output])
    assert (found.task, found.data_dir, found.bf16) == ("trec", "data/trec", True)
    assert (found.examples_per_class, found.num_train, found.num_dev, found.num_test) == (512, None, None, 1000)
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (8, 4)  # 64 on 2 ranks
    assert (found.learning_rate, found.zo_eps, found.seed, found.resume) == (1e-2, 1e-1, 21, True)
    assert run.resumes and run.folder.parts[-4:] == ("runs", "trec", "zoadamu-lora", "lr0.01-eps0.1-steps100000-seed21")
    adam = commands.run(cells["adam", "rte"], 13, cells["adam", "rte"].points[0])
    assert not adam.resumes and not finetune_parser().parse_args([*adam.arguments, *adam.output]).resume
    zero = commands.run(cells["zero-shot", "rte"], 13)
    assert evaluate_parser().parse_args([*zero.arguments, *zero.output]).output_file == "out/evaluation.json"


@pytest.mark.parametrize(
    "text, message",
    {
        "--table 1 --tasks trec": "--tasks trec: the table has no such one; it has sst2, rte, cb",
        "--table 1 --methods sgd": "--methods sgd: the table has no such one; it has zero-shot, in-context",
        "--table 1 --ranks 3": "a step has 16 examples, which 3 ranks cannot share evenly",
        "--table 1 --num_seeds 0": "--num_seeds must be at least 1, got 0",
        "--table 1 --max_steps 0": "--max_steps must be at least 1, got 0",
        "--table 1 --seeds 1 1": "--seeds are [1, 1]; give different numbers >= 0",
        "--table 1 --bf16 --fp16": "--bf16 and --fp16 exclude each other",
        "--table 1 --lr_grid sgd=1e-3": "--lr_grid sgd=1e-3: 'sgd' matches none of mezo",
    }.items(),
)
def test_what_is_refused(text, message):
    with pytest.raises(InputError) as refused:
        cells_of(text)
    assert message in str(refused.value)


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    args = parsed("--table 1")
    args.model, args.output_dir = str(tmp_path / "none" / "at" / "all"), str(tmp_path / "out")
    with pytest.raises(ConfigError, match="--model"):
        reproduce(args)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_runs_memory_and_hours():
    cells, args = cells_of("--table 1 --methods zero-shot mezo zoadamu adam --tasks sst2 squad --fp16")
    args.model = "facebook/opt-125m"
    title, note, table = planned(args, list(cells.values()), load_config("facebook/opt-125m"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert title.text.endswith("facebook/opt-125m: what would run") and note.text.startswith("18 runs, ")
    assert rows["SST-2, zero-shot"] == (1, "", "", "") and rows["SQuAD, MeZO"][:2] == (3, "20,000")
    assert rows["SST-2, Adam, full"][:3] == (3, "625", "backward passes are not planned")
    # 3 runs of 20,000 steps take 1.5 times as long as 2; both are rounded to two digits.
    sst2, squad = float(rows["SST-2, MeZO"][3]), float(rows["SQuAD, MeZO"][3])
    assert 0 < sst2 < squad and squad / sst2 == pytest.approx(1.5, rel=0.06)
    memory = [float(rows[f"SST-2, {name}"][2]) for name in ("MeZO", "ZO-AdaMU")]
    assert 4 < memory[0] <= memory[1] < 80
