"""Decoding processes, started when first needed and shared by all that decode in this process.

The decision that is not obvious: each process has a pipe of its own and one job at a time, held by
the thread that asked. A process pool of the standard library fails all its jobs when one process
dies; here it is certain which clip was the last. A process is lent for one job, so loaders that
come and go, or run beside each other, use the same few.

The processes end with this one: they are daemons, which a normal exit terminates, and they notice
by their pipe when this process was killed.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context

from fastomni.data.container import MediaError
from fastomni.data.decoding import Decoded, DecodeJob, serve

# How often a thread that waits for its process looks whether anybody still wants the clip.
STOP_CHECK_S = 0.1
# Time to finish a clip nobody wants any more: ending the process costs the next clip a start.
STOP_GRACE_S = 1.0
# A process whose pipe broke is dying; so long is waited to learn of what.
DEATH_GRACE_S = 1.0
ATTEMPTS = 2


class WorkerStartError(ValueError):
    """No decoding process can be started; the message says why and what to do."""


class DecodingStopped(Exception):
    """The clip is not wanted any more."""


def decode_in_process(job: DecodeJob, stop: threading.Event) -> Decoded:
    """Decode one clip in a process beside this one, while the calling thread waits.

    A process that dies meanwhile is replaced by a fresh one, once: what killed it may have been
    chance (memory was short) or the file (a defect in a decoder).

    Args:
        job: what is to be decoded.
        stop: set when the clip is not wanted any more; the process then gets a second to finish.

    Returns:
        Pictures and sound.

    Raises:
        MediaError: a file is missing or damaged, has no such stream, or ended two processes.
        WorkerStartError: no process can be started.
        DecodingStopped: `stop` was set.
        RuntimeError: a defect of ours, with the traceback of the process.
    """
    end = ""
    for attempt in range(ATTEMPTS):
        if stop.is_set():
            raise DecodingStopped
        with _lent(fresh=attempt > 0) as process:
            try:
                answer = process.ask(job, stop)
            except (EOFError, ConnectionError):
                end = process.end(DEATH_GRACE_S)
                continue
        if isinstance(answer, Decoded):
            return answer
        if isinstance(answer, MediaError):
            raise answer
        raise RuntimeError(f"decoding {job.video or job.audio} failed:\n{answer}")
    raise MediaError(
        job.video or job.audio or "",
        f"decoding it ended {ATTEMPTS} processes, the last by {end}; the file may be damaged or "
        "memory short: encode it again or drop it, or decode with fewer workers",
    )


class _DecodeProcess:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, os.getpid()), name="clips", daemon=True
        )
        self._process.start()
        # Only the process may hold its end, or its death would go unnoticed.
        theirs.close()
        try:
            self._connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerStartError(
                f"a decoding process ended at its start by {self.end(DEATH_GRACE_S)}; its own "
                "message stands above. A script needs `if __name__ == '__main__':` around what it "
                "does; data.workers=0 decodes without processes"
            ) from None
        except BaseException:
            self.end()
            raise

    @property
    def usable(self) -> bool:
        return not self._connection.closed and self._process.is_alive()

    def ask(self, job: DecodeJob, stop: threading.Event) -> object:
        """The answer to one job; an EOFError or ConnectionError when the process dies."""
        self._connection.send(job)
        stopped_at: float | None = None
        while not self._connection.poll(STOP_CHECK_S):
            if not stop.is_set():
                continue
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at >= STOP_GRACE_S:
                raise DecodingStopped
        return self._connection.recv()

    def end(self, grace_s: float = 0.0) -> str:
        """End the process, unless it ends by itself in `grace_s` seconds, and say how it ended."""
        self._connection.close()
        self._process.join(grace_s)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"


_idle: list[_DecodeProcess] = []
if hasattr(os, "register_at_fork"):
    # A forked copy of this process must not talk to the processes of the original.
    os.register_at_fork(after_in_child=_idle.clear)


@contextmanager
def _lent(fresh: bool) -> Iterator[_DecodeProcess]:
    """A process for one job: one that idles, or a new one. Kept if it can be used again."""
    process = None
    while not fresh and process is None:
        try:
            process = _idle.pop()  # one operation, so that no lock is needed
        except IndexError:
            break
        if not process.usable:
            process.end()
            process = None
    if process is None:
        process = _DecodeProcess()
    try:
        yield process
    except BaseException:
        # Its answer, if it comes at all, would be taken for that of the next job.
        process.end()
        raise
    if process.usable:
        _idle.append(process)
