"""Decoding processes: what they give, how they die, and that none outlives whoever needs it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

from fastomni.data import decoding, workers
from fastomni.data.clips import Clip, ClipError, ClipLoader
from fastomni.data.container import MediaError
from fastomni.data.decoding import Decoded, DecodeJob, decode, serve
from fastomni.data.manifest import ManifestRow
from fastomni.data.preprocess import Preprocessing
from fastomni.data.workers import DecodingStopped, decode_in_process

MakeClip = Callable[..., Path]
TINY = Preprocessing(4, 32, "pad", (0.5,) * 3, (0.5,) * 3, mel_bins=16, audio_positions=50)
NEVER = threading.Event()


def job(path: Path) -> DecodeJob:
    return DecodeJob(path, path, 4, 32, True, 16000, 16000)


def row(name: str, video: Path) -> ManifestRow:
    return ManifestRow(name, video, None, None, "sad")


def processes() -> list[BaseProcess]:
    return [child for child in multiprocessing.active_children() if child.name == "clips"]


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def good(make_clip: MakeClip) -> Path:
    return make_clip("good.mp4")


@pytest.fixture(autouse=True)
def own_processes() -> Iterator[None]:
    """Every test starts and ends without a decoding process."""
    end_all()
    yield
    end_all()


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes die of clips named "deadly...", and of those named "once..." the first time."""
    deaths: list[int] = []
    ask = workers._DecodeProcess.ask

    def asked(self: workers._DecodeProcess, job: DecodeJob, stop: threading.Event) -> object:
        name = job.video.name if job.video else ""
        if name.startswith("deadly") or (name.startswith("once") and not deaths):
            assert self._process.pid is not None
            os.kill(self._process.pid, signal.SIGKILL)
            deaths.append(self._process.pid)
        return ask(self, job, stop)

    monkeypatch.setattr(workers._DecodeProcess, "ask", asked)
    return deaths


def end_all() -> None:
    while workers._idle:
        workers._idle.pop().end()
    assert processes() == []


def same(one: Clip, other: Clip) -> bool:
    assert one.pictures is not None and other.pictures is not None
    assert one.mel is not None and other.mel is not None
    return torch.equal(one.pictures, other.pictures) and torch.equal(one.mel, other.mel)


