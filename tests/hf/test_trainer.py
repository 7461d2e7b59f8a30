"""Transformers' Trainer with zeroth-order steps: the same run on any number of ranks, resumed, evaluated, saved."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from ds_zoadamu.durability.journal import read_journal

from ..helpers.harness import run_ranks
from ..helpers.tiny_lm import make_tokenizer, save_model
from . import trainer_runs as runs

pytestmark = pytest.mark.ranks

JSON = Path(__file__).parents[2] / "ds_configs" / "cpu-small_zoadamu.json"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(runs.rows())


def _kinds(rank, world_size, folder):
    kinds = {
        "plain": {},
        "json": {"deepspeed": str(JSON)},
        "bf16": {"bf16": True, "use_cpu": True},
        "by length": {"train_sampling_strategy": "group_by_length"},
        "smoothed": {"label_smoothing_factor": 0.1},
        "stream": {"data": Stream()},
        "lora": {"model": runs.adapted()},
        "short last step": {"data": runs.rows(24)},
    }
    digests = {}
    for kind in kinds if world_size < 4 else ("plain", "lora"):
        changes = kinds[kind]
        saving = "steps" if kind == "lora" else "no"
        made = runs.trainer(folder / f"{kind} {world_size}", world_size, save_strategy=saving, **changes)
        digests[kind] = runs.trained(made)
    return digests, runs.names(folder / f"lora {world_size}" / "checkpoint-6")


def test_the_same_weights_on_any_number_of_ranks(tmp_path):
    one, two, four = (run_ranks(n, _kinds, tmp_path)[0] for n in (1, 2, 4))
    assert one[0] == two[0] and four[0].items() <= one[0].items()
    assert len(set(one[0].values())) == len(one[0])
    for _, files in (one, two, four):
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files


def _made(folder, world_size, kind, changes, **own):
    model = runs.adapted() if kind == "before a checkpoint" else None
    return runs.trainer(folder, world_size, model=model, **changes, **own)


def _dies(rank, world_size, folder, kind, changes):
    made = _made(folder / kind, world_size, kind, changes, callbacks=[runs.dying(5)])
    with pytest.raises(runs.Died):
        made.train()


def _resumes(rank, world_size, folder, kind, changes):
    made = _made(folder / kind, world_size, kind, changes)
    return runs.trained(made, resume_from_checkpoint=True), [log["step"] for log in made.state.log_history if "loss" in log]


def _whole(rank, world_size, folder, kind, changes):
    return runs.trained(_made(folder / f"whole {kind}", world_size, kind, changes))


@pytest.mark.parametrize("kind", ["plain", "by length", "before a checkpoint", "half a checkpoint"])
def test_a_run_that_was_killed_goes_on_on_another_number_of_ranks(tmp_path, kind):
    changes = {"train_sampling_strategy": "group_by_length"} if kind == "by length" else {}
    changes |= {"save_strategy": "no"} if kind == "before a checkpoint" else {}
    changes |= {"data": Stream()} if kind == "half a checkpoint" else {}
    run_ranks(2, _dies, tmp_path, kind, changes)
    if kind == "half a checkpoint":
        (tmp_path / kind / "checkpoint-4" / "trainer_state.json").write_text("{")
    [expected] = run_ranks(1, _whole, tmp_path, kind, changes)
    [(digest, steps)] = run_ranks(1, _resumes, tmp_path, kind, changes)
    assert digest == expected
    if kind == "plain":  # a run that has ended stays as it is
        [(again, _)] = run_ranks(1, _resumes, tmp_path, kind, changes)
        assert again == expected and len(read_journal(tmp_path / kind / "journal.jsonl").records) == 6
    assert steps == [1, 2, 3, 4, 5, 6]  # of the steps before the checkpoint the Trainer remembers its reports


def _evaluated(rank, world_size, folder):
    from ds_zoadamu.hf.models import save_pretrained

    def accuracy(prediction):
        return {"accuracy": float(numpy.mean(prediction.predictions[0].argmax(-1) == prediction.label_ids))}

    reported = []
    changes = {"eval_dataset": runs.rows(8, seed=2), "compute_metrics": accuracy}
    made = runs.trainer(folder / "first", world_size, **changes)
    before = made.evaluate()
    first = runs.trained(made)
    plain = runs.trained(runs.trainer(folder / "plain", world_size, callbacks=[runs.recording(reported)], **changes))
    best = runs.trainer(
        folder / "best", world_size, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, **changes
    )
    best.train()
    step, journaling = best.deepspeed.state().step, best.deepspeed.journaling
    best.save_model(str(folder / "best"))
    predicted = best.predict(runs.rows(8, seed=2)).metrics["test_loss"]
    save_pretrained(best.deepspeed, folder / "again")
    losses = {log["step"]: log["eval_loss"] for log in best.state.log_history if "eval_loss" in log}
    return before["eval_loss"], first == plain, step, journaling, predicted, losses, reported


def test_evaluation_metrics_prediction_and_the_best_model(tmp_path):
    (result, same) = run_ranks(2, _evaluated, tmp_path)
    before, as_without, step, journaling, predicted, losses, reported = result
    assert result[:-1] == same[:-1]  # of the reports those of the first rank count
    assert numpy.isfinite(before) and as_without
    best = min(losses, key=losses.get)
    assert step == best and not journaling  # the journal is closed where the best weights are loaded
    assert predicted == pytest.approx(losses[best], rel=1e-6)
    assert len((tmp_path / "best" / "journal.jsonl").read_text().splitlines()) == 7
    assert {"checkpoint-2", "checkpoint-6", "config.json", "journal.jsonl", "tokenizer.json"} <= set(
        runs.names(tmp_path / "best")
    )
    for name, tensor in runs.saved(tmp_path / "again").items():
        assert torch.equal(tensor, runs.saved(tmp_path / "best")[name])
    steps = [report for report in reported if "loss" in report]
    records = read_journal(tmp_path / "plain" / "journal.jsonl").records
    assert [report["step"] for report in steps] == [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    for report, record in zip(steps, records, strict=True):
        assert {"loss", "learning_rate", "epoch", "effective_zo_eps"} <= report.keys()
        for name in ("loss_plus", "loss_minus"):
            assert report[name] == getattr(record, name)
        assert report["projected_grad"] == record.projected_grads[0] and report["learning_rate"] == record.lrs[0]


def _classifies(rank, world_size, folder, model):
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    from ds_zoadamu.hf import MeZOConfig, ZOTrainer

    config = json.loads(JSON.read_text()) | {"gradient_clipping": "auto"}
    args = runs.arguments(folder / f"run {world_size}", world_size, deepspeed=config, use_cpu=True)
    data = [{**row, "labels": index % 2} for index, row in enumerate(runs.rows())]
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)  # straight into partitions
    made = ZOTrainer(model=classifier, args=args, train_dataset=data, data_collator=DataCollatorWithPadding(make_tokenizer()))
    digest = runs.trained(made)
    mezo = runs.trained(runs.trainer(folder / f"mezo {world_size}", world_size, zo=MeZOConfig()))
    return digest, mezo, [log["effective_zo_eps"] for log in made.state.log_history if "loss" in log][0]


def test_a_classifier_with_a_new_head_and_mezo(tmp_path):
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    results = [run_ranks(n, _classifies, tmp_path, model)[0] for n in (1, 2)]
    assert results[0][1:] == results[1][1:]
    assert results[0][2] > 0


def _refused(rank, world_size, folder):
    from ds_zoadamu.hf import ZOAdaMUConfig

    messages = {}

    def attempt(name, call):
        with pytest.raises(Exception) as raised:
            call()
        messages[name] = f"{type(raised.value).__name__}: {raised.value}"

    json_with = json.loads(JSON.read_text())
    attempt("optim", lambda: runs.trainer(folder, 1, optim="adafactor"))
    attempt("norm", lambda: runs.trainer(folder, 1, max_grad_norm=0.5))
    attempt("compile", lambda: runs.trainer(folder, 1, torch_compile=True))
    attempt("neftune", lambda: runs.trainer(folder, 1, neftune_noise_alpha=5.0))
    attempt("adamw", lambda: runs.trainer(folder, 1, deepspeed=json_with | {"optimizer": {"type": "AdamW"}}))
    attempt("option", lambda: ZOAdaMUConfig(zo_epsilon=1e-3))
    attempt("value", lambda: ZOAdaMUConfig(zo_eps=0))
    attempt("clipping", lambda: runs.trainer(folder, 1, deepspeed=json_with | {"gradient_clipping": 1.0}))
    attempt("zo", lambda: runs.trainer(folder, 1, zo="ZOAdaMU"))
    runs.trainer(folder, 1, max_grad_norm=0.0, gradient_checkpointing=True).train()
    attempt("journal", lambda: runs.trainer(folder, 1).train())
    attempt("resume", lambda: runs.trainer(folder / "nothing", 1).train(resume_from_checkpoint=True))
    attempt("other seed", lambda: runs.trainer(folder, 1, data_seed=7).train(resume_from_checkpoint=True))
    return messages


def test_what_cannot_work_is_said_in_one_line(tmp_path):
    [messages] = run_ranks(1, _refused, tmp_path / "run")
    for name, start in {
        "optim": "ConfigError: optim is 'adafactor' in the training arguments; ",
        "norm": "ConfigError: max_grad_norm is 0.5 in the training arguments; there are no gradients to clip",
        "compile": "ConfigError: torch_compile is True in the training arguments; ",
        "neftune": "ConfigError: neftune_noise_alpha is 5.0 in the training arguments; ",
        "adamw": "ConfigError: optimizer.type is 'AdamW' in the DeepSpeed JSON; ",
        "option": "ConfigError: zo: unknown 'zo_epsilon' (did you mean 'zo_eps'?)",
        "value": "ConfigError: zo: zo_eps is 0; it must be finite and >= 1e-08",
        "clipping": "ConfigError: gradient_clipping is 1.0; there are no gradients to clip",
        "zo": "ConfigError: zo is 'ZOAdaMU'; pass ZOAdaMUConfig(...) or MeZOConfig(...)",
        "journal": f"JournalError: journal '{tmp_path / 'run' / 'journal.jsonl'}' exists: a run has written it. ",
        "resume": "ValueError: ",
        "other seed": f"JournalError: journal '{tmp_path / 'run' / 'journal.jsonl'}' is of another run: task.data_seed is 7",
    }.items():
        assert messages[name].startswith(start), messages[name]
        assert "\n" not in messages[name]
