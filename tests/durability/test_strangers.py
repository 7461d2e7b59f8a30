"""Files from strangers, with checksums that are right: what does not fit is refused in one line, nothing is written, and no
code is read or copied."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

from ds_zoadamu import cli
from ds_zoadamu.durability import checkpoint_store as store
from ds_zoadamu.durability.base_model import check_whole, find_folder, weight_files
from ds_zoadamu.durability.checkpoint import _check_scheduler_state
from ds_zoadamu.durability.journal import Journal, Record, header_line, read_journal, record_line
from ds_zoadamu.durability.replay import replay
from ds_zoadamu.errors import CheckpointError, ConfigError, JournalError, ReplayError, shown
from ds_zoadamu.files.companions import COMPANIONS
from ds_zoadamu.files.untrusted import MAX_DEPTH, parse_json, read_file
from ds_zoadamu.tasks import InputError, load_task
from ds_zoadamu.training.main import run_script
from tests.fuzz import READERS, checkpoint_reader, fuzz, journal_reader


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_one_line(tmp_path, name):
    """More of them: python -m tests.fuzz --cases 10000."""
    outcomes = fuzz(name, 1500, seed=1, folder=tmp_path)
    assert outcomes.total() == 1500 and 30 < outcomes["taken"] < 500, outcomes


# --- journals -----------------------------------------------------------------------------------------------------------------


def rewritten(path: Path, header=None, line=None) -> Path:
    """The journal with another header, or with another last record, and a right chain of checksums."""
    contents = read_journal(path)
    data, checksum = header_line(contents.header | (header or {}))
    for record in contents.records:
        body, checksum = record_line(record, checksum)
        data += body
    if line is not None:
        previous = re.findall(rb'"([0-9a-f]{16})"', data)[-2]
        body = data.splitlines()[-1].rpartition(b',"')[0] if line is True else line
        data = b"".join(data.splitlines(keepends=True)[:-1])
        data += body + b',"' + hashlib.sha256(previous + body).hexdigest()[:16].encode() + b'"]\n'
    path.write_bytes(data)
    return path


def parameter(**changes) -> dict:
    return {"name": "a", "shape": [1], "dtype": "float32", "group": 0, "sha256": "0" * 64} | changes


def base(**changes) -> dict:
    return {"name": "x", "revision": None, "sha256": None, "files": None} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"parameters": [parameter(shape=[-1])]}, r"shape\[0\] is -1: "),
        ({"parameters": [parameter(shape=[2**62, 4])]}, "more elements than a tensor can"),
        ({"parameters": [parameter(group=2)]}, "in group 2, there are 2 groups"),
        ({"parameters": [parameter(dtype="object")]}, "'object' is not the name of a dtype"),
        ({"parameters": [{"name": "a", "shape": [1], "dtype": "float32", "group": 0}]}, r"parameters\[0\].sha256 is missing"),
        ({"parameters": [parameter(), parameter()]}, "'a' comes twice"),
        ({"groups": [{"weight_decay": float("nan")}]}, "the number NaN is not finite"),
        ({"options": [1]}, r"options is \[1\]"),
        ({"base": None}, "base is None"),
        ({"base": base(revision="../../refs/main")}, "base.revision is '../../refs/main'"),
        ({"base": base(sha256="0" * 64, files={"../x": "0" * 64})}, "'../x' is not the plain name of a file"),
        ({"base": base(sha256="0" * 64, files={"evil.py": "0" * 64})}, "'evil.py' is no file of weights"),
        ({"base": base(sha256="0" * 64, files={"pytorch_model.bin": "0" * 64})}, "'pytorch_model.bin' is no file of weights"),
        ({"base": base(sha256="0" * 64)}, "one of sha256 and files is null"),
        ({"base": base(companions={"evil.py": "0" * 64})}, "'evil.py' is not among the files that are copied"),
    ],
)
def test_headers(tmp_path, header, message):
    journal_reader(tmp_path)
    path = rewritten(tmp_path / "journal.jsonl", header)
    with pytest.raises(JournalError, match=f"journal.jsonl', line 1: not the header of a run: .*{message}"):
        read_journal(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[6,2.0,2.1,[0.5,0.25],NaN,0,null", "line 7: the number NaN is not finite"),
        (b'[6,2.0,2.1,[0.5,0.25],"nan",0,null', "line 7: lr is nan; it must be finite"),
        (b"[6,2.0,2.1,0.5,0.001,0,null", "line 7: it has 1 projected gradients, num_perturbations is 2"),
        (b"[6,2.0,2.1,[[0.5],0.5],0.001,0,null", "line 7: projected_grad is .*not a number as a journal writes it"),
        (b"[6,2.0,2.1,[0.5,0.25],[0.1,0.1,0.1],0,null", "line 7: it has 3 learning rates for 2 parameter groups"),
        (b'[6,2.0,2.1,[0.5,"inf"],0.1,0,null', "line 7: projected_grad is .* in a step that is not skipped"),
        (b"[6,2.0,2.1,[0.5,1e38],1e300,0,null", "line 7: lr is 1e[+]300: times .* more than fp32 holds"),
        (b"[6,2.0,2.1,[0.5,0.25],0.1,0,[9223372036854775808,0]", r"line 7: data_position is \[9223372036854775808, 0\]"),
        (b"[6,2.0,2.1,[0.5,0.25],0.1,true,null", "line 7: skipped is True"),
        (b"[6.0,2.0,2.1,[0.5,0.25],0.1,0,null", "line 7: it is of step 6.0, step 6 is due"),
        (b"[6," + b"[" * 100_000 + b"]" * 100_000, "line 7: lists or objects more than 100 deep"),
        (b"[6,2.0,2.1,[0.5,0.25],0.1,0," + b"9" * 5000, "line 7: Exceeds the limit"),
    ],
)  # fmt: skip
def test_records(tmp_path, line, message):
    journal_reader(tmp_path)
    with pytest.raises(JournalError, match=message):
        read_journal(rewritten(tmp_path / "journal.jsonl", line=line))


def test_no_record_is_written_that_could_not_be_read(tmp_path):
    journal_reader(tmp_path)
    journal, contents = Journal.open(tmp_path / "journal.jsonl")
    with pytest.raises(JournalError, match="step 7 has the lr nan, which is not finite; the step was not taken"):
        journal.append(Record(7, 1.0, 1.0, (0.5, 0.5), (float("nan"),), False))
    journal.close()
    assert read_journal(tmp_path / "journal.jsonl") == contents
    with pytest.raises(JournalError, match=r"groups\[0\].weight_decay is 'x'"):
        Journal.create(tmp_path / "new.jsonl", contents.header | {"groups": [{"weight_decay": "x"}]})
    assert not (tmp_path / "new.jsonl").exists()


def test_options_go_through_the_rules_own_parser(tmp_path):
    journal_reader(tmp_path)
    options = read_journal(tmp_path / "journal.jsonl").header["options"]
    no_perturbation = {"floor": 0.0, "constant_beta1": 1.0, "t1": 0, "t2": 1, "t3": 1, "momentum": {"dtype": "int8"}}
    for change, message in (
        ({"zo_eps": 5.0}, "options of its header: zo_eps is 5.0; it must be finite and >= 1e-08 and <= 1"),
        ({"params": 1}, "options of its header: unknown 'params'"),
        ({"sigma": 10**400}, "options of its header: sigma is 1000.* it must be finite"),
        (no_perturbation, "options of its header: alpha falls to 0 at step t2 = 1 and constant_beta1 is 1"),
    ):
        rewritten(tmp_path / "journal.jsonl", {"options": options | change})
        with pytest.raises(ReplayError, match=f"journal.jsonl' is of no run that ZOAdaMU can make: {message}"):
            replay(tmp_path / "base", tmp_path / "journal.jsonl", tmp_path / "model", show_progress=False)
    rewritten(tmp_path / "journal.jsonl", {"optimizer": "os.system", "rule_from": "evil; rm x"})
    with pytest.raises(ReplayError, match="is of the rule 'os.system'; .* --import 'evil; rm x' replay"):
        replay(tmp_path / "base", tmp_path / "journal.jsonl", tmp_path / "model", show_progress=False)
    assert sorted(os.listdir(tmp_path)) == ["base", "journal.jsonl"]


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["files", 1, "ranges", "a"], [0, 6], "the ranges of 'a' are not its 13 elements, each once"),
        (["files", 1, "ranges", "a"], [8, 13], "the ranges of 'a' are not its 13 elements, each once"),
        (["files", 0, "file"], "../rank.safetensors", "plain name of a file"),
        (["files", 0, "file"], "a\0b", "plain name of a file"),
        (["files", 0, "size"], -1, r"files\[0\].size is -1"),
        (["files", 0, "file"], "rank-00001-of-00002.safetensors", "2 files, or fewer of different names, of 2 ranks"),
        (["counters", "train_batch"], 3, "counters.train_batch is 3: extra inputs are not permitted"),
        (["step"], 2**63, "step is 9223372036854775808"),
        (["identity", "parameters", 0, "shape"], [2**40, 2**40], "more elements than a tensor can"),
        (["lrs"], [float("nan")], r"lrs\[0\] is nan"),
        (["lrs"], [], "0 lrs for 1 parameter groups"),
        (["data_position"], [1], r"data_position is \[1\]"),
        (["identity"], None, "identity is None"),
    ],
)
def test_manifests(tmp_path, keys, value, message):
    checkpoint_reader(tmp_path)
    folder = tmp_path / "global_step4"
    manifest = store.read_manifest(folder)
    place = manifest
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / store.MANIFEST).write_bytes(store.encode_manifest(manifest))
    with pytest.raises(CheckpointError, match=f"global_step4': manifest.json is not that of a checkpoint: .*{message}"):
        store.find(tmp_path, "global_step4")
    assert store.find_all(tmp_path) == []


def test_a_state_of_a_scheduler_that_lacks_a_number():
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 5)
    state = scheduler.state_dict()
    del state["gamma"], state["_last_lr"]
    with pytest.raises(ValueError, match="'gamma' is missing"):
        _check_scheduler_state(scheduler, state, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "'step' is none of its numbers"),
        ({"base_lrs": [0.1, 0.1]}, "base_lrs is .* for 1 parameter groups"),
        ({"_last_lr": ["x"]}, "'_last_lr' holds 'x' in the place of 0.1"),
        ({"last_epoch": {}}, "'last_epoch' holds {} in the place of 0"),
        ({"optimizer": 5}, "'optimizer' is none of its numbers"),
        ({"last_epoch": 7, "of_another_release": True, "verbose": False}, None),
    ],
)
def test_states_of_schedulers(change, message):
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 5)
    state = scheduler.state_dict() | change
    if message is None:
        return _check_scheduler_state(scheduler, state, 1)
    with pytest.raises(ValueError, match=message):
        _check_scheduler_state(scheduler, state, 1)


# --- a base, and what is copied from it ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """(base, journal) of a run whose base also holds code, pickles, and configurations that name code."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"auto_map": "a token"}')
    for name in ("modeling.py", "kernel.so", "pytorch_model.bin", "weights.pt", "training_args.pkl", "notes.md", ".hidden"):
        (folder / name).write_text("print('mine')")
    (folder / "sub").mkdir()
    folder.rename(tmp_path / "extra")
    journal_reader(tmp_path)
    for path in (tmp_path / "extra").iterdir():
        path.rename(folder / path.name)
    (tmp_path / "extra").rmdir()
    return folder, tmp_path / "journal.jsonl"


