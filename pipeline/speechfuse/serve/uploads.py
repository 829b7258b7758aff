"""Uploads to waveforms, in child processes: what is sent may be made to break a decoder.

In: the bytes of an audio file. Out: its waveform, float32 mono at 16 kHz. A child has limits of
memory, time and the size of a file, which hold for the ffmpeg that it starts too; it writes into a
folder of its own, that ends with the server. One that breaks or is killed costs its own upload.

    python -m speechfuse.serve.uploads 60     what a child is: longest upload in seconds; by pipes
"""

import asyncio
import os
import resource
import signal
import sys
import tempfile
from contextlib import suppress

import numpy as np

from speechfuse import failures
from speechfuse.audio import decoding

MEMORY = 2 << 30  # bytes of addresses of a child
FILE = 1 << 30  # bytes of a file that it may write
SIZE = 8  # bytes of the length before each message


class Decoders:
    """`count` children that decode at once; `longest`: seconds of an upload; `limit`: seconds that
    decoding may take."""

    def __init__(self, count: int, longest: float, limit: float) -> None:
        self._count, self._longest, self._limit = count, longest, limit
        self._idle: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
        self._folder = tempfile.TemporaryDirectory(prefix="speechfuse-")

    async def start(self) -> None:
        for _ in range(self._count):
            self._idle.put_nowait(await self._child())

    async def _child(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__, str(self._longest)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # so that it is ended with its ffmpeg
            env={**os.environ, "TMPDIR": self._folder.name, "OPENBLAS_NUM_THREADS": "1"},
            limit=1 << 20,
        )

    async def decode(self, content: bytes) -> np.ndarray:
        """Return the waveform. Raises ValueError("kind: detail") for what is no audio, or breaks a
        limit."""
        child = await self._idle.get()
        if child.returncode is not None:  # while it was idle
            child = await self._child()
        whole = False
        try:
            assert child.stdin and child.stdout
            async with asyncio.timeout(self._limit):
                child.stdin.write(len(content).to_bytes(SIZE))
                child.stdin.write(content)
                await child.stdin.drain()
                size = int.from_bytes(await child.stdout.readexactly(SIZE))
                answer = await child.stdout.readexactly(size)
            whole = True
        except TimeoutError:
            raise ValueError(f"too slow: decoding took over {self._limit:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ValueError("not audio: its decoder broke off") from None
        finally:  # also where the client has gone
            if not whole:
                _end(child)
                child = await self._child()
            self._idle.put_nowait(child)
        if answer[:1] == b"-":
            raise ValueError(answer[1:].decode())
        return np.frombuffer(bytearray(answer), np.float32, offset=4)  # one that can be written

    async def close(self) -> None:
        while not self._idle.empty():
            child = self._idle.get_nowait()
            _end(child)
            await child.wait()
        self._folder.cleanup()


def _end(child: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _decoded(content: bytes, longest: float) -> np.ndarray:
    try:
        decoding.decode(content, seconds=longest)  # and no more, of a file without end
    except ValueError as error:
        if str(error).startswith("bad duration"):
            return decoding.decode(content).waveform
        raise
    raise ValueError(f"too long: at most {longest:g} s are taken")


def main(longest: float) -> None:
    failures.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's to hear
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    into, out = sys.stdin.buffer, sys.stdout.buffer
    while size := into.read(SIZE):
        try:
            answer = b"+..." + _decoded(into.read(int.from_bytes(size)), longest).tobytes()
        except (ValueError, MemoryError) as error:
            answer = f"-{error or 'too large to be decoded'}".encode()
        out.write(len(answer).to_bytes(SIZE) + answer)
        out.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