def script(code: str, environment: dict[str, str], path: Path) -> subprocess.Popen[str]:
    path.write_text(dedent(code), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, str(path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_give_bit_for_bit_what_the_caller_decodes(make_clip: MakeClip) -> None:
    files = [
        make_clip("a.mp4"),
        make_clip("b.mp4", frames=3, sound_s=0.3),
        make_clip("c.webm", frames=9, sound_s=0.5, codec="libvpx-vp9"),
    ]
    rows = [row(str(i), files[i % 3]) for i in range(24)]
    order = np.random.default_rng(0).permutation(24).tolist()
    plan = [order[start : start + 5] for start in range(0, 24, 5)]
    alone = list(ClipLoader(rows, TINY, 0).batches(plan))
    beside = list(ClipLoader(rows, TINY, 2).batches(plan))
    assert [[clip.row for clip in batch] for batch in beside] == [
        [rows[i] for i in batch] for batch in plan
    ]
    for one, other in zip(alone, beside, strict=True):
        assert all(same(a, b) for a, b in zip(one, other, strict=True))


def test_loaders_share_the_processes(good: Path) -> None:
    seen = set()
    for _ in range(3):
        list(ClipLoader([row("a", good)], TINY, 2).batches([[0] * 4] * 3))
        seen |= {process.pid for process in processes()}
        assert len(workers._idle) == len(processes())
    assert 1 <= len(seen) <= 2


def test_a_process_needs_no_torch(python_environment: dict[str, str]) -> None:
    code = "import sys, fastomni.data.workers; print([n for n in sys.modules if 'torch' in n])"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, env=python_environment, text=True) == "[]\n"


def test_a_bad_file_is_told_as_by_the_caller(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.mp4"
    wrong.write_bytes(b"no media" * 100)
    with pytest.raises(MediaError) as here:
        decode(job(wrong))
    with pytest.raises(MediaError) as there:
        decode_in_process(job(wrong), NEVER)
    assert str(there.value) == str(here.value)
    assert len(workers._idle) == 1


def test_a_defect_of_ours_comes_with_its_traceback(good: Path) -> None:
    wrong = DecodeJob(good, None, 0, 32, True, 16000, 16000)
    with pytest.raises(RuntimeError, match=r"(?s)good.mp4 failed:.*ValueError: cannot choose 0"):
        decode_in_process(wrong, NEVER)


def test_a_process_killed_while_it_idles_is_replaced(good: Path) -> None:
    decode_in_process(job(good), NEVER)
    (process,) = processes()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    assert isinstance(decode_in_process(job(good), NEVER), Decoded)
    (other,) = processes()
    assert other.pid != process.pid


def test_a_process_killed_at_work_is_replaced_once(make_clip: MakeClip, deadly: list[int]) -> None:
    files = [make_clip("good.mp4"), make_clip("once.mp4")]
    rows = [row("good", files[0]), row("once", files[1])]
    (batch,) = ClipLoader(rows, TINY, 2).batches([[0, 1, 0]])
    assert [clip.row.id for clip in batch] == ["good", "once", "good"]
    assert len(deadly) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_clip_that_kills_twice_is_named(
    make_clip: MakeClip, deadly: list[int], count: int
) -> None:
    rows = [row("good", make_clip("good.mp4")), row("bad", make_clip("deadly.mp4"))]
    with pytest.raises(
        ClipError, match=r"row 'bad': .*deadly.mp4: .*2 processes, .* signal SIGKILL; .*drop it"
    ):
        list(ClipLoader(rows, TINY, count).batches([[0, 0], [0, 1], [0]]))
    assert len(deadly) == 2
    loader = ClipLoader(rows, TINY, count, on_error="skip")
    batches = list(loader.batches([[0, 0], [0, 1], [0]]))
    names = [[clip.row.id for clip in batch] for batch in batches]
    assert names == [["good", "good"], ["good"], ["good"]]
    assert list(loader.skipped) == ["bad"]


@pytest.fixture
def stuck(good: Path) -> int:
    """Number of an idle process that neither answers nor dies: it is stopped."""
    decode_in_process(job(good), NEVER)
    (process,) = processes()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    return process.pid


def test_ctrl_c_ends_a_stuck_process(good: Path, stuck: int) -> None:
    main = threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(ClipLoader([row("a", good)], TINY, 2).batches([[0]] * 50))
    assert time.monotonic() - begin < 10
    assert gone(stuck)
    assert len(workers._idle) == len(processes()) <= 2


def test_a_clip_nobody_wants_is_given_up(good: Path, stuck: int) -> None:
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(DecodingStopped):
        decode_in_process(job(good), stop)
    assert 0.2 + workers.STOP_GRACE_S <= time.monotonic() - begin < 10
    assert gone(stuck)
    with pytest.raises(DecodingStopped):
        decode_in_process(job(good), stop)
    assert workers._idle == processes() == []


def test_closing_keeps_processes_that_finish(good: Path) -> None:
    with closing(ClipLoader([row("a", good)], TINY, 2).batches([[0] * 9] * 9)) as batches:
        next(batches)
        before = {process.pid for process in processes()}
    assert before == {process.pid for process in processes()}
    assert len(workers._idle) == len(before)


def test_a_process_ignores_ctrl_c(good: Path) -> None:
    decode_in_process(job(good), NEVER)
    (process,) = processes()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    decode_in_process(job(good), NEVER)
    assert [other.pid for other in processes()] == [process.pid]


def test_a_process_ends_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pipe stays open, because a fork of the parent holds it, the number tells."""
    monkeypatch.setattr(decoding, "PARENT_CHECK_S", 0.01)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        serve(theirs, parent=-1)
        assert ours.recv() is None
        assert not ours.poll()


PARENT = """
    import os, sys, threading, time
    from pathlib import Path
    from fastomni.data import workers
    from fastomni.data.decoding import DecodeJob

    if __name__ == "__main__":
        clip = Path({clip!r})
        job = DecodeJob(clip, clip, 4, 32, True, 16000, 16000)
        workers.decode_in_process(job, threading.Event())
        print(workers._idle[0]._process.pid, flush=True)
"""


@pytest.mark.parametrize("end", ["exit", "error", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_its_parent(
    good: Path, tmp_path: Path, python_environment: dict[str, str], end: str
) -> None:
    last = {"exit": "", "error": "        raise KeyError\n"}.get(end, "        time.sleep(60)\n")
    parent = script(PARENT.format(clip=str(good)) + last, python_environment, tmp_path / "main.py")
    with parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        if end.startswith("SIG"):
            parent.send_signal(signal.Signals[end])
        _, errors = parent.communicate(timeout=20)
    expected = {"exit": 0, "error": 1, "SIGTERM": -signal.SIGTERM, "SIGKILL": -signal.SIGKILL}
    assert parent.returncode == expected[end], errors
    assert gone(int(line))


def test_an_iterator_left_open_does_not_hold_up_the_exit(
    good: Path, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    code = f"""
        from pathlib import Path
        from fastomni.data.clips import ClipLoader
        from fastomni.data.manifest import ManifestRow
        from fastomni.data.preprocess import Preprocessing

        if __name__ == "__main__":
            half = (0.5,) * 3
            tiny = Preprocessing(4, 32, "pad", half, half, mel_bins=16, audio_positions=50)
            rows = [ManifestRow("a", Path({str(good)!r}), None, None, "sad")]
            batches = ClipLoader(rows, tiny, 2).batches([[0] * 4] * 1000)
            print(len(next(batches)), flush=True)
    """
    with script(code, python_environment, tmp_path / "main.py") as parent:
        printed, errors = parent.communicate(timeout=40)
    assert (parent.returncode, printed) == (0, "4\n"), errors
    assert errors == ""


def test_a_fork_starts_processes_of_its_own(
    good: Path, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    after = """
        child = os.fork()
        if child == 0:
            assert workers._idle == []
            workers.decode_in_process(job, threading.Event())
            print(workers._idle[0]._process.pid, flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        workers.decode_in_process(job, threading.Event())
        print(workers._idle[0]._process.pid, flush=True)
    """
    code = (
        dedent(PARENT.format(clip=str(good)))
        + "    "
        + dedent(after).strip().replace("\n", "\n    ")
    )
    with script(code + "\n", python_environment, tmp_path / "main.py") as parent:
        printed, errors = parent.communicate(timeout=20)
    assert parent.returncode == 0, errors
    first, forked, again = printed.split()
    assert first == again != forked
    assert gone(int(forked)) and gone(int(first))


def test_a_script_without_a_guard_is_told_so(
    good: Path, tmp_path: Path, python_environment: dict[str, str]
) -> None:
    code = PARENT.format(clip=str(good)).replace('if __name__ == "__main__":', "if True:")
    with script(code, python_environment, tmp_path / "main.py") as parent:
        _, errors = parent.communicate(timeout=20)
    assert parent.returncode == 1
    assert "WorkerStartError: a decoding process ended at its start by exit status 1" in errors
    assert "needs `if __name__ == '__main__':`" in errors
