"""One lock for all that two processes may not do at once: write one artifact, one cache, one cell.

In: a folder. Out: whether this process is alone in it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def exclusive_lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keep other processes out of the `with` block, and yield True.

    While another process is inside, wait for it or, without `wait`, yield False. The lock ends with
    the process, even if that is killed. Creates the folder and a file .lock in it. Raises
    ValueError where the file system has no locks.
    """
    inside = None
    while inside is None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            inside = _acquired(file, wait)
            if inside is not None:
                yield inside


def _acquired(file: TextIO, wait: bool) -> bool | None:
    """Lock an open file. Returns False where another process has it, and None where that one has
    removed or moved the file before it let go."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)) or None
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{file.name} cannot be locked ({error.strerror}), and without a lock two jobs could "
            "write into one folder: choose a folder on another disk, or mount this one with locks "
            "(Lustre: -o flock; NFS: a server with lockd, without -o nolock)"
        ) from error
