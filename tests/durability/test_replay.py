"""The tuned model out of base and journal alone: bit for bit the run's own, in every mode, on any number of ranks."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_zoadamu import cli
from ds_zoadamu.durability.journal import Journal, read_journal
from ds_zoadamu.errors import JournalError, ReplayError
from ds_zoadamu.files.locks import LockedFile
from ds_zoadamu.kernels.types import GRAD_BITS

from ..helpers import commands, runs
from ..helpers.harness import run_ranks
from ..helpers.models import OddModel, tiny_opt

pytestmark = pytest.mark.ranks

STEPS = 9
ADAPTIVE = {"rule": "ZOAdaptive", "momentum": "int8", "schedule": "amsgrad", "momentum_on": "gradient"}
MODES = {
    f"{momentum}-{dtype}": {"momentum": momentum, "dtype": dtype}
    for momentum in ("fp32", "bf16", "int8", "replay")
    for dtype in ("fp32", "bf16")
} | {
    "mezo-bf16": {"rule": "MeZO", "dtype": "bf16"},
    "mezo-fp32-3": {"rule": "MeZO", "dtype": "fp32", "num_perturbations": 3},
    "int8-bf16-2": {"momentum": "int8", "dtype": "bf16", "num_perturbations": 2},
    "replay-fp32-2": {"momentum": "replay", "dtype": "fp32", "num_perturbations": 2},
    "no-momentum": {"momentum": "int8", "dtype": "fp32", "constant_beta1": 1.0},
    "adamu-gradient": {"rule": "ZOAdaMUGradient", "momentum": "bf16", "dtype": "bf16"},
    "adam-gradient-2": ADAPTIVE | {"momentum": "bf16", "dtype": "bf16", "schedule": "adam", "num_perturbations": 2},
    "amsgrad-2": ADAPTIVE | {"dtype": "bf16", "momentum_on": "perturbation", "num_perturbations": 2},
}


def train_odd(rank, world_size, folder):
    """A run in each mode, with weight decay, a skipped step, a frozen parameter, tied and 0-d ones; {mode: digest}."""
    return {
        name: runs.run(
            rank,
            world_size,
            f"{folder}/{name}",
            STEPS,
            bad_steps=(4,),
            scheduler=True,
            base=f"{folder}/base-{mode['dtype']}",
            **mode,
        )["weights"]
        for name, mode in MODES.items()
    }


@pytest.fixture(scope="module")
def odd_runs(tmp_path_factory):
    """(folder, digests by mode). Only base and journal are left of the runs."""
    folder = tmp_path_factory.mktemp("odd")
    for dtype in ("fp32", "bf16"):
        (folder / f"base-{dtype}").mkdir()
        tensors = {name: p.detach().clone() for name, p in OddModel(runs.DTYPES[dtype]).named_parameters()}
        save_file(tensors, folder / f"base-{dtype}" / "model.safetensors")
    digests = run_ranks(2, train_odd, str(folder))[0]
    assert len(set(digests.values())) == len(MODES)
    return folder, digests


def replay_all(rank, world_size, folder, names, output):
    from ds_zoadamu.durability import stepping
    from ds_zoadamu.durability.replay import replay

    stepping.CHUNK_ON_CPU = 13  # tiny tensors, yet several chunks each
    digests = {}
    for name in names:
        base = f"{folder}/base-{MODES[name]['dtype']}"
        digests[name] = replay(base, f"{folder}/{name}/journal.jsonl", f"{output}/{name}", show_progress=False).sha256
    return digests


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_mode_on_any_number_of_ranks(odd_runs, tmp_path, world_size, monkeypatch):
    folder, digests = odd_runs
    for result in run_ranks(world_size, replay_all, str(folder), list(MODES), str(tmp_path)):
        assert result == digests
    for name, mode in MODES.items():
        base, tuned = (
            load_file(folder / f"base-{mode['dtype']}" / "model.safetensors"),
            load_file(tmp_path / name / "model.safetensors"),
        )
        assert base.keys() == tuned.keys()
        assert torch.equal(base["frozen.weight"], tuned["frozen.weight"])
        assert not torch.equal(base["embed.weight"], tuned["embed.weight"])


def replay_odd(folder, output, name="int8-fp32", journal=None, base=None, **options):
    from ds_zoadamu.durability.replay import replay

    base = base or folder / f"base-{MODES[name]['dtype']}"
    return replay(base, journal or folder / name / "journal.jsonl", output, show_progress=False, **options)


def test_until_and_expect(odd_runs, tmp_path):
    folder, digests = odd_runs
    assert replay_odd(folder, tmp_path / "all", expect=digests["int8-fp32"].upper()).steps == STEPS
    before = replay_odd(folder, tmp_path / "three", until=3).sha256
    assert replay_odd(folder, tmp_path / "four", until=4).sha256 == before  # step 4 was skipped
    assert replay_odd(folder, tmp_path / "five", until=5).sha256 != before
    assert torch.equal(load_file(tmp_path / "three" / "model.safetensors")["frozen.weight"], OddModel().frozen.weight)
    zero = replay_odd(folder, tmp_path / "zero", until=0)
    assert load_file(zero.output / "model.safetensors").keys() == load_file(folder / "base-fp32" / "model.safetensors").keys()
    for options, message in (
        ({"until": STEPS + 1}, f"--until is {STEPS + 1}, but journal .* ends at step {STEPS}"),
        ({"until": -1}, "--until is -1; it must be a step >= 0"),
        ({"expect": "0" * 64}, "the rebuilt weights have SHA-256 .* expected was 0000"),
    ):
        with pytest.raises(ReplayError, match=message):
            replay_odd(folder, tmp_path / "never", **options)
    assert sorted(os.listdir(tmp_path)) == ["all", "five", "four", "three", "zero"]


def rewritten(source: Path, target: Path, step: int, change) -> Path:
    """A journal with a right chain of checksums whose record of ``step`` was changed."""
    contents = read_journal(source)
    header = {k: v for k, v in contents.header.items() if k not in ("format", "version", "fields")}
    journal = Journal.create(target, header)
    for record in contents.records:
        journal.append(change(record) if record.step == step else record)
    journal.close()
    return target


def with_next_gradient(record):
    """The projected gradient with its last bit changed."""
    import dataclasses

    lowest = 2.0 ** (math.frexp(*record.projected_grads)[1] - GRAD_BITS)
    mantissa = int(record.projected_grads[0] / lowest)
    return dataclasses.replace(record, projected_grads=((mantissa ^ 1) * lowest,))


def test_the_last_bit_of_one_gradient_changes_the_hash(opt_run, tmp_path):
    from ds_zoadamu.durability.replay import replay

    base, journal, digest = opt_run["base"], opt_run["journal"], opt_run["digest"]
    same = rewritten(journal, tmp_path / "same.jsonl", 2, lambda record: record)
    assert replay(base, same, tmp_path / "same", show_progress=False).sha256 == digest
    changed = rewritten(journal, tmp_path / "changed.jsonl", 2, with_next_gradient)
    assert replay(base, changed, tmp_path / "changed", show_progress=False).sha256 != digest


# --- a Transformers model in several files ------------------------------------------------------------------------------------


def train_opt(rank, world_size, folder):
    """fp32 from sharded fp16 files, one parameter frozen; saves the model and returns its digest."""
    from ds_zoadamu.hf.models import save_pretrained

    engine, batches = runs.make_engine(world_size, model=f"{folder}/base", frozen="layers.0.fc1.weight")
    engine.open_journal(f"{folder}/journal.jsonl")
    runs.train(engine, batches, 7)
    save_pretrained(engine, f"{folder}/own")
    return runs.state(engine)["weights"]


@pytest.fixture(scope="module")
def opt_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    model = tiny_opt(torch.float16)
    model.save_pretrained(folder / "base", max_shard_size="12KB")
    (folder / "base" / "tokenizer.json").write_text("{}")
    assert (folder / "base" / "model.safetensors.index.json").exists()
    digest = run_ranks(2, train_opt, str(folder))[0]
    return {"base": folder / "base", "journal": folder / "journal.jsonl", "own": folder / "own", "digest": digest}


def test_a_transformers_model_is_rebuilt(opt_run, tmp_path):
    from transformers import AutoModelForCausalLM

    from ds_zoadamu.durability.replay import folder_digest, replay

    result = replay(opt_run["base"], opt_run["journal"], tmp_path / "model", expect=opt_run["digest"], show_progress=False)
    assert (
        folder_digest(result.output, opt_run["journal"])
        == folder_digest(opt_run["own"], opt_run["journal"])
        == opt_run["digest"]
    )
    mine, own = (AutoModelForCausalLM.from_pretrained(path) for path in (result.output, opt_run["own"]))
    assert mine.dtype == own.dtype == torch.float32
    for (name, a), (_, b) in zip(mine.state_dict().items(), own.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert mine.lm_head.weight is mine.model.decoder.embed_tokens.weight
    assert (result.output / "tokenizer.json").exists()
    assert len(list(result.output.glob("*.safetensors"))) == len(list(opt_run["base"].glob("*.safetensors")))


def test_names_without_the_models_prefix_and_copies_of_tied_weights(opt_run, tmp_path):
    """As some checkpoints on the hub have them. The journal then knows the base by its weights alone."""
    from ds_zoadamu.durability.replay import replay

    tensors = {}
    for file in opt_run["base"].glob("*.safetensors"):
        tensors |= load_file(file)
    (tmp_path / "base").mkdir()
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    plain["lm_head.weight"] = plain["decoder.embed_tokens.weight"].clone()
    save_file(plain, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ReplayError, match="is not the base of this journal: SHA-256 differs for"):
        replay(tmp_path / "base", opt_run["journal"], tmp_path / "never", show_progress=False)
    contents = read_journal(opt_run["journal"])
    header = contents.header | {
        "base": {"name": None, "revision": None, "sha256": None, "files": None, "note": "not from files"}
    }
    journal = Journal.create(
        tmp_path / "journal.jsonl", {k: v for k, v in header.items() if k not in ("format", "version", "fields")}
    )
    for record in contents.records:
        journal.append(record)
    journal.close()
    result = replay(tmp_path / "base", journal.path, tmp_path / "model", expect=opt_run["digest"], show_progress=False)
    assert "lm_head.weight" not in load_file(result.output / "model.safetensors")


# --- LoRA ---------------------------------------------------------------------------------------------------------------------


def train_lora(rank, world_size, folder):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_opt(torch.bfloat16), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    if rank == 0:
        model.save_pretrained(f"{folder}/adapters")
    torch.distributed.barrier()
    engine, batches = runs.engine_of(model, world_size, dtype="bf16", vocab=67)
    engine.open_journal(f"{folder}/journal.jsonl", base=f"{folder}/adapters")
    runs.train(engine, batches, 5)
    return runs.state(engine)["weights"], len(engine.optimizer.partitions)


def frozen_as_one_would(model) -> str:
    """SHA-256 over the frozen parameters, worked out from the format in the docs."""
    lines = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            sha = hashlib.sha256(param.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            lines.append(f"{name} bfloat16 {'x'.join(map(str, param.shape))} {sha}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_lora_adapters(tmp_path, capsys):
    import peft

    from ds_zoadamu.durability.replay import replay

    digest, count = run_ranks(2, train_lora, str(tmp_path))[0]
    assert count == 8
    frozen = frozen_as_one_would(
        peft.get_peft_model(
            tiny_opt(torch.bfloat16), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        )
    )
    assert read_journal(tmp_path / "journal.jsonl").header["frozen_sha256"] == frozen
    result = replay(tmp_path / "adapters", tmp_path / "journal.jsonl", tmp_path / "tuned", expect=digest, show_progress=False)
    assert f"frozen parameters of the run are not in {str(tmp_path / 'adapters')!r}" in (said := capsys.readouterr().out)
    assert frozen in said
    before, after = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "adapters", result.output))
    assert before.keys() == after.keys() and all(t.dtype == torch.bfloat16 for t in after.values())
    model = peft.PeftModel.from_pretrained(tiny_opt(torch.bfloat16), result.output)
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora" in name}
    assert all(torch.equal(loaded[name].to(torch.bfloat16), tensor) for name, tensor in after.items())


# --- what a replay refuses ----------------------------------------------------------------------------------------------------


def test_refusals(odd_runs, tmp_path):
    folder, _ = odd_runs
    journal = folder / "int8-fp32" / "journal.jsonl"
    base = folder / "base-fp32"

    def copy_of_base(name, change=None):
        shutil.copytree(base, tmp_path / name)
        tensors = load_file(base / "model.safetensors")
        if change:
            change(tensors)
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    def lines(change):
        path = tmp_path / "changed.jsonl"
        path.write_bytes(b"".join(change(journal.read_bytes().splitlines(keepends=True))))
        return path

    of_unknown_base = tmp_path / "unknown.jsonl"
    header = read_journal(journal).header
    header = {k: v for k, v in header.items() if k not in ("format", "version", "fields")}
    unknown = {"name": None, "revision": None, "sha256": None, "files": None, "note": "?"}
    Journal.create(of_unknown_base, header | {"base": unknown}).close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shortened = copy_of_base("shortened")
    (shortened / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-4])
    output = tmp_path / "output"
    cases = [
        (
            ReplayError,
            "is not the base of this journal",
            {"base": copy_of_base("frozen", lambda t: t["frozen.weight"].add_(1))},
        ),
        (
            ReplayError,
            "'frozen.weight' in .* is not what the run kept frozen",
            {"base": tmp_path / "frozen", "journal": of_unknown_base},
        ),
        (ReplayError, "has shape \\[3\\] in", {"base": copy_of_base("shape", lambda t: t.update(pair=torch.zeros(3)))}),
        (ReplayError, "has no tensor 'pair'", {"base": copy_of_base("missing", lambda t: t.pop("pair"))}),
        (ReplayError, "is not a whole safetensors file", {"base": shortened}),
        (ReplayError, "no safetensors weights.*pickle files are not read", {"base": tmp_path / "pickle"}),
        (ReplayError, "is neither a folder nor a model", {"base": tmp_path / "nowhere"}),
        (JournalError, "line 3: it is of step 3, step 2 is due", {"journal": lines(lambda rows: rows[:2] + rows[3:])}),
        (JournalError, "No such file", {"journal": tmp_path / "none.jsonl"}),
    ]
    for error, message, arguments in cases:
        if arguments.get("journal") == tmp_path / "changed.jsonl":
            lines(lambda rows: rows[:2] + rows[3:])
        with pytest.raises(error, match=message):
            replay_odd(folder, output, **arguments)
        assert not output.exists() and not (tmp_path / ".output.replaying").exists()
    with pytest.raises(ReplayError, match="exists and is not empty"):
        replay_odd(folder, tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "mine"


def test_one_replay_at_a_time_writes_a_folder_and_a_link_to_an_empty_one_stays(odd_runs, tmp_path):
    folder, digests = odd_runs
    place, output = tmp_path / "disk" / "model", tmp_path / "link"
    place.mkdir(parents=True)
    output.symlink_to(place)
    busy = place.with_name(".model.replaying")
    busy.mkdir()
    (busy / "model.safetensors").write_text("half")
    other = LockedFile(busy / ".lock")
    with pytest.raises(ReplayError, match="model.replaying' is being written by another replay; wait for it, or name another"):
        replay_odd(folder, output)
    assert (busy / "model.safetensors").read_text() == "half"
    other.release()  # it was killed
    assert replay_odd(folder, output).sha256 == digests["int8-fp32"]
    assert output.is_symlink() and os.listdir(place) == ["model.safetensors"] and os.listdir(place.parent) == ["model"]


def test_weights_that_differ_are_found_without_file_hashes(odd_runs, tmp_path):
    """Where the journal does not know its base's files, the weights themselves are compared."""
    folder, _ = odd_runs
    contents = read_journal(folder / "int8-fp32" / "journal.jsonl")
    header = {k: v for k, v in contents.header.items() if k not in ("format", "version", "fields")}
    header["base"] = {"name": None, "revision": None, "sha256": None, "files": None, "note": "not from files"}
    Journal.create(tmp_path / "journal.jsonl", header).close()
    tensors = load_file(folder / "base-fp32" / "model.safetensors")
    tensors["embed.weight"][0, 0] += 1e-6
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ReplayError, match="'embed.weight' in .* is not what the run started with"):
        replay_odd(folder, tmp_path / "output", journal=tmp_path / "journal.jsonl", base=tmp_path / "base")


