"""The error a user's own input ends in."""


class InputError(ValueError):
    """What a user gave cannot be used; the message names the file, line or value and the remedy.

    The launch scripts print the message alone, without a traceback, and end with status 2 on every rank.
    """