def companions_of(base: Path) -> dict[str, str]:
    return {name: hashlib.sha256((base / name).read_bytes()).hexdigest() for name in COMPANIONS if (base / name).exists()}


def with_companions(journal: Path, companions: dict[str, str] | None) -> None:
    base = {key: value for key, value in read_journal(journal).header["base"].items() if key != "companions"}
    rewritten(journal, {"base": base | ({} if companions is None else {"companions": companions})})


def test_code_is_never_copied_nor_named(run, tmp_path, capsys):
    base, journal = run
    config = {"model_type": "opt", "auto_map": {"AutoModel": "modeling.Evil"}, "text_config": {"attn_implementation": "x/y"}}
    (base / "config.json").write_text(json.dumps(config))
    weights = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    for companions in (companions_of(base), None):
        with_companions(journal, companions)
        output = replay(base, journal, tmp_path / f"model-{companions is None}", show_progress=False).output
        assert set(os.listdir(output)) == {*weights, "config.json", "tokenizer.json"}
        assert json.loads((output / "config.json").read_text()) == {"model_type": "opt", "text_config": {}}
        assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        out = capsys.readouterr().out
        assert "config.json is written without attn_implementation, auto_map" in out
        assert ("the journal has no SHA-256 of these files" in out) == (companions is None)


