"""Folders on disk: made, filled and replaced whole, by one writer at a time.

What is not finished yet has a hidden, random name that nobody else has. It lies inside of the
folder that it is for, so a link stays a link, a mount point is written into, and nothing but that
folder has to be writable. While a process writes into a folder it holds its lock.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from convfusion.errors import CheckpointError, ConvFusionError

_UNFINISHED = re.compile(r"\.convfusion-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{16}\.tmp")


def unfinished_name() -> str:
    """A name for a file or folder that is being written."""
    return f".convfusion-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


def is_unfinished(path: Path) -> bool:
    """Whether a file or folder is one that somebody began to write and has not finished."""
    return _UNFINISHED.fullmatch(path.name) is not None


def remove_remains(*folders: Path) -> None:
    """Remove what processes of this machine left unfinished in folders when they were killed."""
    for path in [path for folder in folders for path in folder.glob(".convfusion-*.tmp")]:
        name = _UNFINISHED.fullmatch(path.name)
        if name and name["host"] == _host() and not _is_running(int(name["process"])):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder as far as that is possible; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextmanager
def made_folder(folder: Path) -> Iterator[Path]:
    """A folder with its parents, where a link leads to; what was made goes if the rest fails.

    Raises:
        CheckpointError: it cannot be made or written to.
    """
    place = Path(os.path.realpath(folder))
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield place
    except BaseException as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty
        if isinstance(error, OSError):
            raise unwritable(folder, error) from None
        raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder inside another one, which is removed in the end with all that it holds."""
    scratch = parent / unfinished_name()
    try:
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def exchange(new: Path, place: Path, rank: Callable[[str], int]) -> None:
    """Put the content of a folder in the place of the content of another one, or change nothing.

    Args:
        new: a scratch folder inside of `place`.
        place: whose content, except for what is unfinished, gives way.
        rank: of a name. The lowest leaves first and arrives last, so that a process that is killed
            between two moves leaves a folder that lacks it.

    Raises:
        OSError: a move failed; those before it were undone.
    """
    old = place / unfinished_name()
    old.mkdir()
    leaving = sorted((path.name for path in place.iterdir() if not is_unfinished(path)), key=rank)
    arriving = sorted((path.name for path in new.iterdir()), key=rank, reverse=True)
    moves = [(place / name, old / name) for name in leaving]
    moves += [(new / name, place / name) for name in arriving]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.rename(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.rename(target, source)
        old.rmdir()  # it is empty again
        raise
    remove(old)


def check_only(place: Path, files: set[str], why: str) -> None:
    """Refuse a folder that holds anything but some files, before anything in it is replaced.

    Args:
        place: the folder; nothing is there, or what `is_unfinished` tells is passed over.
        files: their paths within it, with slashes.
        why: the end of the message.

    Raises:
        ConvFusionError: it is a file, or holds something else, which is named.
    """
    if place.exists() and not place.is_dir():
        raise ConvFusionError(f"{place} cannot be a folder: it is a file")
    parents = {str(parent) for name in files for parent in Path(name).parents}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if is_unfinished(place / name.parts[0]):
            continue
        known = str(name) in parents if path.is_dir() else name.as_posix() in files
        if path.is_symlink() or not known:
            raise ConvFusionError(f"{place} holds {name}: {why}")


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file or folder that cannot be written, with the first words of the cause."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0][:200]
    return CheckpointError(f"{path} cannot be written: {reason}")


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    """Whether there is a process of that number here; where that cannot be told, there is."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number that a process has
        return True
    return True


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
