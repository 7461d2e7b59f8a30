"""Changes of files that a stranger could have made: of the bytes, or of the content."""

import copy
import json
import random
import re
from typing import Any

RAW = [  # JSON texts that json.dumps does not make
    "[" * 90 + "]" * 90, "[" * 200 + "]" * 200, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000,
    "1e999", "-1e999", "NaN", "Infinity", "-0.0", "-0", "1" * 5000, "01", "1.0", '"\\ud800"', '"\\u0000"', "'x'", "", "0x10",
]  # fmt: skip
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 0.5, 1.5, -1e-300, 1e300, 1e308, float("nan"), float("inf"), 10**30,
    2**31, 2**32, 2**63 - 1, 2**63, 2**64, "", " ", "0", "nan", "inf", "../x", "..", ".", "/etc/passwd", "a/b", "a\\b", "a\0b",
    "a\nb", "\x1b[2J", "x" * 300, "x" * 100_000, "é", "\udfff", "evil.py", "model.bin", "config.json", "f" * 64, "float32",
    "complex64", "ZOAdaMU", "MeZO", [], {}, [[]], [0], [1, 2], [0, 0], [2, 1], [-1, 1], [2**62, 2**62], [0] * 1000, {"a": 1},
    {"": {}}, [None], ["x"], "{a}", "{a:9}", "{a:{b}}", "{a!r}", "{", "{}", "{a.b}", "{a[0]} x",
    *(f"@raw:{index}@" for index in range(len(RAW))),
]  # fmt: skip


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of the bytes, whatever they mean."""
    for _ in range(rng.randint(1, 3)):
        begin, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        end = min(end, begin + rng.choice((1, 2, 8, 64, 10**6)))
        other = rng.randint(0, len(data))
        data = rng.choice(
            (
                data[:begin],
                data[:begin] + data[end:],
                data[:begin] + rng.randbytes(end - begin) + data[end:],
                data[:begin] + data[begin:end] * 2 + data[end:],
                data[:begin] + data[other : other + end - begin] + data[end:],
                data[:begin] + rng.choice((b"[", b"{", b'"', b"\n", b"\0", b"\xff", b"]", b",", b"-", b"9")) + data[begin:],
                data[:begin] + bytes([data[begin] ^ 1 << rng.randrange(8)]) + data[begin + 1 :] if begin < len(data) else b"",
            )
        )
    return data


def change(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes: other values, other keys, more or fewer of them."""
    top = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(top)
        container, key = places[rng.randrange(1, len(places))] if len(places) > 1 else places[0]
        what = rng.randrange(10)
        if what <= 3:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif what == 4:
            del container[key]
        elif what == 5:
            other, name = rng.choice(places)
            container[key] = copy.deepcopy(other[name])
        elif what == 6 and isinstance(container, dict):
            container[rng.choice(("@dup@" + key, key + "x", key.upper(), "", "../x", "a\0b", "\ud800"))] = container[key]
        elif what == 7 and isinstance(container, dict):
            container[rng.choice((key + " ", "x" * 300, "\n", "zz"))] = container.pop(key)
        elif what == 8 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice((0, 2, 100))
        elif isinstance(container[key], (int, float)):
            container[key] += rng.choice((1, -1, 0.5, 1e-9, 2**40))
        else:
            container[key] = [container[key]]
        if not top:
            top = [None]
    return top[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of all values inside a list or dict."""
    found, todo = [], [value]
    while todo:
        container = todo.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


def to_text(value: Any, separators: tuple[str, str] = (",", ":")) -> str:
    """JSON, with the marks of ``RAW`` and of keys that come twice put into effect."""
    text = json.dumps(value, separators=separators).replace('"@dup@', '"')
    return re.sub(r'"@raw:(\d+)@"', lambda match: RAW[int(match[1])], text)


# --- the readers --------------------------------------------------------------------------------------------------------------
