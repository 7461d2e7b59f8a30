"""YAML that others have made, read as the JSON it could be: no aliases, no keys that come twice, no other types."""

import json
from typing import Any

from ..errors import shown
from .untrusted import parse_json

try:
    import yaml
except ImportError:  # Transformers depends on it
    yaml = None


def parse_yaml(data: bytes) -> Any:
    """The value of a YAML text. Raises ValueError, with a reason of one line.

    Refused beside what is no YAML: what `parse_json` refuses; aliases, which can make a small file a large value; keys other
    than text and integers, which become text; values that JSON does not have.
    """
    if yaml is None:
        raise ValueError("PyYAML is not installed; install it, or write the file as JSON")
    try:
        value = yaml.load(data.decode(), Loader=_loader())
        return parse_json(json.dumps(value, allow_nan=True))
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 ({e.reason} at byte {e.start})") from e
    except yaml.YAMLError as e:
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None) or getattr(e, "reason", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{place}{' '.join(str(problem or e).split())}") from e
    except RecursionError as e:
        raise ValueError("lists or objects nested too deeply") from e
    except TypeError as e:
        raise ValueError(f"{e}; quote it") from e


def _loader() -> type:
    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.constructor.ConstructorError(None, None, "an alias (*name)", self.peek_event().start_mark)
            return super().compose_node(parent, index)

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, bool) or not isinstance(key, (str, int)):
                problem = f"the key {shown(key)} is no text; quote it"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if str(key) in result:
                problem = f"the key {shown(str(key))} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            result[str(key)] = loader.construct_object(value_node, deep=True)
        return result

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader
