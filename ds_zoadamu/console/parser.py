"""Command lines whose mistakes are one line, with the nearest word that is known."""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

from ..distributed.alike import say
from ..errors import nearest


class Parser(argparse.ArgumentParser):
    """An ``argparse.ArgumentParser`` without abbreviations. A mistake is one line on stderr, of rank 0 where all ranks make it,
    and exit status 2.

    Args:
        also: options of the launcher, which are no option of this parser.
    """

    def __init__(self, *args, also: Iterable[str] = (), **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        self._also, self._words = list(also), []

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """What is not known ends the process here, hence in the parser of the subcommand whose word it is."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unexpected {rest[0]!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line."""
        wrong = [word for word in self._words if self._is_unknown(word)]
        if wrong and message.startswith(("unexpected", "the following arguments are required")):
            message = self._unknown(wrong[0].partition("=")[0])
        elif choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
            message += f"; did you mean {near}?" if near else ""
        say(message, f"{self.prog}: error: {message}")
        raise SystemExit(2)

    def _options(self) -> list[str]:
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        own = [option for action in shown for option in action.option_strings if not option.startswith("--deepscale")]
        return [option for option in own if option.startswith("--")] + self._also

    def _is_unknown(self, word: str) -> bool:
        """Whether argparse takes a word for an option that it does not have."""
        with suppress(ValueError):
            float(word)  # a negative number
            return False
        name = word.partition("=")[0]
        return word.startswith("-") and len(word) > 1 and " " not in word and name not in self._option_string_actions

    def _unknown(self, option: str) -> str:
        if option in self._also:
            return f"{option} is the launcher's: it stands before the script, or behind ds_zoadamu's command"
        words = {known.lstrip("-"): known for known in self._options()}
        bare = option.lstrip("-").replace("-", "_")
        near = nearest(bare, words, 0.6) or next((word for word in words if len(bare) > 3 and bare in word), None)
        hint = f"did you mean {words[near]}?" if near else "--help lists those that are known"
        return f"unknown option {option}; {hint}"
