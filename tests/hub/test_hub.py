"""Model cards, and fine-tunes sent to a hub and made again from it. The hub is a server on this machine, to which the hub's own
client talks."""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ..helpers.harness import run_ranks
from ..helpers.hub_server import CLOSED, hub, use
from ..helpers.tiny_lm import save_model, write_data
from ..hf import trainer_runs

pytestmark = pytest.mark.ranks

REPO = "tester/tuned"


@pytest.fixture(scope="module")
def server():
    with hub() as served:
        yield served


def _command(*words) -> tuple[int, str]:
    """Exit status and what was written to stderr, without noise of other libraries."""
    from ds_zoadamu import cli

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(list(map(str, words)))
    return status, "".join(line + "\n" for line in said.getvalue().splitlines() if line.startswith("ds_zoadamu"))


def _finetune(arguments) -> tuple[int, str]:
    from ds_zoadamu.training import finetune_command

    sys.argv = ["finetune", *map(str, arguments)]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        status = finetune_command.main()
    return status, said.getvalue()


def _finetunes(rank, world_size, url, folder, model, data):
    arguments = [
        "--deepspeed", "--deepspeed_config", "cpu-small_zoadamu", "--model_name_or_path", model, "--data_dir", data,
        "--num_train", 20, "--num_dev", 13, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, "--max_steps", 3,
        "--eval_steps", 1, "--push_to_hub",
    ]  # fmt: skip
    use(url, f"{folder}/cache {rank}", token=None)
    early = _finetune([*arguments, "--output_dir", f"{folder}/early"])
    use(url, f"{folder}/cache {rank}")
    closed = _finetune([*arguments, "--output_dir", f"{folder}/closed", "--hub_model_id", CLOSED])
    sent = _finetune([*arguments, "--output_dir", f"{folder}/out", "--hub_model_id", REPO, "--hub_private_repo"])
    return early, closed, sent


