"""An exclusive lock on a file, given up when its holder says so or ends, however it ends."""

import fcntl
import gc
import os
import weakref
from pathlib import Path

_HELD: "weakref.WeakSet[LockedFile]" = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data loader worker would keep the lock of a killed trainer alive.
    for file in list(_HELD):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


class LockedFile:
    """A file, open for reading and writing, under an exclusive lock (flock) until ``release`` or the end of the process. ``fd``
    is -1 after the release, and in a forked child, which does not have the lock.

    ``flags``: more of os.open's. Raises BlockingIOError where another process, or another object of this one, holds the lock,
    OSError where the file cannot be opened or its file system knows no locks.
    """

    def __init__(self, path: Path, flags: int = os.O_CREAT):
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
        try:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not any(file.fd >= 0 and os.path.sameopenfile(file.fd, self.fd) for file in list(_HELD)):
                    raise
                gc.collect()  # its holder in this process may be one that nobody has any more
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise
        except OSError as e:
            self.close()
            raise OSError(
                e.errno, f"cannot be locked: {e.strerror}; put it on a file system that knows flock", str(path)
            ) from e
        _HELD.add(self)

    def is_at_its_place(self) -> bool:
        """Whether the locked file still has its name: it may have been removed, and another made."""
        try:
            return self.fd >= 0 and os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give up the lock."""
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # a child that is just being forked may still hold the file open
        self.close()

    def close(self) -> None:
        """Close the file; the lock is given up when no child that is just being forked holds it open any more."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def is_locked(path: Path) -> bool:
    """Whether another process, or an object of this one, holds the lock on a file. One that is not there is not locked."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: several ranks may ask at the same time
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False
