"""Files that survive a kill and a full disk: whole lines, whole files, and one process at a time.

Every output of this project is written by these: a .jsonl file grows by whole lines, and a last line without its
newline is torn, cut off and done again; any other file is written beside, fsynced and renamed.
"""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from common_lib.cli import UserError

logger = logging.getLogger(__name__)

FSYNC_SECONDS = 1.0  # lines of at most that long are lost with the machine's power; with the process none


class OutputError(RuntimeError):
    """A file cannot be written (disk full, say). What was written stays whole; the message is one line."""


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a file that is being written into one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; make room, and the same command goes on from here"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Lines


class LineFile:
    """A .jsonl file that grows by whole lines. A line that cannot be written whole is taken back."""

    def __init__(self, path: Path, separators: tuple[str, str] = (",", ":")):
        """Open or make the file, and drop a torn last line. separators: of `json.dumps`. Raises OutputError."""
        self.path, self._separators = path, separators
        self._synced = time.monotonic()
        with output_errors(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._drop_torn_line()
            except BaseException:
                os.close(self._fd)
                raise

    def append(self, row: dict[str, Any]) -> None:
        """Raises OutputError; where the line could not be written whole, the file then ends with the one before."""
        data = memoryview(_to_json(row, separators=self._separators) + b"\n")
        with output_errors(self.path):
            end = os.fstat(self._fd).st_size
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except BaseException:  # a KeyboardInterrupt also must leave no half line for the next one to be glued to
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, end)
                raise
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        with output_errors(self.path):
            os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Make it durable. Can be called twice."""
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _drop_torn_line(self) -> None:
        """Cut off what follows the last newline."""
        end = keep = os.fstat(self._fd).st_size
        newline = -1  # not found
        while keep and newline < 0:
            begin = max(0, keep - (1 << 16))
            newline = os.pread(self._fd, keep - begin, begin).rfind(b"\n")
            keep = begin + newline + 1
        if keep < end:
            logger.warning("%s: its last line is torn (%d bytes); it is dropped and done again", self.path, end - keep)
            os.ftruncate(self._fd, keep)


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, raw line) of the lines that are not blank; the last may be torn."""
    offset = 0
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                yield number, offset, raw
            offset += len(raw)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of each line. Raises UserError naming a line that is not a JSON object."""
    for number, offset, raw in read_lines(path):
        try:
            row = json.loads(raw)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is damaged ({error}); move the file away") from error
        yield offset, row


# ---------------------------------------------------------------------------------------------------------------------
# Whole files


def write_whole(path: Path, write: Callable[[BinaryIO], object], beside: Path | None = None) -> None:
    """Have `write` fill a file beside, fsync, rename: a reader finds the old file or the new one, never half of one.

    beside: where it is written, on the same file system (default: `path` with .tmp). Raises OutputError.
    """
    beside = beside or path.with_name(path.name + ".tmp")
    with output_errors(path):
        try:
            with beside.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def write_text(path: Path, text: str, beside: Path | None = None) -> None:
    """`write_whole` of a text, as UTF-8; a lone surrogate, which UTF-8 has no bytes for, as its escape."""
    write_whole(path, lambda stream: stream.write(text.encode("utf-8", "backslashreplace")), beside)


def write_json(path: Path, value: Any, ensure_ascii: bool = False) -> None:
    """`write_whole` of a value as readable JSON."""
    write_whole(path, lambda stream: stream.write(_to_json(value, ensure_ascii, indent=1) + b"\n"))


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout).encode()
    except UnicodeEncodeError:  # a lone surrogate in a problem's text: all is escaped, so that the file stays UTF-8
        return json.dumps(value, **layout).encode()


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# One process at a time


# What flock answers on a file system that has none: NFS without its lock daemon, Lustre by default, some FUSE ones.
NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(path: Path, busy: str, patience_s: float = 0.0) -> BaseFileLock:
    """Hold the lock file `path`, until `release()` or the end of the process. Keep the returned object.

    On a file system without flock, which is said, a file `path`.pid is there while the lock is held; what a dead process
    of this host has left of it is taken over. busy: what to say where another process holds it for longer than
    `patience_s`. Raises UserError.
    """
    held = FileLock(path, thread_local=False, fallback_to_soft=False)  # any thread may release it
    try:
        held.acquire(timeout=patience_s, poll_interval=0.1)
        return held
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno not in NO_FLOCK:
            raise UserError(f"{path} cannot be made ({reason}); give a place that can be written") from error
    marker = path.with_name(f"{path.name}.pid")  # of its own: `path` stays when it is released, and would look held
    logger.warning("%s: its file system has no locks (flock: %s); the file %s is the lock", path, reason, marker.name)
    return _hold_marker(marker, busy, patience_s)


def _hold_marker(marker: Path, busy: str, patience_s: float) -> BaseFileLock:
    """A lock that is held while its file is there. Raises UserError."""
    held = SoftFileLock(marker, thread_local=False)
    for seconds in (0.0, patience_s):
        try:
            held.acquire(timeout=seconds, poll_interval=0.1)
            return held
        except Timeout:
            _remove_stale(marker)
        except OSError as error:
            raise UserError(f"{marker} cannot be made ({error.strerror}); give a place that can be written") from error
    pid, host = _holder(marker) or ("?", "an unknown host")
    raise UserError(f"{busy} ({marker} is held by process {pid} on {host}; if that is gone, remove the file)")


def _holder(marker: Path) -> tuple[int, str] | None:
    """(process, host) that a lock file names, the host as the library writes it, with a mark of its container."""
    try:
        pid, host, *_ = marker.read_text(encoding="utf-8").splitlines()
        return int(pid), host
    except (OSError, ValueError):
        return None


def _remove_stale(marker: Path) -> None:
    """Remove a lock file whose process was one of this host and is gone.

    The library does so itself where the file system can exchange two names; NFS, where it is needed most, cannot.
    """
    holder = _holder(marker)
    with SoftFileLock(marker.with_name(f"{marker.name}.{os.getpid()}")) as probe:
        here = _holder(Path(probe.lock_file))
    if holder is None or here is None or holder[1] != here[1] or _is_alive(holder[0]):
        return
    aside = marker.with_name(f"{marker.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        marker.rename(aside)
        if _holder(aside) != holder:  # a third process was faster, and this is its lock
            aside.rename(marker)
        aside.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
