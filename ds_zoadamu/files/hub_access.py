"""What the hub's client raises, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, shown

_HTTPError = HfHubHTTPError.__bases__[0]  # of the client under it: httpx, httpx2 or requests, by the release
_OF_THE_CLIENT = (
    HfHubHTTPError, _HTTPError, ConnectionError, LocalTokenNotFoundError, HFValidationError, OfflineModeIsEnabled,
    LocalEntryNotFoundError,
)  # fmt: skip
_NO_TOKEN = "no token that may do this: log in with `hf auth login`, or set HF_TOKEN in the environment"
_OFFLINE = "HF_HUB_OFFLINE is set: unset it"


@contextmanager
def one_line(doing: str, safe: str = "") -> Iterator[None]:
    """Raises HubError for what the hub's client raises in the body.

    Args: ``doing``: begins the message; ``safe``: ends it, with what is on the disk and how to try again.
    """
    try:
        yield
    except (*_OF_THE_CLIENT, ValueError) as error:
        if not isinstance(error, _OF_THE_CLIENT) and "Invalid metadata" not in str(error):  # of a card, says the hub
            raise
        raise HubError(f"{doing}: {_reason(error)}" + (f"; {safe}" if safe else "")) from error


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401 and not isinstance(error, RepositoryNotFoundError):
        return _NO_TOKEN
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return _OFFLINE
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the token may not see it"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if status is not None:
        said = getattr(error, "server_message", None) or str(error)
        return f"the hub says {status}: {_first_line(said)}"
    if isinstance(error, (HFValidationError, ValueError)):
        return _first_line(str(error))
    return f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})"


def _first_line(text: str) -> str:
    line = " ".join(text.split())
    return line if line.isprintable() and len(line) <= 300 else shown(line)
