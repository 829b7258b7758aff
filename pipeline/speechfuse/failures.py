"""How a job ends when it cannot go on: an error, a disk that refuses to be written, Ctrl-C.

In: the exception that ended it. Out: the sentence for the user, or the end of this process and of
its workers.
"""

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path
from types import FrameType
from typing import NoReturn

DISK = {  # errno of a write that a disk refuses: what it is, and what to do
    errno.ENOSPC: "no space is left: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EFBIG: "the file is larger than the disk allows: choose another disk",
    errno.EROFS: "the disk can only be read: choose another disk",
    errno.EIO: "the disk reports an input/output error: check it or choose another",
    errno.EACCES: "permission denied: give it or choose another folder",
}
# libraries raise errors of their own, with the errno or its name in the text, or without a cause
_NUMBER = re.compile(r"(?:os error|errno:?) (\d+)", re.IGNORECASE)
_NAMES = {os.strerror(code): code for code in DISK}
_CUT_SHORT = re.compile(
    r"\d+ requested and \d+ written|unexpected pos \d+|file write failed|iostream error"
)
_CTRL_C = 128 + signal.SIGINT
_interrupted = threading.Event()


def sentence(error: BaseException) -> str | None:
    """Return what to say of an error that the user can correct; None for a bug in this code."""
    if isinstance(error, ValueError):
        return str(error)
    if code := errno_of(error):
        where = getattr(error, "filename", None) or "a disk that the job writes to"
        return f"{where}: {DISK[code]} and run again; what is finished is kept"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, FileNotFoundError) else None


def errno_of(error: BaseException) -> int | None:
    """Return the errno, a key of DISK, that is behind an error of any library; None where the disk
    has refused nothing."""
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno:
            if each.errno in DISK:
                return each.errno
            continue
        text = str(each)
        if (number := _NUMBER.search(text)) and int(number[1]) in DISK:
            return int(number[1])
        if codes := [code for name, code in _NAMES.items() if name in text]:
            return codes[0]
        if _CUT_SHORT.search(text):
            return errno.ENOSPC
    return None


def close_bars() -> None:
    """End the lines of progress bars that are open, so that what is printed next has its own."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _one_line_of_a_thread(args: threading.ExceptHookArgs) -> None:
    """Say in one line that the disk refused what a library writes in a thread of its own."""
    if args.exc_value and (code := errno_of(args.exc_value)):
        close_bars()
        print(f"warning: a file could not be written: {DISK[code]}", file=sys.stderr)
    else:
        threading.__excepthook__(args)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of the block that a refusing disk has caused, whichever library raised them,
    to an OSError with the errno of the cause and the name `path`."""
    try:
        yield
    except (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise  # the first is a sentence of ours
    except BaseException as error:  # torch's checkpoints raise one that is no Exception
        if code := errno_of(error):
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then those that led to it, those of the ranks of a distributed write too."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if not isinstance(each, BaseException) or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += [each.__cause__, each.__context__]  # type: ignore[list-item]
        waiting += [pair[0] for pair in getattr(each, "failures", {}).values()]


def prepare() -> None:
    """Install how this process is interrupted: the first SIGINT ends the workers and raises
    KeyboardInterrupt, the second ends the process at once, whatever its main thread waits for. A
    thread that cannot write fails with one line. Call it in the main thread."""
    threading.excepthook = _one_line_of_a_thread
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ours already, or ignored by who started the job
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _interrupt)
    os.register_at_fork(after_in_child=_leave_interrupts_to_the_parent)
    threading.Thread(target=_end_at_the_second, args=(read,), daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _interrupted.set()
    _end_workers()
    raise KeyboardInterrupt


def _end_at_the_second(pipe: int) -> None:
    """Count the SIGINTs in a pipe into which Python's own handler writes the number of each
    signal; in this thread, because a main thread inside a library runs no handler."""
    count = 0
    while count < 2:
        count += os.read(pipe, 64).count(signal.SIGINT)
    end()


def _leave_interrupts_to_the_parent() -> None:
    signal.set_wakeup_fd(-1)  # the pipe is the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted() -> bool:
    """Return whether Ctrl-C was pressed: then every error that follows is its result."""
    return _interrupted.is_set()


def _end_workers() -> None:
    """Kill all worker processes: what one writes is whole or not there."""
    with suppress(RuntimeError):  # the main thread starts one at this moment
        for worker in active_children():
            worker.kill()


def end() -> NoReturn:
    """End this process and its workers as Ctrl-C does, without waiting for its threads."""
    _end_workers()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    os._exit(_CTRL_C)


def end_with_parent() -> None:
    """End this process and its workers when the process that started it ends, even if that is
    killed."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        _end_workers()
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
