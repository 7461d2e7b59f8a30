"""Every JSON file that is written can be read by any JSON parser."""

import json
import math

from ds_zoadamu.files.json_files import dumps, write_json
from ds_zoadamu.training.output import METRICS, OutputDirectory


def strictly(text):
    """As a parser reads it that knows no NaN and no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    value = {"a": [1.5, math.nan, (math.inf, {"b": -math.inf})], "c": "NaN", "d": "\udcff é"}
    expected = {"a": [1.5, None, [None, {"b": None}]], "c": "NaN", "d": "\udcff é"}
    write_json(tmp_path / "x.json", value)
    assert strictly((tmp_path / "x.json").read_bytes().decode("ascii")) == strictly(dumps(value)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_metrics_are_json_when_they_are_logged_and_when_they_are_rewritten(tmp_path):
    output = OutputDirectory(str(tmp_path), writes=True, overwrite=False)
    record = {"kind": "step", "step": 1, "loss": math.nan, "projected_grad": [math.inf, 1.0]}
    output.log(record)
    logged = (tmp_path / METRICS).read_text()
    output.replace_records([record])
    assert (tmp_path / METRICS).read_text() == logged
    assert strictly(logged) == output.records()[0] == {**record, "loss": None, "projected_grad": [None, 1.0]}
