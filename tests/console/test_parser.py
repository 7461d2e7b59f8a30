"""Mistakes on the command line of every command: one line that names the nearest known word, and exit status 2."""

import pytest

import ds_zoadamu
from ds_zoadamu.cli import COMMANDS, SUBCOMMANDS, main
from ds_zoadamu.console.parser import Parser

MISTAKES = {
    "--verison": "ds_zoadamu: error: unknown option --verison; did you mean --version?",
    "finetune --learning_rat 1": "ds_zoadamu finetune: error: unknown option --learning_rat; did you mean --learning_rate?",
    "finetune --zo-eps=1": "ds_zoadamu finetune: error: unknown option --zo-eps; did you mean --zo_eps?",
    "finetune --num_gpu 2": "ds_zoadamu finetune: error: unknown option --num_gpu; did you mean --num_gpus?",
    "finetune --num_gpus two": "ds_zoadamu: error: argument --num_gpus: invalid int value: 'two'",
    "finetune --model m": "ds_zoadamu finetune: error: unknown option --model; did you mean --model_name_or_path?",
    "finetune --xyzzy": "ds_zoadamu finetune: error: unknown option --xyzzy; --help lists those that are known",
    "evaluate --splt train": "ds_zoadamu evaluate: error: unknown option --splt; did you mean --split?",
    "benchmark --seds=1": "ds_zoadamu benchmark: error: unknown option --seds; did you mean --seeds?",
    "plain_mezo --zo_ep 1": "ds_zoadamu plain_mezo: error: unknown option --zo_ep; did you mean --zo_eps?",
    "plan --modle x": "ds_zoadamu plan: error: unknown option --modle; did you mean --model?",
    "replay --bsae m --journal j": "ds_zoadamu replay: error: unknown option --bsae; did you mean --base?",
    "journal --plt x j": "ds_zoadamu journal: error: unknown option --plt; did you mean --plot?",
    "digest --jornal x f": "ds_zoadamu digest: error: unknown option --jornal; did you mean --journal?",
    "journal a b": "ds_zoadamu journal: error: unexpected 'b'",
    "digest f": "ds_zoadamu digest: error: the following arguments are required: --journal",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_one_line_with_the_nearest_word(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["ds_zoadamu"])  # put back behind the command, which gives itself its name
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == MISTAKES[words] + "\n"


def test_an_option_of_the_launcher_behind_the_script(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ds_zoadamu"])
    monkeypatch.setenv("RANK", "0")  # the launcher has started this process already
    with pytest.raises(SystemExit):
        main(["finetune", "--num_gpus", "2"])
    assert capsys.readouterr().err == (
        "ds_zoadamu finetune: error: --num_gpus is the launcher's: it stands before the script, or behind ds_zoadamu's "
        "command\n"
    )


@pytest.mark.parametrize("words, near", [("finetun --max_steps 3", "finetune"), ("configs lst", "list")])
def test_a_misspelt_command(capsys, words, near):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.endswith(f"; did you mean {near}?")


@pytest.mark.parametrize("command", [*COMMANDS, *SUBCOMMANDS])
def test_help_of_every_command(monkeypatch, capsys, command):
    monkeypatch.setattr("sys.argv", ["ds_zoadamu"])
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: ds_zoadamu {command} ")


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ds_zoadamu {ds_zoadamu.__version__}\n"


def test_values_that_look_like_options_are_none():
    parser = Parser(prog="p")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--words", nargs="+")
    given = parser.parse_args(["--words", "- a b", "--lr", "-0.5"])
    assert (given.lr, given.words) == (-0.5, ["- a b"])