def test_only_what_the_header_names_is_copied_and_only_as_it_was(run, tmp_path):
    base, journal = run
    with_companions(journal, {"config.json": companions_of(base)["config.json"]})
    output = replay(base, journal, tmp_path / "model", show_progress=False).output
    assert "config.json" in os.listdir(output) and "tokenizer.json" not in os.listdir(output)
    (base / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ReplayError, match="config.json' is not what the journal's run began with"):
        replay(base, journal, tmp_path / "never", show_progress=False)
    (base / "config.json").unlink()
    with pytest.raises(ReplayError, match="lacks 'config.json'"):
        replay(base, journal, tmp_path / "never", show_progress=False)
    (base / "config.json").write_text("[" * 100_000)
    with_companions(journal, None)
    with pytest.raises(ReplayError, match="config.json' is not a configuration, one JSON object: lists or objects more than"):
        replay(base, journal, tmp_path / "never", show_progress=False)
    assert sorted(os.listdir(tmp_path)) == ["base", "journal.jsonl", "model"]


def test_links_out_of_the_base(run, tmp_path):
    base, journal = run
    secret = tmp_path / "secret"
    secret.write_text('{"key": "mine"}')
    (base / "config.json").unlink()
    (base / "config.json").symlink_to(secret)
    with_companions(journal, None)
    with pytest.raises(ReplayError, match="config.json' is a link out of its folder, and the journal has no SHA-256 of it"):
        replay(base, journal, tmp_path / "never", show_progress=False)
    with_companions(journal, {})
    (base / "model-00001-of-00002.safetensors").rename(tmp_path / "weights")
    (base / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "weights")
    assert replay(base, journal, tmp_path / "known", show_progress=False).steps == 6  # the header has its SHA-256
    unknown = {"name": None, "revision": None, "sha256": None, "files": None, "note": "not from files", "companions": {}}
    rewritten(journal, {"base": unknown})
    with pytest.raises(ReplayError, match="model-00001-of-00002.safetensors' is a link out of its folder"):
        replay(base, journal, tmp_path / "never", show_progress=False)


