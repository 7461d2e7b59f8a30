"""Builds the C++ kernels into a cache directory: once for each source, compiler and architecture, also by several processes."""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("g++", "clang++", "c++")
# -ffp-contract=off: every operation rounds by itself, as in the reference. -fno-math-errno: sqrt is one instruction.
_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-w",
    "-ffp-contract=off", "-fno-math-errno",
)  # fmt: skip
_GCC_FLAGS = ("-fschedule-insns", "-fsched-pressure")  # up to a tenth faster; clang has no such options
_X86_BASELINE = ("-march=x86-64", "-DZO_X86")
# Variant -> its own flags. Each is kernels.cpp in a namespace of its own.
_X86_VARIANTS = {
    "avx512": ("-DZO_AVX512", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
    "avx2": ("-DZO_AVX2", "-mavx2", "-mf16c"),
    "sse2": ("-DZO_SSE2",),
}
_TAIL = 2000  # characters of a compiler's message that an error repeats


class BuildError(RuntimeError):
    """The kernels could not be built; the message says what was missing and the remedy."""


def cache_directory() -> Path:
    """Where built libraries are kept. Raises BuildError where that cannot be said."""
    if explicit := os.environ.get("DS_ZOADAMU_CACHE_DIR"):
        return Path(explicit)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ds_zoadamu"
    try:
        return Path.home() / ".cache" / "ds_zoadamu"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise BuildError(f"no place for the built kernels: {error} Set DS_ZOADAMU_CACHE_DIR to a folder") from error


def _find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        if path := shutil.which(name):
            return path
    missing = f"CXX={named!r} is not a program" if named else f"none of {', '.join(_COMPILERS)} was found"
    raise BuildError(f"{missing}; install a C++ compiler (package g++ or clang) or set CXX to one")


def _run(command: list[str]) -> str:
    """Output of a command. Raises BuildError with the end of its messages."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be started: {error}; set CXX to a C++ compiler that works here") from error
    if done.returncode:
        raise BuildError(
            f"{command[0]} failed with status {done.returncode}; set CXX to another compiler (GCC 9 or later, or clang). "
            f"Its message ended:\n{(done.stderr or done.stdout)[-_TAIL:]}"
        )
    return done.stdout


def _objects(version: str, machine: str) -> dict[str, tuple[str, ...]]:
    """Name of each object file -> its source and flags, for a compiler's ``--version`` and an architecture."""
    baseline, variants = _FLAGS, {"generic": ()}
    if "clang" not in version:
        baseline = (*baseline, *_GCC_FLAGS)
    if machine in ("x86_64", "AMD64"):
        baseline, variants = (*baseline, *_X86_BASELINE), {**_X86_VARIANTS, **variants}
    objects = {"dispatch": ("dispatch.cpp", *baseline)}
    for name, flags in variants.items():
        objects[name] = ("kernels.cpp", *baseline, *flags, f"-DZO_NAMESPACE=zo_{name}")
    return objects


@dataclass(frozen=True)
class _Build:
    """Everything that decides what the library contains, besides the sources."""

    compiler: str
    version: str
    machine: str
    objects: dict[str, tuple[str, ...]]

    @classmethod
    def here(cls) -> "_Build":
        if sys.byteorder != "little":
            raise BuildError("the kernels need a little-endian machine")
        compiler, machine = _find_compiler(), platform.machine()
        version = _run([compiler, "--version"])
        return cls(compiler, version, machine, _objects(version, machine))

    def file_name(self) -> str:
        digest = hashlib.blake2b(repr(self).encode(), digest_size=10)
        for source in sorted(_SOURCES.iterdir()):
            if source.suffix in (".cpp", ".h"):
                digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        return f"kernels-{self.machine}-{digest.hexdigest()}.so"

    def compile_to(self, target: Path) -> None:
        """Compiles in a temporary directory beside ``target``, then moves the library into place in one step."""
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
            paths = {name: f"{folder}/{name}.o" for name in self.objects}
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda name: self._compile(name, paths[name]), self.objects))
            library = f"{folder}/kernels.so"
            _run([self.compiler, "-shared", "-pthread", *paths.values(), "-lm", "-o", library])
            os.replace(library, target)

    def _compile(self, name: str, path: str) -> None:
        source, *flags = self.objects[name]
        _run([self.compiler, *flags, "-c", str(_SOURCES / source), "-o", path])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system releases it also when the process dies.

    It saves work only: each process builds in a folder of its own. So a file system without locks is no error.
    """
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def library_path() -> Path:
    """The built library, which is built now if the cache does not have it. Raises BuildError."""
    build = _Build.here()
    folder = cache_directory()
    target = folder / build.file_name()
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():  # another process may have built it while this one waited
                build.compile_to(target)
    except OSError as error:
        raise BuildError(
            f"cannot write to {folder}: {error}; set DS_ZOADAMU_CACHE_DIR to a folder that can be written"
        ) from error
    return target