# --- the console command ------------------------------------------------------------------------------------------------------


def test_the_journal_command(odd_runs, tmp_path, capsys):
    folder, _ = odd_runs
    journal = folder / "int8-fp32" / "journal.jsonl"
    assert cli.main(["journal", str(journal), "--plot", str(tmp_path / "plot.png")]) == 0
    out = capsys.readouterr().out
    for part in (
        "steps      9 of 12, 1 skipped",
        "optimizer  ZOAdaMU, noise version 1",
        "seed 5",
        "dtype int8",
        "damage     none",
        "bytes",
        "SHA-256",
    ):
        assert part in out, out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    torn, damaged = tmp_path / "torn.jsonl", tmp_path / "damaged.jsonl"
    torn.write_bytes(journal.read_bytes()[:-9])
    damaged.write_bytes(journal.read_bytes().replace(b",0,[0,8]", b",0,[0,9]", 1))
    assert cli.main(["journal", str(torn)]) == 0
    assert "steps      8 of 12" in (out := capsys.readouterr().out) and "torn last line" in out
    assert cli.main(["journal", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert "steps      1 of 12" in captured.out and "line 3: its checksum does not fit" in captured.err
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        assert cli.main(["journal", str(path)]) == 2
        assert message in (err := capsys.readouterr().err) and "Traceback" not in err and err.count("\n") == 1


def test_the_replay_and_digest_commands(odd_runs, tmp_path, capsys):
    folder, digests = odd_runs
    journal, output = str(folder / "bf16-bf16" / "journal.jsonl"), str(tmp_path / "out")
    arguments = ["replay", "--base", str(folder / "base-bf16"), "--journal", journal, "--output", output]
    assert cli.main([*arguments, "--expect", "1" * 64]) == 2
    assert "expected was 1111" in (err := capsys.readouterr().err) and "Traceback" not in err
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert f"SHA-256 of the trained weights: {digests['bf16-bf16']}" in captured.out
    assert cli.main(["digest", output, "--journal", journal]) == 0
    assert capsys.readouterr().out.strip() == digests["bf16-bf16"]
    assert cli.main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_replay_command_on_two_ranks(odd_runs, tmp_path):
    folder, digests = odd_runs
    name = "replay-bf16"
    words = ["-m", "ds_zoadamu.cli", "replay", "--base", folder / "base-bf16", "--expect", digests[name]]
    words += ["--journal", folder / name / "journal.jsonl", "--output", tmp_path / "out"]
    ranks = commands.launched(tmp_path / "output", 2, *words)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    printed = "".join(rank.stdout for rank in ranks)
    assert printed.count(f"SHA-256 of the trained weights: {digests[name]}") == 1


def test_the_header_is_published_without_local_paths(opt_run):
    header = read_journal(opt_run["journal"]).header
    assert header["base"]["name"] == "base" and len(header["base"]["sha256"]) == 64
    assert str(opt_run["base"].parent) not in json.dumps(header)