@pytest.fixture(scope="module")
def finetuned(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    model, data = save_model(folder / "base"), write_data(folder / "data")
    return folder, model, run_ranks(2, _finetunes, server.url, str(folder), str(model), str(data))


def test_finetune_sends_its_model_with_a_card(server, finetuned):
    folder, _, [(early, closed, sent), others] = finetuned
    for (status, said), start in (
        (early, "repository 'early' cannot be made on the hub: no token that may do this: log in with `hf auth login`"),
        (closed, f"'{folder}/closed/model' cannot be sent to '{CLOSED}': the hub says 403: "),
    ):
        assert status == 2
        assert [line for line in said.splitlines() if start in line] == [said.splitlines()[-1]]
    assert f"everything is in {folder}/closed/model: `hf upload" in closed[1]
    assert not (folder / "early").exists()
    assert (folder / "closed" / "results.json").exists() and (folder / "closed" / "model" / "README.md").exists()
    assert sent[0] == 0 and others[2][0] == 0

    files, model = server.files[REPO], folder / "out" / "model"
    assert REPO in server.private
    assert files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert files["journal.jsonl"] == (folder / "out" / "journal.jsonl").read_bytes()
    card, results = ModelCard(files["README.md"].decode()), json.loads((folder / "out" / "results.json").read_text())
    sha256 = hashlib.sha256(files["journal.jsonl"]).hexdigest()
    stated = {"journal_sha256": sha256, "step": results["best_step"], "weights_sha256": results["weights_sha256"]}
    assert card.data.to_dict()["ds_zoadamu"] == stated
    assert {(r.metric_type, r.metric_value) for r in card.data.eval_results} >= {
        ("accuracy", results["accuracy"]["test_after"]),
        ("loss", results["loss"]["test_after"]),
    }
    assert card.data.base_model is None  # a folder's name would be no one's on the hub
    peak = max(rank["resident_peak"] for rank in results["ranks"])
    for said in (
        "| rule | ZOAdaMU |", "| seed | 0 |", "| batch | 8 (2 micro-batches of 4) |", f"{peak / 1e6:,.1f} MB resident", sha256,
        f"ds_zoadamu replay --from {REPO} --output rebuilt --base FOLDER",
        f"lm_eval --model hf --model_args pretrained={REPO} --tasks sst2 ",
    ):  # fmt: skip
        assert said in card.text, said


def _replays(rank, world_size, url, folder, base):
    folder = Path(folder)
    use(url, f"{folder}/replay cache")
    run, results = folder / "out", {}
    results["whole"] = _command("replay", "--from", REPO, "--base", base, "--output", folder / "whole")
    results["published"] = _command("publish", run, "journal-only")
    results["local"] = _command("publish", run, f"{folder}/local")
    results["rebuilt"] = _command("replay", "--from", "tester/journal-only", "--base", base, "--output", folder / "rebuilt")
    results["from a folder"] = _command(
        "replay", "--from", folder / "local", "--base", base, "--output", folder / "first", "--until", 1
    )
    shutil.copytree(folder / "local", folder / "changed")
    data = (folder / "changed" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "changed" / "journal.jsonl").write_bytes(b"".join(data[:-1]))
    (folder / "empty").mkdir()
    new = ["--output", folder / "new"]
    results["base"] = _command("replay", "--from", folder / "local", *new)
    results["changed"] = _command("replay", "--from", folder / "changed", "--base", base, *new)
    results["none"] = _command("replay", "--from", folder / "empty", "--base", base, *new)
    results["unknown"] = _command("replay", "--from", "tester/nobody", "--base", base, *new)
    results["both"] = _command("replay", "--from", folder / "local", "--journal", "j", *new)
    results["missing"] = _command("replay", "--base", base, *new)
    results["closed"] = _command("publish", run, CLOSED)
    use("http://127.0.0.1:9", f"{folder}/other cache")  # nobody listens there
    results["offline"] = _command("replay", "--from", "tester/elsewhere", "--base", base, *new)
    results["offline publish"] = _command("publish", run, "journal-only")
    return results


def test_journal_and_card_alone_make_the_model_again(server, finetuned):
    folder, base, _ = finetuned
    [results] = run_ranks(1, _replays, server.url, str(folder), str(base))
    good = ("whole", "published", "local", "rebuilt", "from a folder")
    assert {name: results[name][0] for name in good} == dict.fromkeys(good, 0), results
    assert set(server.files["tester/journal-only"]) == {"README.md", "journal.jsonl"}
    assert {path.name for path in (folder / "local").iterdir()} == {"README.md", "journal.jsonl"}
    tuned, first = load_file(folder / "out" / "model" / "model.safetensors"), load_file(folder / "first" / "model.safetensors")
    for name in ("whole", "rebuilt"):
        made = load_file(folder / name / "model.safetensors")
        assert made.keys() == tuned.keys() and all(torch.equal(made[key], tuned[key]) for key in tuned)
    best = json.loads((folder / "out" / "results.json").read_text())["best_step"]
    assert (best == 1) == all(torch.equal(first[key], tuned[key]) for key in tuned)
    text = server.files["tester/journal-only"]["README.md"].decode()
    assert text.count("## Rebuild the weights") == 1 and "--from tester/journal-only --output rebuilt" in text
    assert "pretrained=rebuilt --tasks sst2 " in text and "| metric |" in text
    for name, start in {
        "base": "--base 'base' is neither a folder nor a model that the hub hands out",
        "changed": f"journal.jsonl of '{folder}/changed' has SHA-256 ",
        "none": f"'{folder}/empty' has no journal.jsonl: nothing can be rebuilt from it",
        "unknown": "'tester/nobody' cannot be fetched from the hub: there is no such repository, or the token may not see it",
        "both": "--from and --journal both name a journal: give one of them",
        "missing": "--journal is missing; it is needed without --from",
        "closed": f"journal.jsonl, README.md cannot be sent to '{CLOSED}': the hub says 403",
        "offline": "'tester/elsewhere' cannot be fetched from the hub: the hub at http://127.0.0.1:9 cannot be reached",
        "offline publish": "repository 'journal-only' cannot be made on the hub: the hub at http://127.0.0.1:9 cannot ",
    }.items():
        status, said = results[name]
        assert re.match(f"ds_zoadamu (replay|publish): {re.escape(start)}", said), (name, said)
        assert status == 2 and said.count("\n") == 1, (name, said)
    assert not (folder / "new").exists()


def _trains(rank, world_size, url, folder):
    from ds_zoadamu.errors import HubError
    from ds_zoadamu.hf.trainer import ZOTrainer

    folder = Path(folder)
    use(url, f"{folder}/cache {rank}")
    pushed = {"push_to_hub": True, "save_strategy": "no", "eval_strategy": "epoch", "eval_dataset": trainer_runs.rows(8, 2)}
    made = trainer_runs.trainer(folder / "out", world_size, hub_model_id="tester/trainer", **pushed)
    digest = trainer_runs.trained(made)
    made.save_model()
    closed = trainer_runs.trainer(folder / "closed", world_size, hub_model_id=CLOSED, **pushed)
    closed.train()
    with pytest.raises(HubError) as refused:
        closed.save_model()
    after = closed.evaluate()["eval_loss"]  # the ranks go on together
    use(url, f"{folder}/cache {rank}", token="another")
    with pytest.raises(HubError) as no_token:
        trainer_runs.trainer(folder / "late", world_size, hub_model_id="tester/late", **pushed)
    adapters = trainer_runs.trainer(folder / "lora", world_size, model=trainer_runs.adapted(), save_strategy="no")
    adapters.train()
    adapters.save_model()
    assert ZOTrainer is type(made)
    return digest, str(refused.value), str(no_token.value), after


def _adapters_again(rank, world_size, url, folder):
    use(url, f"{folder}/cache adapters")
    published = _command("publish", f"{folder}/lora", "tester/adapters")
    return published, _command("replay", "--from", "tester/adapters", "--output", f"{folder}/adapters")


def test_the_trainer_saves_then_sends(server, tmp_path):
    results = run_ranks(2, _trains, server.url, str(tmp_path))
    assert results[0][0] == results[1][0] and results[0][3] == results[1][3]
    for _, refused, no_token, _ in results:
        assert f"'{tmp_path}/closed' cannot be sent to '{CLOSED}': the hub says 403" in refused and "\n" not in refused
        assert "the repository cannot be made on the hub: no token that may do this" in no_token
    assert (tmp_path / "closed" / "model.safetensors").exists()

    files = server.files["tester/trainer"]
    assert {"README.md", "journal.jsonl", "model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    stated = card.data.to_dict()["ds_zoadamu"]
    assert stated == {
        "journal_sha256": hashlib.sha256(files["journal.jsonl"]).hexdigest(), "step": 6, "weights_sha256": results[0][0]
    }  # fmt: skip
    assert {"generated_from_trainer", "ds_zoadamu"} <= set(card.data.tags)
    for said in ("### Training results", "| rule | ZOAdaMU |", "Peak memory, measured: ", "- learning_rate: 0.01"):
        assert said in card.text, said
    assert "adamw" not in card.text

    [(published, rebuilt)] = run_ranks(1, _adapters_again, server.url, str(tmp_path))
    assert published[0] == rebuilt[0] == 0, (published, rebuilt)
    assert len(server.files["tester/adapters"]) == 4
    tuned, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "adapters"))
    assert made.keys() == tuned.keys() and all(torch.equal(made[key], tuned[key]) for key in tuned)
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.library_name == "peft" and "peft=." in card.text and "ds_zoadamu replay --from . " in card.text