def test_the_hubs_cache_is_made_of_links(run, tmp_path):
    base, journal = run
    snapshot, blobs = tmp_path / "cache" / "snapshots" / ("0" * 40), tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in base.iterdir():
        if path.is_file():
            path.rename(blobs / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    with_companions(journal, None)
    output = replay(snapshot, journal, tmp_path / "model", show_progress=False).output
    assert (output / "config.json").is_file() and not (output / "config.json").is_symlink()


def test_the_hub_is_asked_for_files_by_name(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **given: asked.append(given) or str(tmp_path))
    find_folder("someone/model", "0" * 40, download=True, files={"model.safetensors": "1" * 64, "[a].safetensors": "2" * 64})
    find_folder("someone/model", download=True)
    assert asked[0]["allow_patterns"] == ["model.safetensors", "[[]a].safetensors", *COMPANIONS]
    patterns = [pattern for given in asked for pattern in given["allow_patterns"]]
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt", ".so", "*", "*.json"))]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is not the plain name of a file"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "it names 'pytorch_model.bin'"),
        ({"weight_map": {"a": ["x"]}}, "is not the plain name of a file"),
        ({"weight_map": {}}, "it has no weight_map"),
        ([], "it has no weight_map"),
    ],
)
def test_an_index_names_weights_of_its_folder(tmp_path, index, message):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ReplayError, match=f"index.json' is not an index of safetensors files: .*{re.escape(message)}"):
        weight_files(tmp_path)


def test_a_model_whose_file_was_cut_short_is_named(run):
    base, _ = run
    check_whole(base)
    path = base / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="model-00002-of-00002.safetensors' is not a whole safetensors file: "):
        check_whole(base)
    check_whole("not/on/this/machine")


# --- commands -----------------------------------------------------------------------------------------------------------------


