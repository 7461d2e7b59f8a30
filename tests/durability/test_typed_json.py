"""What a checkpoint's manifest gives back equals what it was given, types included, or the place of what cannot be kept is
named."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy
import pytest
import torch

from ds_zoadamu.durability.checkpoint import client_state_of
from ds_zoadamu.durability.checkpoint_store import Found
from ds_zoadamu.errors import CheckpointError
from ds_zoadamu.files.typed_json import MAX_TENSOR_BYTES, decode, encode, with_integer_keys

Pair = namedtuple("Pair", "a b")
PLAIN = {"a": [1, 2.5, "x", None, True], "b": {"c": -(2**70)}}
VALUES = [
    {3: "three", "3": "text", None: 0, 2.5: [], (1, "x"): {1: {2: 3}}},
    (1, (2, [3, ()])),
    {"$type": "tuple", "value": [1]},
    Counter({6: 1, 9: 2}),
    OrderedDict([("z", 1), ("a", 2)]),
    {1, 2, "x"},
    frozenset([(1, 2)]),
    b"\x00\xff",
    [math.inf, -math.inf, 1e308, 5e-324, -0.0],
]


def through_json(value):
    return decode(json.loads(json.dumps(encode(value, "it"), allow_nan=False)))


@pytest.mark.parametrize("value", [PLAIN, *VALUES])
def test_what_is_loaded_is_what_was_saved(value):
    back = through_json(value)
    assert back == value and type(back) is type(value) and encode(back, "it") == encode(value, "it")


def test_plain_json_stays_as_it_is():
    assert encode(PLAIN, "it") == PLAIN


def test_nan_numpy_tensors_and_subclasses():
    assert math.isnan(through_json(math.nan))
    assert through_json([numpy.int64(3), numpy.float32(0.1), numpy.bool_(True)]) == [3, float(numpy.float32(0.1)), True]
    assert through_json(Pair(1, 2)) == (1, 2) and through_json(defaultdict(list, {1: 2})) == {1: 2}
    for tensor in (torch.get_rng_state(), torch.tensor(2.5), torch.randn(3, 2).to(torch.bfloat16).T, torch.empty(0, 2)):
        back = through_json({"t": tensor})["t"]
        assert torch.equal(back, tensor) and back.dtype == tensor.dtype and back.shape == tensor.shape


def itself():
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": [1, (2, {5: object()})]}, r"it\['a'\]\[1\]\[1\]\[5\] is a object; kept are numbers"),
        ({"f": print}, r"it\['f'\] is a builtin_function_or_method"),
        ({object(): 1}, "a key of it is a object"),
        ({"z": 1j}, r"it\['z'\] is a complex"),
        (numpy.zeros(2), "it is a ndarray"),
        ({"m": torch.zeros(MAX_TENSOR_BYTES + 1, dtype=torch.uint8)}, r"it\['m'\] is a tensor of 1048577 bytes"),
        (torch.zeros(1, dtype=torch.complex64), "it is a tensor of complex64"),
        (itself(), "it contains itself"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_kept_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        encode(value, "it")


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="unknown type 'lambda'"):
        decode({"$type": "lambda", "value": 1})


def test_integer_keys_that_json_has_turned_into_strings():
    state = {"milestones": Counter({6: 1, 9: 1}), "phases": [{"end": 1.0}], "nested": {-1: ["a"]}, "empty": {}}
    back = with_integer_keys(json.loads(json.dumps(state)))
    assert back == state and type(back["milestones"]) is Counter


@pytest.mark.parametrize("state", [{"--3": 1}, {"3": 1, "x": 2}, {"٣": 1}, {"": 1}])
def test_other_keys_stay(state):
    assert with_integer_keys(state) == state


@pytest.mark.parametrize(
    "value",
    [
        {"$type": "tuple"}, {"$type": "tuple", "value": 3}, {"$type": "set", "value": [[]]}, {"$type": "float", "value": "x"},
        {"$type": "dict", "value": [[1]]}, {"$type": "bytes", "value": "?"}, {"$type": ["dict"], "value": []},
        {"$type": "tensor", "value": {"dtype": "load", "shape": [], "data": ""}},
        {"$type": "tensor", "value": {"dtype": "int8", "shape": [2**70], "data": "AA=="}},
        {"$type": "tensor", "value": {"dtype": "int32", "shape": [1], "data": "AA=="}},
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_what_is_not_of_encode_is_an_error_of_a_checkpoint(value, tmp_path):
    found = Found("tag", tmp_path, {"version": 2, "client_state": value})
    with pytest.raises(CheckpointError, match="its manifest holds a state that cannot be decoded"):
        client_state_of(found)
