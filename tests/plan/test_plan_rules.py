"""The plan for what is not plain ZO-AdaMU: MeZO, several perturbations, a constant beta1, rules of one's own, PEFT adapters."""

import json
import sys

import pytest
import torch

from ds_zoadamu import ConfigError, check_config
from ds_zoadamu.cli import main as console
from ds_zoadamu.config.adapters import read_adapter
from ds_zoadamu.config.offload import Offload
from ds_zoadamu.plan.memory import Model, plan_memory
from ds_zoadamu.plan.models import opt_config
from ds_zoadamu.plan.sizes import momentum_bytes, state_bytes
from ds_zoadamu.plan.step_time import HARDWARE, estimate_step
from ds_zoadamu.rules import RULES, MeZO, Rule, ZOAdaMU, ZOAdaptive, import_modules, make_rule
from ds_zoadamu.rules.schedules import Schedule

OPT_125M = 125_239_296
WORDS = ["--model", "opt-125m", "--batch", "1", "--seq", "64"]


def run(capsys, *words) -> tuple[int, str, str]:
    status = console(["plan", *WORDS, *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def json_file(path, rule: str = "ZOAdaMU", **params) -> str:
    if rule == "ZOAdaMU":
        params = {"total_steps": 600} | params
    config = {"optimizer": {"type": rule, "params": {"lr": 1e-6} | params}, "zero_optimization": {"stage": 3}}
    path.write_text(json.dumps(config))
    return str(path)


def zo_adamu(momentum: str, num_perturbations: int = 1) -> Rule:
    return ZOAdaMU(lr=1e-6, total_steps=20_000, num_perturbations=num_perturbations, momentum={"dtype": momentum})


def plan(model: Model, rule: Rule, **kind):
    return plan_memory(model, rule, **({"world_size": 2, "capacity": 10**10, "micro_batch": 1, "length": 64} | kind))


@pytest.fixture(scope="module")
def opt() -> Model:
    return Model.build("opt-125m", opt_config("125m"), "bf16")


# --- MeZO ---------------------------------------------------------------------------------------------------------------------


def test_mezo_stores_nothing_and_its_json_stays_mezo(capsys, tmp_path):
    given = json_file(tmp_path / "given.json", "MeZO", num_perturbations=3, weight_decay=0.01)
    written = tmp_path / "written.json"
    status, out, _ = run(capsys, "--config", given, "--write", str(written))
    assert status == 0
    assert "no momentum" in out and "6 forwards" in out and "momenta" not in out and "replay" not in out
    assert any(line.split() == ["momentum", "0.000"] for line in out.splitlines())
    config = json.loads(written.read_text())
    assert config["optimizer"] == {"type": "MeZO", "params": {"lr": 1e-6, "num_perturbations": 3, "weight_decay": 0.01}}
    assert check_config(config).num_perturbations == 3
    assert run(capsys, "--config", str(written))[1].splitlines()[1:] == out.splitlines()[1:-1]  # planned again: the same


def test_mezo_needs_what_replay_needs_and_does_not_make_its_noise(opt):
    mezo, replay = plan(opt, MeZO(lr=1e-6)), plan(opt, zo_adamu("replay"))
    assert (mezo.total, mezo.momentum) == (replay.total, 0)
    times = [estimate_step(opt, p, HARDWARE["a100-80gb"]) for p in (mezo, replay)]
    assert times[0].noise < times[1].noise / 30


def test_mezo_has_no_momentum_option(capsys, tmp_path):
    status, _, err = run(capsys, "--config", json_file(tmp_path / "ds.json", "MeZO", momentum={"dtype": "int8"}))
    assert status == 2 and "'momentum'" in err


# --- several perturbations a step ---------------------------------------------------------------------------------------------


def test_each_perturbation_stores_a_momentum_and_makes_two_forwards(opt):
    one, three = (plan(opt, zo_adamu("int8", count)) for count in (1, 3))
    assert three.momentum == 3 * one.momentum == 3 * OPT_125M // 2
    assert (three.weights, three.gathered, three.temporaries, three.activations) == (
        one.weights, one.gathered, one.temporaries, one.activations,
    )  # fmt: skip
    times = [estimate_step(opt, p, HARDWARE["a100-80gb"]) for p in (one, three)]
    for cause in ("forward", "gather", "noise"):
        assert getattr(times[1], cause) == pytest.approx(3 * getattr(times[0], cause))


def test_offloaded_momenta_lie_on_the_host_and_one_goes_along_with_a_gather(opt):
    host = [plan(opt, zo_adamu("bf16", count), offload=True) for count in (1, 3)]
    assert host[1].host - host[0].host == 2 * 2 * OPT_125M and host[1].momentum == 0
    # Two forwards read 16-bit weights and one 16-bit momentum, the update reads and writes weights and three momenta.
    alone = plan(opt, zo_adamu("bf16", 3), offload=True, world_size=1)
    hardware = HARDWARE["a100-80gb"]
    time = estimate_step(opt, alone, hardware, offload=True)
    moved = OPT_125M * (6 * (2 + 2) + 2 * (2 + 3 * 2))
    assert time.host == pytest.approx(moved / (hardware.host_gb * 1e9 * hardware.link_efficiency))


def test_nvme_takes_every_momentum_along(opt):
    drive = Offload("nvme", itemsize=2, smallest_file=2**20, buffers=10**8)
    large = sum(size.numel for size in opt.sizes if size.numel >= 2**20)  # 2 bytes a weight, 2 ranks
    rules = MeZO(lr=1e-6, num_perturbations=3), zo_adamu("int8", 3)
    on_drive = [plan(opt, rule, offload=True, drive=drive).on_drive for rule in rules]
    assert on_drive == [2 * large, (2 + 3) * large]


def test_the_choice_sees_every_momentum(capsys, tmp_path):
    # Eight int8 momenta are 1.0 GB beside 0.25 GB of weights.
    given, written = json_file(tmp_path / "ds.json", num_perturbations=8), tmp_path / "written.json"
    status, out, _ = run(capsys, "--config", given, "--gpu-memory", "0.8", "--write", str(written))
    assert status == 0 and "momentum replay" in out and "16 forwards and 8 momenta" in out
    assert json.loads(written.read_text())["optimizer"]["params"]["num_perturbations"] == 8
    kept = json_file(tmp_path / "kept.json", num_perturbations=8, momentum={"dtype": "int8"})
    status, out, _ = run(capsys, "--config", kept, "--gpu-memory", "0.8")
    assert status == 3 and "it fits with num_perturbations 1" in out


def test_moments_of_first_order_optimizers_are_counted_as_they_are_stored(opt):
    def stored(**options) -> int:
        return plan(opt, ZOAdaptive(lr=1e-6, num_perturbations=2, **options)).momentum * 2 // OPT_125M

    assert stored(schedule="amsgrad", momentum_on="gradient", momentum={"dtype": "bf16"}) == 2 + 4 + 4
    assert stored(schedule="adam", momentum_on="perturbation", momentum={"dtype": "int8"}) == 2 * (1 + 4)


# --- a constant beta1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1,window", [(0.3, 20), (0.9, 3), (1.0, 1)])  # 0.7^20 = 0.0008, 0.1^3 rounds below 0.001
def test_replay_s_window_under_a_constant_beta1(capsys, tmp_path, beta1, window):
    assert Schedule(1, 2, 3, constant_beta1=beta1).replay_window(10**4, 1e-3) == window
    written = tmp_path / "written.json"
    given = json_file(tmp_path / "ds.json", constant_beta1=beta1, momentum={"dtype": "replay"})
    status, out, _ = run(capsys, "--config", given, "--write", str(written))
    assert status == 0 and f"K = {window} earlier steps" in out
    assert json.loads(written.read_text())["optimizer"]["params"]["constant_beta1"] == beta1


def test_a_small_constant_beta1_leaves_replay_out(capsys, tmp_path):
    given = json_file(tmp_path / "ds.json", constant_beta1=0.05)  # 0.95^135 = 0.00098
    status, out, _ = run(capsys, "--config", given, "--gpu-memory", "0.3")
    assert status == 3 and "replay is left out: it needs K = 135 steps of noise, max_window is 64" in out
    asked = json_file(tmp_path / "asked.json", constant_beta1=0.05, momentum={"dtype": "replay"})
    status, _, err = run(capsys, "--config", asked)
    assert status == 2 and "135" in err and "max_window is 64" in err


# --- rules of one's own -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """Arguments of `ds_zoadamu` that bring the rules of tests/helpers/own_rule.py; they are forgotten afterwards."""
    before = dict(RULES)
    monkeypatch.delitem(sys.modules, OWN, raising=False)  # else a second import would register nothing
    yield ["--import", OWN]
    RULES.clear()
    RULES.update(before)


OWN = "tests.helpers.own_rule"


def test_a_rule_s_own_state_and_evaluations_are_planned(opt, own):
    import_modules(own[1:])
    rule = make_rule("OneSided", {"lr": 1e-6, "num_perturbations": 2})
    stored, moved = plan(opt, rule), plan(opt, rule, offload=True, world_size=1)
    assert stored.momentum == (4 + 1) * OPT_125M // 2 and moved.host == (2 + 4 + 1) * OPT_125M
    mezo, hardware = plan(opt, MeZO(lr=1e-6)), HARDWARE["a100-80gb"]
    times = [estimate_step(opt, p, hardware) for p in (mezo, stored)]
    # Three forwards, of which two are perturbed: noise for those, and along two directions for the update.
    assert times[1].forward == pytest.approx(1.5 * times[0].forward) and times[1].gather == pytest.approx(1.5 * times[0].gather)
    assert times[1].noise == pytest.approx(4 / 3 * times[0].noise)
    # The forwards read weights, two of them the mean too; the update reads and writes all.
    bytes_moved = OPT_125M * (3 * 2 + 2 * 4 + 2 * (2 + 4 + 1))
    per_second = hardware.host_gb * 1e9 * hardware.link_efficiency
    assert estimate_step(opt, moved, hardware, offload=True).host == pytest.approx(bytes_moved / per_second)


def test_the_command_plans_a_rule_of_ones_own(capsys, tmp_path, own):
    given, written = json_file(tmp_path / "ds.json", "OneSided", num_perturbations=2), tmp_path / "written.json"
    status = console([*own, "plan", *WORDS, "--config", given, "--write", str(written)])
    out = capsys.readouterr().out
    assert status == 0 and "momentum float32 + int8, micro-batch 1" in out and "replay" not in out
    assert "num_perturbations is 2: a step has 3 forwards and 2 momenta" in out and "\n  3 forwards" in out
    assert any(line.split() == ["momentum", "0.626"] for line in out.splitlines())  # 5 bytes x 125,239,296
    assert json.loads(written.read_text())["optimizer"]["params"] == {"lr": 1e-6, "num_perturbations": 2}


def test_a_rule_of_ones_own_says_which_storages_there_are(capsys, tmp_path, own):
    given, written = json_file(tmp_path / "ds.json", "Kept"), tmp_path / "written.json"
    words = [*own, "plan", *WORDS, "--config", given]
    assert console([*words, "--gpu-memory", "0.9", "--write", str(written)]) == 0
    out = capsys.readouterr().out
    assert "momentum votes" in out and "mean momentum would miss by 0.1 GB" in out and "votes are coarse" in out
    assert "elements; kept by hand" in out
    assert json.loads(written.read_text())["optimizer"]["params"] == {"lr": 1e-6, "kept": "votes"}
    assert console([*words, "--gpu-memory", "0.3"]) == 3
    assert "both is left out: nobody wrote it" in capsys.readouterr().out
    asked = json_file(tmp_path / "asked.json", "Kept", kept="mean")
    assert console([*own, "plan", *WORDS, "--config", asked, "--gpu-memory", "0.9"]) == 3
    out = capsys.readouterr().out
    assert "momentum mean" in out and "left out" not in out


# --- adapters -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    """The folder of a LoRA adapter of rank 8 on q_proj and v_proj, as PEFT saves it after training."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(str(tmp_path / "lora"))
    return tmp_path / "lora"


LORA_NUMEL = 12 * 2 * 8 * (768 + 768)  # layers, targets, rank, in + out


def test_lora_s_sizes_by_hand(lora):
    model = Model.build("opt-125m", opt_config("125m"), "bf16", read_adapter(str(lora)))
    assert model.trained_numel == LORA_NUMEL and model.numel == OPT_125M + LORA_NUMEL
    assert all(("lora_" in size.name) == size.trained for size in model.sizes)
    assert momentum_bytes(model.sizes, 0, 2, state_bytes(zo_adamu("int8", 3), torch.bfloat16)) == 3 * LORA_NUMEL // 2
    adapted = plan(model, zo_adamu("int8"))
    assert adapted.weights == 2 * (OPT_125M + LORA_NUMEL) // 2 and adapted.momentum == LORA_NUMEL // 2
    assert adapted.perturbed_numel == LORA_NUMEL // 2  # what is frozen is gathered as it is
    assert adapted.traffic_numel == OPT_125M + LORA_NUMEL
    assert model.trace(1, 64).exact


def test_command_plans_for_an_adapter(capsys, lora, tmp_path):
    status, out, _ = run(capsys, "--adapter", str(lora), "--write", str(tmp_path / "ds.json"))
    assert status == 0 and "125,534,208 parameters (294,912 of them trained)" in out and "momentum int8" in out


@pytest.mark.parametrize(
    "text,message",
    [
        (None, ["adapter_config.json", "cannot be read", "name the adapter's folder"]),
        ("{", ["not valid JSON"]),
        ("[]", ['no "peft_type"', "LORA"]),
        ('{"peft_type": "LOLA"}', ["peft_type is 'LOLA'", "LORA"]),
        ('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}', ["cannot be put on this model", "r"]),
        ('{"peft_type": "LORA", "target_modules": ["query"]}', ["cannot be put on this model", "query"]),
    ],
)
def test_an_adapter_that_is_unknown_or_does_not_fit_is_refused(capsys, tmp_path, text, message):
    pytest.importorskip("peft")
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    status, _, err = run(capsys, "--adapter", str(tmp_path))
    assert status == 2 and "--adapter" in err
    for part in message:
        assert part in err


def test_without_peft_an_adapter_is_refused(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r'needs peft.*pip install "ds_zoadamu\[peft\]"'):
        read_adapter(str(tmp_path))


# --- a JSON with something missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config,message",
    [
        ({"optimizer": {"type": "ZOAdaMU", "params": {"lr": 1e-6}}}, "total_steps is missing"),
        ({"optimizer": {"type": "ZOAdaMU", "params": {"total_steps": 9}}}, "lr is missing"),
        ({"optimizer": {"type": "MeZO"}}, "lr is missing"),
        ({"optimizer": {"params": {"lr": 1e-6}}}, 'optimizer.type is None; the plan is for "ZOAdaMU" or "MeZO"'),
        ({}, "optimizer.type is None"),
        ({"optimizer": "MeZO"}, "optimizer is 'MeZO'; it must be an object"),
        ({"optimizer": {"type": "MeZO", "params": {"lr": 1e-6}}, "bf16": True}, "bf16 is True; it must be an object"),
        ({"optimizer": {"type": "MeZO", "params": {"lr": 1e-6}}, "zero_optimization": {}}, "stage is 0"),
        ({"optimizer": {"type": "MeZO", "params": {"lr": 1e-6}}, "zero_optimization": {"stage": 1}}, "stage is 1"),
    ],
)
def test_command_refuses_a_json_that_lacks_something(capsys, tmp_path, config, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}} | config))
    status, _, err = run(capsys, "--config", str(path))
    assert status == 2 and message in err
