"""What can be a name of the hub, and whether the hub can be asked."""

import socket

import pytest
from huggingface_hub import constants

from ds_zoadamu.files import hub


@pytest.mark.parametrize("name", ["gpt2", "facebook/opt-125m", "Qwen/Qwen2.5-0.5B", "a_b/c.d"])
def test_names(name):
    assert hub.is_hub_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "./a", "/a", "a/b/c", "~/a", "a/", "a b", "a\\b", "../a", "a/.b"])
def test_paths(name):
    assert not hub.is_hub_name(name)


def test_the_hub_is_asked_only_where_it_can_be(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert hub.out_of_reach() is None
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert hub.out_of_reach() == "hub.example is not known from here"
    monkeypatch.setenv("https_proxy", "http://proxy:3128")  # which knows names that this machine does not
    assert hub.out_of_reach() is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.out_of_reach() == "HF_HUB_OFFLINE is set"
