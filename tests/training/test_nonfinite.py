"""Scores, losses and weights that are NaN or infinite: counted as wrong, never the best, and named before a run begins."""

import json
import math
from pathlib import Path

import pytest
import torch
from deepspeed.utils import logger

from ds_zoadamu.durability.journal import read_journal
from ds_zoadamu.tasks import SST2, ClassificationTask, PromptRow, PromptTask, candidate_scores, is_finite
from tests.helpers.harness import run_ranks
from tests.helpers.jobs import as_bytes, config, engine_for
from tests.helpers.models import OddModel, odd_batches
from tests.helpers.tiny_lm import make_model, make_tokenizer, save_model, sentences, write_data

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- scores -------------------------------------------------------------------------------------------------------------------


def _broken_model():
    """One row of the input embedding is infinite: the scores of sentences with " dull" are NaN."""
    model = make_model(tie_word_embeddings=False)
    (token,) = make_tokenizer()(" dull", add_special_tokens=False).input_ids
    model.model.decoder.embed_tokens.weight.data[token, 3] = math.inf
    return model


def _classes(renamed):
    """SST-2, and the same with its classes numbered the other way round; the examples of each."""
    rows = [(row["sentence"], row["label"]) for row in sentences(37, seed=3)]
    task = (
        PromptTask(name="renamed", template=SST2.template, label_words={"0": " great", "1": " terrible"}) if renamed else SST2
    )
    return task, [PromptRow(f"{text} It was", 1 - label if renamed else label) for text, label in rows]


def _evaluations(rank, world_size):
    model, found, warnings = _broken_model(), [], []
    logger.addFilter(lambda record: warnings.append(record.getMessage()) or True)
    for renamed in (False, True):
        task, items = _classes(renamed)
        task = task.bind(make_tokenizer(), model.config, batch_size=4)
        found.append(task.evaluate(model, list(map(task.encode, items))))
    return found, sum("scores of some examples are not finite" in line for line in warnings)


def test_scores_that_are_not_finite_are_wrong_answers_and_counted():
    model, (task, items) = _broken_model(), _classes(False)
    task, hits, broken = task.bind(make_tokenizer(), model.config), 0, 0
    for item in items:
        with torch.no_grad():
            terrible, great = candidate_scores(model, task.collate([task.encode(item)]))[0].tolist()
        finite = math.isfinite(terrible) and math.isfinite(great)
        broken += not finite
        hits += finite and (great > terrible) == (item.label == 1)
    assert 0 < broken < len(items) and hits > 0
    for world_size in (1, 2):
        for rank, (found, warned) in enumerate(run_ranks(world_size, _evaluations)):
            assert warned == (rank == 0)  # of two evaluations, once
            for result in found:  # the names of the classes do not matter
                assert (result["accuracy"], result["num_nonfinite"], result["num_examples"]) == (hits / 37, broken, 37)
                assert math.isnan(result["loss"]) and not is_finite(result)


def _evaluation(accuracy, loss, num_examples, num_nonfinite=0):
    return {"accuracy": accuracy, "loss": loss, "num_examples": num_examples, "num_nonfinite": num_nonfinite}


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    from ds_zoadamu.training.progress import Progress

    better, metric = ClassificationTask.main_metric.is_better, ClassificationTask.main_metric
    good, nan, overflown = _evaluation(0.25, 0.9, 8), _evaluation(1.0, math.nan, 8, 8), _evaluation(1.0, math.inf, 8)
    assert better(good, None) and not better(nan, None) and not better(nan, good) and not better(overflown, good)
    assert not better(_evaluation(1.0, 0.1, 8, 1), good)
    evaluations = {("dev", 0): good, ("dev", 2): nan, ("dev", 4): good, ("dev", 6): overflown}
    assert Progress(6, evaluations).best(metric) == (4, good)
    assert Progress(6, {("dev", 2): nan}).best(metric) == (0, None)