def one_line(capsys, *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "", captured
    for part in parts:
        assert part in captured.err


def test_commands_end_with_one_line_and_status_2(run, tmp_path, capsys):
    base, journal = run
    output = tmp_path / "model"
    words = ["replay", "--base", str(base), "--journal", str(journal), "--output", str(output), "--device", "cpu"]
    assert cli.main([*words, "--expect", "abc"]) == 2
    one_line(capsys, "--expect is 'abc'; a SHA-256 has 64 hexadecimal digits")
    assert cli.main([*words[:-1], "quantum"]) == 2
    one_line(capsys, "--device is 'quantum'")
    weights = base / "model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    for command in (words, ["digest", str(base), "--journal", str(journal)]):
        assert cli.main(command) == 2
        one_line(capsys, "model-00001-of-00002.safetensors", "it was cut short")
    header = read_journal(journal).header
    rewritten(journal, {"parameters": header["parameters"] * 2})
    for command in (words, ["journal", str(journal)], ["digest", str(base), "--journal", str(journal)]):
        assert cli.main(command) == 2
        one_line(capsys, "journal.jsonl', line 1: not the header of a run", "comes twice")
    for place in ("/dev/zero", str(base)):
        assert cli.main(["journal", place]) == 2
        one_line(capsys, place)
    assert not output.exists()


def test_a_launch_script_ends_with_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")  # as under a launcher: run_script sets up nothing
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "task.json").write_text('{"template": ' + "[" * 100_000)
    checkpoint_reader(tmp_path)
    (tmp_path / "global_step4" / store.MANIFEST).write_bytes(store.encode_manifest({"step": "x"}))
    for body, part in (
        (lambda: load_task(str(tmp_path / "task.json")), f"task.json: not JSON: lists or objects more than {MAX_DEPTH} deep"),
        (lambda: store.find(tmp_path, "global_step4"), "global_step4': manifest.json is not that of a checkpoint"),
        (lambda: weight_files(tmp_path), "has no safetensors weights"),
    ):
        assert run_script(body) == 2
        one_line(capsys, part)


# --- the parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' comes twice"),
        ("[1e999]", "the number 1e999 is not finite"),
        ("[-Infinity]", "the number -Infinity is not finite"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        ("[" * 10**6, f"more than {MAX_DEPTH} deep"),
        (b"\xff", "not UTF-8"),
        (b"[\x001\x00]", "Expecting value"),
    ],
)
def test_json(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_json(text)


def test_json_that_is_taken():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deepest + " " * 10)) == deepest
    assert parse_json("[" + "[], " * 1000 + "{}]") == [[]] * 1000 + [{}]
    assert parse_json('{"a": NaN, "a": Infinity}', nonfinite=True, repeated_keys=True) == {"a": float("inf")}


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # whose writer never comes
    (tmp_path / "large").write_bytes(bytes(11))
    refusals = {"pipe": "is not a regular file", "large": "has 11 bytes; such a file has at most 10", "a\0": "no file has such"}
    for name, reason in refusals.items():
        with pytest.raises(OSError) as refused:
            read_file(tmp_path / name, 10)
        assert reason in refused.value.strerror
    assert read_file(tmp_path / "large", 11) == bytes(11)


def test_values_are_shown_on_one_short_line():
    deep = [["x" * 1000 + "\n"] * 1000] * 1000
    for value in ("a\nb\x1b", "x" * 10**6, deep, 10**10_000, {"k" * 1000: deep}, "\udfff"):
        assert len(shown(value)) <= 200 and shown(value).isprintable()


def test_a_task_that_is_none(tmp_path):
    for change, message in (
        ({"template": "{a:99999999999}"}, "formats the column 'a'"),
        ({"template": "{a:{b}}"}, "formats the column 'a'"),
        ({"train_file": "../../secret.csv"}, "train_file is '../../secret.csv'; it must name a file inside"),
        ({"validation_file": "/etc/passwd"}, "validation_file is '/etc/passwd'"),
        ({"label_words": ["x", "\ud800"]}, "label_words"),
        ({"label_words": {"0": ["x"], "1": "y"}}, "label_words"),
    ):
        path = tmp_path / "topic.json"
        path.write_text(json.dumps({"template": "{a} It was", "label_words": ["x", "y"]} | change))
        with pytest.raises(InputError, match=f"topic.json: task 'topic': .*{re.escape(message)}"):
            load_task(str(path))
