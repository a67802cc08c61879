"""Clips made on the spot, so that tests know what is in them."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

MakeClip = Callable[..., Path]


def _write_clip(
    path: Path,
    frames: int = 12,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    sound_s: float = 1.0,
    sampling_rate: int = 16000,
) -> Path:
    """Write grey frames of brightness 20 + 8 * index, 12 a second, and a 440 Hz tone.

    The left third of every frame is black, which tells how a picture is turned.
    """
    width, height = size
    with av.open(str(path), "w") as container:
        video: VideoStream | None = None
        sound: AudioStream | None = None
        if frames:
            video = cast(VideoStream, container.add_stream(codec, rate=12))
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        if sound_s:
            name = "libopus" if path.suffix == ".webm" else "aac"
            sound = cast(AudioStream, container.add_stream(name, rate=sampling_rate, layout="mono"))
        for index in range(frames):
            picture = np.full((height, width, 3), 20 + 8 * index, np.uint8)
            picture[:, : width // 3] = 0
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = Fraction(1, 12)
            assert video is not None
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if sound is not None:
            time = np.arange(int(sound_s * sampling_rate)) / sampling_rate
            tone = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)[None]
            heard = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            heard.sample_rate = sampling_rate
            container.mux(sound.encode(heard))
            container.mux(sound.encode(None))
    return path


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """A function that writes a clip of this name into the test's folder."""

    def make(name: str = "clip.mp4", **settings: object) -> Path:
        return _write_clip(tmp_path / name, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def media_folder() -> Path:
    """Folder of the media files and golden values; its README says where they come from."""
    return Path(__file__).parent / "media"