def test_a_run_of_an_older_release_that_may_have_kept_such_a_model_is_refused():
    from ds_zoadamu.tasks import InputError
    from ds_zoadamu.training.progress import _progress

    line = {"kind": "eval", "split": "dev", "step": 0, "accuracy": 0.5, "loss": 0.7, "num_examples": 8}
    before = [line, {**line, "split": "test"}]
    assert _progress(2, before).evaluations["dev", 0] == _evaluation(0.5, 0.7, 8)
    with pytest.raises(InputError, match="an earlier release has evaluated step 2, whose loss .* replay --until"):
        _progress(2, [*before, {**line, "step": 2, "accuracy": 0.9, "loss": None}])


# --- runs ---------------------------------------------------------------------------------------------------------------------


def _arguments(model, data, output, rule="zoadamu", *more):
    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / f"cpu-small_{rule}.json"),
        "--model_name_or_path", str(model), "--data_dir", str(data), "--num_train", "40", "--num_dev", "13",
        "--learning_rate", "1e-3", "--max_steps", "3", "--eval_steps", "1", "--output_dir", str(output), *more,
    ]  # fmt: skip


def _commands(rank, world_size, folder):
    """What each command says of a broken model: the type of its error and the message."""
    from ds_zoadamu.training.arguments import evaluate_parser, finetune_parser
    from ds_zoadamu.training.measure import measure
    from ds_zoadamu.training.run import finetune
    from ds_zoadamu.training.search import find_lr

    data, said = folder / "data", {}

    def call(name, function, parser, arguments):
        try:
            said[name] = ("returned", function(parser().parse_args(arguments)))
        except Exception as error:
            said[name] = (type(error).__name__, str(error))

    overwritten = _arguments(folder / "nan", data, folder / "precious", "zoadamu", "--overwrite_output_dir")
    call("nan", finetune, finetune_parser, overwritten)
    call("nan with gradients", finetune, finetune_parser, _arguments(folder / "nan", data, folder / "adamw", "adamw"))
    search = ("--find_lr", "--find_lr_values", "0", "1e-3")
    call("find_lr", find_lr, finetune_parser, _arguments(folder / "nan", data, folder / "search", "zoadamu", *search))
    call("diverges", finetune, finetune_parser, _arguments(folder / "huge", data, folder / "diverged"))
    given = ["--model_name_or_path", str(folder / "nan"), "--data_dir", str(data), "--output_file", str(folder / "out.json")]
    call("evaluate", measure, evaluate_parser, given)
    given[-1] = str(folder / "nowhere" / "out.json")
    call("evaluate nowhere", measure, evaluate_parser, given)
    return said


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """(folder, what every command said on each rank): "nan" has one NaN, in rank 1's part of one parameter; "huge" has finite
    scores, and losses so large that its first step overflows."""
    folder = tmp_path_factory.mktemp("nonfinite")
    write_data(folder / "data")
    for name in ("nan", "huge"):
        save_model(folder / name)
        model = make_model()
        if name == "nan":
            model.model.decoder.layers[1].fc2.weight.data[-1, -1] = math.nan
        else:
            model.model.decoder.final_layer_norm.weight.data *= 1e25
        model.save_pretrained(folder / name)
    (folder / "precious").mkdir()
    (folder / "precious" / "results.json").write_text("precious")
    return folder, run_ranks(2, _commands, folder)


def test_a_run_from_weights_that_are_not_finite_is_refused_before_it_begins(commands):
    folder, ranks = commands
    parameter = "parameter 'model.decoder.layers.1.fc2.weight' holds NaN or infinity"
    for said in ranks:
        for name in ("nan", "nan with gradients"):
            assert said[name][0] == "InputError" and parameter in said[name][1], said[name]
            assert "before training the scores of 13 of 13 dev examples are not finite" in said[name][1]
        assert said["find_lr"][0] == "NonFiniteWeightsError" and parameter in said["find_lr"][1], said["find_lr"]
    assert [path.name for path in (folder / "precious").iterdir()] == ["results.json"]
    assert (folder / "precious" / "results.json").read_text() == "precious"
    assert not (folder / "adamw").exists()


