"""JSON that keeps what JSON alone would lose: keys that are not strings, tuples, sets, counters, bytes, NaN, infinities, small
tensors.

What is plain JSON stays as it is; anything else is {"$type": name, "value": ...}. What ``decode`` returns equals what
``encode`` was given, and nothing that is decoded can run code.
"""

import base64
import math
import re
from collections import Counter, OrderedDict
from typing import Any

import numpy
import torch

from .safetensors_io import DTYPES, dtype_from_name, dtype_name, raw_bytes

_TYPE = "$type"
MAX_TENSOR_BYTES = 1 << 20
_CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS = {"dict": dict, "Counter": Counter, "OrderedDict": OrderedDict}


def encode(value: Any, where: str) -> Any:
    """``value`` as plain JSON values. ``where`` names it in messages.

    Numbers of NumPy become Python's, subclasses of dict, list, tuple and str the class itself. Raises TypeError that names the
    place and the type of what cannot be kept.
    """
    try:
        return _encode(value, where)
    except RecursionError:
        raise TypeError(f"{where} contains itself, or is nested too deeply") from None


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numpy.bool_):
        return bool(value)
    if isinstance(value, (int, numpy.integer)):
        return int(value)
    if isinstance(value, (float, numpy.floating)):
        return float(value) if math.isfinite(value) else {_TYPE: "float", "value": str(float(value))}
    if isinstance(value, dict):
        return _encode_mapping(value, where)
    if isinstance(value, list):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            items = value if kind is tuple else sorted(value, key=repr)
            return {_TYPE: name, "value": [_encode(item, f"{where}[{index}]") for index, item in enumerate(items)]}
    if isinstance(value, (bytes, bytearray)):
        return {_TYPE: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return _encode_tensor(value, where)
    raise TypeError(
        f"{where} is a {type(value).__name__}; kept are numbers, strings, bytes, None, lists, tuples, sets, dicts and tensors "
        f"of up to {MAX_TENSOR_BYTES} bytes"
    )


def _encode_mapping(value: dict, where: str) -> dict:
    name = type(value).__name__ if type(value) in (Counter, OrderedDict) else "dict"
    if name == "dict" and _TYPE not in value and all(type(key) is str for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    items = [[_encode(key, f"a key of {where}"), _encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
    return {_TYPE: name, "value": items}


def _encode_tensor(value: torch.Tensor, where: str) -> dict:
    size = value.numel() * value.element_size()
    if size > MAX_TENSOR_BYTES:
        raise TypeError(
            f"{where} is a tensor of {size} bytes; tensors of up to {MAX_TENSOR_BYTES} bytes are kept: put it in a file"
        )
    if value.dtype not in DTYPES.values():
        raise TypeError(f"{where} is a tensor of {dtype_name(value.dtype)}, which is not kept: convert it")
    data = base64.b64encode(raw_bytes(value)).decode()
    encoded = {"dtype": dtype_name(value.dtype), "shape": list(value.shape), "data": data}
    return {_TYPE: "tensor", "value": encoded}


def decode(value: Any) -> Any:
    """What was given to ``encode``. Raises what a wrong type, value or name raises for what is not of ``encode``."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TYPE not in value:
        return {key: decode(item) for key, item in value.items()}
    name, inner = value[_TYPE], value["value"]
    if name in _CONTAINERS:
        return _CONTAINERS[name](decode(item) for item in inner)
    if name in _MAPPINGS:
        return _MAPPINGS[name]({decode(key): decode(item) for key, item in inner})
    if name == "float":
        return float(inner)
    if name == "bytes":
        return base64.b64decode(inner, validate=True)
    if name == "tensor":
        dtype = dtype_from_name(inner["dtype"])
        data = bytearray(base64.b64decode(inner["data"], validate=True))
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(inner["shape"])
    raise ValueError(f"a value of the unknown type {name!r}")


def with_integer_keys(value: Any) -> Any:
    """Plain JSON with dicts whose keys are all integers in quotes given integer keys: what ``json.dumps`` had made of them."""
    if isinstance(value, list):
        return [with_integer_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value and all(re.fullmatch(r"-?[0-9]+", key) for key in value):
        counts = {int(key): with_integer_keys(item) for key, item in value.items()}
        return Counter(counts) if all(type(count) is int for count in counts.values()) else counts
    return {key: with_integer_keys(item) for key, item in value.items()}
