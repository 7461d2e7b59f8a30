"""Whether a model's name can be one of the hub, and whether the hub is within reach: known at once, not after its retries."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def is_hub_name(name: str) -> bool:
    """Whether it is "NAME" or "OWNER/NAME", of letters, digits, "-", "_" and ".". Anything else is a path."""
    return _NAME.fullmatch(name) is not None


def out_of_reach() -> str | None:
    """Why the hub cannot be asked from here; None where it may answer."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT).hostname
    if any(name in os.environ for name in _PROXIES):  # the proxy knows the hub's address
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} is not known from here"
    return None


def not_here(name: str) -> str:
    """A path that leads to no folder, as a message says it."""
    return f"there is no folder {Path(name).expanduser().absolute()}"
