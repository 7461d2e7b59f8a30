"""The error a user's own input ends in, and what is wrong with a text."""


class InputError(ValueError):
    """What a user gave cannot be used; the message names the file, line or value and the remedy.

    The launch scripts print the message alone, without a traceback, and end with status 2 on every rank.
    """


def check_text(where: str, text: str) -> None:
    """Raises InputError for a text that holds a lone surrogate, half a character that no tokenizer takes; `where` names it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} holds {text[error.start]!a}, a lone surrogate, at position {error.start}: no text; correct it (an "
            "emoji cut in two, or bytes that are not UTF-8)"
        ) from error
