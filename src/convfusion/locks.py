"""One writer at a time: a folder is locked while a process writes into it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convfusion.errors import ConvFusionError

LOCK = ".convfusion-lock"  # what is left of it after a kill means nothing
_BYTE = 2**30  # Windows locks bytes against reading too, so not those with the text

_held: set[Path] = set()  # by this process, which the system would let lock them again


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder, which is made if it is missing, while the body writes into it.

    The system drops the lock when the process ends, however that comes. Worker processes that are
    forked meanwhile do not keep it.

    Args:
        folder: to write into; if it is new and nothing is written, it is removed again.

    Raises:
        ConvFusionError: another process holds it, or it cannot be written into.
    """
    folder = Path(folder)
    place = folder.resolve()
    if place in _held:
        raise _taken(folder, f"process {os.getpid()}, this one")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(folder)
    except OSError as error:
        raise ConvFusionError(f"{folder} cannot be written into: {error.strerror}") from None
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        if sys.platform == "win32":  # where an open file cannot be removed
            os.close(handle)
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        if sys.platform != "win32":
            os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(folder: Path) -> int:
    """An open handle of the lock file that holds its lock."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
            # The one who held it may have removed the file in between: then it locks nothing.
            if _is_there(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle
        except BlockingIOError:
            holder = os.read(handle, 300).decode("utf-8", "replace").strip()
            os.close(handle)
            raise _taken(folder, holder or "another process") from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: int) -> None:
    """Lock an open file or raise a BlockingIOError; a file system without locks has none."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise BlockingIOError from None
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _taken(folder: Path, holder: str) -> ConvFusionError:
    return ConvFusionError(
        f"{folder} is being written into by {holder}: wait until it ends, or choose another folder"
    )
