"""The rules by name: the name is what a JSON's "type" and a journal's header say."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .rule import Rule

RULES: dict[str, type[Rule]] = {}
"""Every registered rule by its name."""

_OWN_PACKAGE = __name__.partition(".")[0]


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule known by the name of its class, so that it trains from JSON, journals, resumes and replays; returns it.

    Usable as a decorator. The same class of a module that is imported anew takes the place of the old one. Raises ConfigError
    where the name belongs to another rule.
    """
    name = rule.__name__
    known = RULES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ConfigError(f"a rule named {name!r} is registered already, by {known.__module__}; choose another name")
    RULES[name] = rule
    return rule


def make_rule(name: str, options: dict[str, Any]) -> Rule:
    """The rule of that name with these options. Raises KeyError for an unknown name, ConfigError for the options."""
    return RULES[name](**options)


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register rules, as a user has named them; the working directory is searched too.

    Raises ConfigError for one that is not there or fails.
    """
    for name in names:
        sys.path.insert(0, "")
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a module's own lines raise
            raise ConfigError(f"--import {name}: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove("")


def origin(rule: type[Rule]) -> str | None:
    """The module, or the script, that has to be imported for this rule to be known; None for the rules of this package."""
    module = rule.__module__
    if module.partition(".")[0] == _OWN_PACKAGE:
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file).name if module == "__main__" and file else module