def test_a_run_that_diverges_has_no_best_model(commands):
    folder, ranks = commands
    for said in ranks:
        assert said["diverges"][0] == "NonFiniteLossError" and "no evaluated step of 3 has finite scores" in said["diverges"][1]
    lines = [strictly(line) for line in (folder / "diverged" / "metrics.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line for line in lines if line["kind"] == "eval" and line["split"] == "dev"}
    assert evaluated[0]["num_nonfinite"] == 0 and math.isfinite(evaluated[0]["loss"])
    for step in (1, 2, 3):
        assert (evaluated[step]["accuracy"], evaluated[step]["loss"], evaluated[step]["num_nonfinite"]) == (0.0, None, 13)
    assert not (folder / "diverged" / "model").exists() and not (folder / "diverged" / "best").exists()


def test_evaluate_counts_and_writes_json(commands):
    folder, ranks = commands
    for said in ranks:
        how, figures = said["evaluate"]
        assert how == "returned" and (figures["accuracy"], figures["num_nonfinite"]) == (0.0, 21)
        assert said["evaluate nowhere"] == (
            "InputError",
            f"--output_file {folder}/nowhere/out.json: there is no such folder; make it first",
        )
    written = strictly((folder / "out.json").read_text())
    assert (written["accuracy"], written["loss"], written["num_nonfinite"]) == (0.0, None, 21)


# --- the engine ---------------------------------------------------------------------------------------------------------------


def _first_step(rank, world_size, folder):
    """How a model of which rank 1 holds a NaN refuses its first step."""
    model = OddModel()
    with torch.no_grad():
        model.mix.weight[-1, -1] = math.nan
    engine = engine_for(model, config(world_size))
    engine.open_journal(Path(folder) / "journal.jsonl")
    before = as_bytes({p.name: p.weight for p in engine.optimizer.partitions})
    with pytest.raises(FloatingPointError) as error:
        engine.train_batch(odd_batches(2)[rank])
    unchanged = as_bytes({p.name: p.weight for p in engine.optimizer.partitions}) == before
    engine.close_journal()
    return type(error.value).__name__, str(error.value), unchanged, engine.optimizer.step_count


def _advice(rank, world_size, lr, broken):
    """The message after two steps whose losses are not finite; with ``broken`` a weight is NaN by then."""

    def loss_fn(module, batch):
        return module(**batch).loss * (math.nan if engine.optimizer.next_step > 1 else 1.0), 1.0

    engine = engine_for(OddModel(), config(world_size, params={"lr": lr, "max_skipped_steps": 2}), loss_fn=loss_fn)
    engine.train_batch(odd_batches(2)[rank])
    if broken and rank == world_size - 1:
        (partition,) = [p for p in engine.optimizer.partitions if p.name == "mix.weight"]
        partition.weight[-1] = math.nan
    engine.train_batch(odd_batches(2)[rank])
    with pytest.raises(FloatingPointError) as error:
        engine.train_batch(odd_batches(2)[rank])
    return str(error.value)


ADVICE = {
    (0.0, False): ("Try a smaller zo_eps (now 0.001), or look for broken examples", "lr"),
    (1e-2, False): ("Try a lower lr (now 0.01), a smaller zo_eps (now 0.001), or look for broken examples", "fp16"),
    (1e-2, True): ("The parameter 'mix.weight' holds NaN or infinity", "zo_eps"),
}


def _messages(rank, world_size, folder):
    return _first_step(rank, world_size, folder), [_advice(rank, world_size, *case) for case in ADVICE]


def test_what_the_engine_says_of_losses_that_are_not_finite(tmp_path):
    for (kind, message, unchanged, steps), advice in run_ranks(2, _messages, str(tmp_path)):
        assert kind == "NonFiniteWeightsError" and "the model's parameter 'mix.weight' holds NaN or infinity" in message
        assert unchanged and steps == 0
        for (present, absent), text in zip(ADVICE.values(), advice, strict=True):
            assert present in text and absent not in text
    assert read_journal(tmp_path / "journal.jsonl").records == []
