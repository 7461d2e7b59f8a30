"""LoRA and prefix tuning as whole runs: on one and two ranks, killed and resumed, replayed, and read by PEFT itself."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ds_zoadamu.durability.journal import read_journal
from ds_zoadamu.errors import ConfigError
from ds_zoadamu.tasks import TASKS, InputError
from tests.helpers.crashes import run_to_crash
from tests.helpers.harness import run_ranks
from tests.helpers.hub_rows import save_task_model, texts, write_task
from tests.helpers.tokenizers_of_tests import llama_like

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
MODELS, WAYS = ("opt", "llama"), {"lora": ("--lora", "--merge"), "prefix": ("--prefix",)}
RUNS = [(model, way, "zoadamu") for model in MODELS for way in WAYS]
RUNS += [("opt", "lora", "mezo"), ("llama", "prefix", "mezo"), ("opt", "lora", "adamw"), ("llama", "prefix", "adamw")]


def arguments(folder, run, output, *more):
    model, way, optimizer = run
    return [
        "--deepspeed", "--deepspeed_config", str(ROOT / "ds_configs" / f"cpu-small_{optimizer}.json"),
        "--model_name_or_path", str(folder / model), "--task", "copa", "--data_dir", str(folder / "copa"),
        "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--max_steps", "4", "--eval_steps", "2",
        "--output_dir", str(output), *WAYS[way], *more,
    ]  # fmt: skip


def finetune(rank, world_size, argv):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.run import finetune

    with contextlib.redirect_stdout(io.StringIO()):
        return finetune(finetune_parser().parse_args(argv))


def _runs(rank, world_size, folder):
    """The results of each run, and on one rank what measuring its adapter, PEFT's own model and the merged one gives."""
    from ds_zoadamu.training.arguments import evaluate_parser
    from ds_zoadamu.training.measure import measure

    found = {}
    for run in RUNS:
        output = folder / f"{'-'.join(run)}-{world_size}"
        results = finetune(
            rank, world_size, arguments(folder, run, output, "--gradient_accumulation_steps", str(2 // world_size))
        )
        asked = ["--model_name_or_path", str(folder / run[0]), "--task", "copa", "--data_dir", str(folder / "copa")]
        with contextlib.redirect_stdout(io.StringIO()):
            measured = measure(
                evaluate_parser().parse_args([*asked, "--per_device_eval_batch_size", "4", "--adapter", str(output / "model")])
            )
        found[run] = results, measured, _by_peft(folder, run, output) if world_size == 1 else None
    return found


def _task(folder, model, batch_size=4):
    config = transformers.AutoConfig.from_pretrained(folder / model)
    task = TASKS["copa"].bind(transformers.AutoTokenizer.from_pretrained(folder / model), config, batch_size=batch_size)
    return task, [task.encode(row) for row in TASKS["copa"].rows("validation", str(folder / "copa"))]


def _plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def _by_peft(folder, run, output):
    task, examples = _task(folder, run[0])
    adapted = peft.PeftModel.from_pretrained(_plain(folder / run[0]), output / "model").eval()
    merged = _plain(output / "merged") if run[1] == "lora" else None
    return [None if model is None else dict(task.evaluate(model, examples)) for model in (adapted, merged)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    save_task_model(folder / "opt")
    tokenizer = llama_like(texts())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 1, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=1, bos_token_id=0,
        eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    write_task(folder / "copa", "copa", num_train=30, num_test=9)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {ranks: run_ranks(ranks, _runs, folder) for ranks in (1, 2)}


@pytest.mark.ranks
def test_runs_are_the_same_on_one_and_two_ranks(folder, found):
    for run in RUNS:
        (one, _, _), two = found[1][0][run], found[2][0][run][0]
        if run[2] == "adamw":  # gradients are summed over ranks in another order
            continue
        for kind in ("weights_sha256", "accuracy", "loss", "best_step"):
            assert one[kind] == two[kind], (run, kind)
        name = "-".join(run)
        records = [read_journal(folder / f"{name}-{ranks}" / "journal.jsonl").records for ranks in (1, 2)]
        assert len(records[0]) == 4
        assert [record.projected_grads for record in records[0]] == [record.projected_grads for record in records[1]]


@pytest.mark.ranks
def test_saved_adapters_are_read_by_peft_and_score_the_same(found):
    for run in RUNS:
        results, measured, (by_peft, merged) = found[1][0][run]
        loss = results["loss"]
        assert loss["test_after"] != loss["test_before"], run
        for kind in ("accuracy", "loss"):  # one thread, the same batches: the same bits
            assert by_peft[kind] == measured[kind] == results[kind]["test_after"], (run, kind)
        if merged is not None:  # W + B A in fp32 is rounded once more: of logits near 1 that is far below 1e-4
            assert merged["loss"] == pytest.approx(by_peft["loss"], rel=1e-4)
        for two, (_, measured, _) in ((r[run][0], r[run]) for r in found[2]):
            assert measured["loss"] == two["loss"]["test_after"]


@pytest.mark.ranks
def test_results_say_which_way_and_its_settings(folder, found):
    lora, measured, _ = found[1][0]["opt", "lora", "zoadamu"]
    expected = {"tuning": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_target_modules": ["q_proj", "v_proj"]}
    assert expected.items() <= lora.items() and measured["tuning"] == "lora"
    options = lora["config"]["optimizer"]["params"]
    assert (options["lr"], options["zo_eps"]) == (1e-4, 1e-2)
    prefix, _, _ = found[1][0]["llama", "prefix", "mezo"]
    assert (prefix["tuning"], prefix["prefix_tokens"]) == ("prefix", 5)
    options = prefix["config"]["optimizer"]["params"]
    assert (options["lr"], options["zo_eps"]) == (1e-2, 1e-1)
    header = json.loads((folder / "opt-lora-zoadamu-1" / "journal.jsonl").read_text().splitlines()[0])
    assert header["task"]["tuning"] == "lora" and header["task"]["lora_alpha"] == "16.0"
    names = [parameter["name"] for parameter in header["parameters"]]
    assert len(names) == 8 and all("lora_" in name for name in names)
    assert not (folder / "opt-prefix-zoadamu-1" / "merged").exists()
    config = json.loads((folder / "opt-lora-zoadamu-1" / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (8, 16.0, True)


def test_usual_values_fill_what_neither_the_json_nor_arguments_say(folder, tmp_path):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.tuning import USUAL, Tuning

    tuning = Tuning(name="lora", adapter=object())
    args = finetune_parser().parse_args(arguments(folder, ("opt", "lora", "zoadamu"), tmp_path))
    for kind, params, expected in (
        ("MeZO", {"lr": "auto"}, (USUAL["lora"].learning_rate, 1e-2)),
        ("MeZO", {"lr": 1e-3, "zo_eps": 1e-3}, (None, None)),
        ("FZOO", {"lr": "auto", "zo_eps": "auto"}, (1e-3, 1e-2)),
        ("AdamW", {"lr": "auto"}, (None, None)),
    ):
        filled = tuning.overrides(args, {"optimizer": {"type": kind, "params": params}})
        assert (filled.learning_rate, filled.zo_eps) == expected
    assert (args.learning_rate, args.zo_eps) == (None, None)


@pytest.mark.ranks
@pytest.mark.parametrize("run", [("opt", "lora", "zoadamu"), ("llama", "prefix", "zoadamu")])
def test_killed_resumed_on_another_number_of_ranks_and_replayed(folder, found, tmp_path, run):
    whole, killed = folder / f"{'-'.join(run)}-2", tmp_path / "killed"
    ends = run_to_crash(2, "before_append:3", finetune, arguments(folder, run, killed, "--save_steps", "2"))
    assert "killed" in [end.how for end in ends], ends
    more = ("--save_steps", "2", "--gradient_accumulation_steps", "2", "--resume")
    resumed = run_ranks(1, finetune, arguments(folder, run, killed, *more))[0]
    assert resumed["weights_sha256"] == found[2][0][run][0]["weights_sha256"]
    file = Path("model") / "adapter_model.safetensors"
    assert (killed / file).read_bytes() == (whole / file).read_bytes()

    from ds_zoadamu import cli
    from ds_zoadamu.durability.replay import replay

    until, sha256 = resumed["best_step"], resumed["weights_sha256"]
    base, journal = killed / "initial_adapters", killed / "journal.jsonl"
    replay(base, journal, tmp_path / "replayed", until=until, expect=sha256, show_progress=False)
    card = ModelCard.load(killed / "model" / "README.md")
    assert card.data.library_name == "peft" and "peft=." in card.text
    assert "ds_zoadamu replay --from . --output ../rebuilt\n" in card.text
    assert cli.main(["publish", str(killed), str(tmp_path / "published")]) == 0
    for published in (tmp_path / "published", killed / "model"):  # each has the adapters before training
        rebuilt = tmp_path / f"{published.name} rebuilt"
        assert cli.main(["replay", "--from", str(published), "--output", str(rebuilt)]) == 0
        assert (rebuilt / file.name).read_bytes() == (tmp_path / "replayed" / file.name).read_bytes()
    assert (tmp_path / "replayed" / "adapter_config.json").is_file()
    ours, again = load_file(killed / file), load_file(tmp_path / "replayed" / "adapter_model.safetensors")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


# --- the prefix, beside the model that reads its tokens -----------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_begins_as_if_its_tokens_stood_in_front(folder, found, model):
    """Also by position: OPT counts the attention mask, which PEFT lengthens, and Llama's rotary keys are those of 0 to 4."""
    from ds_zoadamu.training.tuning import real_tokens

    base, tokenizer = _plain(folder / model), transformers.AutoTokenizer.from_pretrained(folder / model)
    tokens = real_tokens(tokenizer, base.config.vocab_size, 5, seed=0)
    assert not set(tokens) & set(tokenizer.all_special_ids)
    adapted = peft.PeftModel.from_pretrained(_plain(folder / model), folder / f"{model}-prefix-zoadamu-2" / "initial_adapters")
    adapted.eval()
    _, examples = _task(folder, model)
    with torch.no_grad():
        for example in examples[:3]:
            ids = torch.tensor([[*example.context, *example.candidates[0]]])
            mask = torch.ones_like(ids)
            ours = adapted(input_ids=ids, attention_mask=mask, use_cache=False).logits
            in_front = base(input_ids=torch.cat([torch.tensor([tokens]), ids], dim=1)).logits[:, 5:]
            # fp32 sums of attention in another order.
            torch.testing.assert_close(ours, in_front, rtol=1e-4, atol=1e-5)
            alone = base(input_ids=ids).logits
            assert (ours - alone).abs().max() > 1e-2


@pytest.mark.ranks
@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_generates_the_same_with_and_without_padding(folder, found, model):
    from ds_zoadamu.tasks.greedy import generate

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / model)
    adapted = peft.PeftModel.from_pretrained(_plain(folder / model), folder / f"{model}-prefix-zoadamu-1" / "model").eval()
    _, examples = _task(folder, model)
    contexts = [example.context for example in examples]
    together = generate(adapted, tokenizer, contexts, 6, 1)
    assert together == [generate(adapted, tokenizer, [context], 6, 1)[0] for context in contexts]
    assert any(together)


# --- what is refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more,message",
    [
        (("--lora_rank", "4"), "--lora_rank is an option of --lora"),
        (("--prefix", "--lora_alpha", "4"), "--lora_alpha is an option of --lora"),
        (("--lora", "--prefix_tokens", "4"), "--prefix_tokens is an option of --prefix"),
        (("--merge",), "--merge goes with --lora: there is nothing to merge"),
        (("--prefix", "--merge"), "--merge goes with --lora: keys and values before a text are no weights"),
        (("--lora", "--lora_rank", "0"), "--lora_rank must be at least 1, got 0"),
        (("--prefix", "--prefix_tokens", "0"), "--prefix_tokens must be at least 1, got 0"),
        (
            ("--lora", "--lora_target_modules", "q_proj", "query"),
            "no linear layer 'query'; it has k_proj, v_proj, q_proj, out_proj, fc1, fc2, lm_head",
        ),
        (
            ("--prefix", "--prefix_tokens", "256"),
            "a prefix of 256 tokens leaves no room for texts: the model has 256 positions",
        ),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, more, message):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.plan import make_plan

    given = arguments(folder, ("opt", "lora", "zoadamu"), tmp_path / "out", *more)
    args = finetune_parser().parse_args([word for word in given[: given.index("--lora")]] + list(more))
    with pytest.raises(InputError, match=message):
        make_plan(args, ranks=1)


def test_an_architecture_without_known_layers_is_told_which_it_has(folder, tmp_path, monkeypatch):
    from ds_zoadamu.hf.kinds import CAUSAL
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.tuning import tuning_from

    config = transformers.AutoConfig.for_model("xglm", d_model=16, ffn_dim=16, num_layers=1, attention_heads=2, vocab_size=32)
    args = finetune_parser().parse_args(arguments(folder, ("opt", "lora", "zoadamu"), tmp_path))
    with pytest.raises(InputError, match="no query and value layers of 'xglm'.*k_proj, v_proj, q_proj, out_proj, fc1, fc2"):
        tuning_from(args, config, CAUSAL)
    args.lora_target_modules = ["q_proj"]
    assert tuning_from(args, config, CAUSAL).settings["lora_target_modules"] == ["q_proj"]
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r'--lora needs peft; install it with: pip install "ds_zoadamu\[peft\]"'):
        tuning_from(args, config, CAUSAL)


def test_the_plain_loop_trains_all_parameters(folder, tmp_path):
    from ds_zoadamu.training.arguments import finetune_parser
    from ds_zoadamu.training.plain import make_plain_plan

    args = finetune_parser().parse_args(arguments(folder, ("opt", "prefix", "zoadamu"), tmp_path))
    with pytest.raises(InputError, match="--prefix: the plain MeZO loop trains all parameters"):
        make_plain_plan(args)
    args.find_lr = True
    with pytest.raises(InputError, match="--find_lr: the plain MeZO loop makes one run"):
        make_plain_plan(args)
