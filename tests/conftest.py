"""The suite's options, its order, and what is built while it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers.capability import LEVELS

# DeepSpeed's async_io takes minutes to build, once on a machine. It ends with the session, however that ends (1 is
# PR_SET_PDEATHSIG); SystemExit lets torch remove the lock for the next build.
_BUILD = """
import ctypes, os, signal, sys

def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    sys.exit(1)

signal.signal(signal.SIGTERM, end)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from ds_zoadamu.zero3 import nvme
nvme._load_operator()
"""
_build = pytest.StashKey[subprocess.Popen]()


def pytest_addoption(parser):
    group = parser.getgroup("ds_zoadamu")
    group.addoption(
        "--quick", action="store_true", help="what needs no ranks, and those marked quick, which go once through all of it"
    )
    group.addoption("--capability", choices=LEVELS, help="as on a processor that has no more than these instructions")


def pytest_configure(config):
    config.addinivalue_line("markers", "ranks: starts processes of its own, several seconds")
    config.addinivalue_line("markers", "quick: of the thin path over ranks that --quick takes")
    config.addinivalue_line("markers", "nvme: needs DeepSpeed's async_io operator; runs last, as it is built meanwhile")
    if config.option.capability:
        os.environ.update(LEVELS[config.option.capability])  # before a test module imports torch


def pytest_collection_modifyitems(config, items):
    if config.option.quick:
        chosen = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    items.sort(key=_needs_operator)


def _is_quick(item) -> bool:
    return item.get_closest_marker("ranks") is None or item.get_closest_marker("quick") is not None


def _needs_operator(item) -> bool:
    return item.get_closest_marker("nvme") is not None


def _operator_is_built() -> bool:
    from torch.utils.cpp_extension import get_default_build_root

    return any(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/async_io.so"))


def pytest_collection_finish(session):
    worker = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"]  # one of pytest-xdist's builds
    wanted = worker == "gw0" and not session.config.option.collectonly and any(map(_needs_operator, session.items))
    if wanted and not _operator_is_built():
        session.config.stash[_build] = subprocess.Popen(
            ["nice", sys.executable, "-c", _BUILD], cwd=session.config.rootpath, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def pytest_sessionfinish(session, exitstatus):
    build = session.config.stash.get(_build, None)
    if build is None:
        return
    if exitstatus != pytest.ExitCode.OK:
        build.terminate()  # nobody waits for it any more
    build.wait()
