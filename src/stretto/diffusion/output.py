"""What a generation leaves on disk: pictures, clips, sounds and the result file.

Everything is written into a folder aside and moved into place by renaming when all of it is
complete, so a failure leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import wave
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stretto.errors import ConfigError

#: Small pictures are enlarged in sheets, by whole factors, until their width reaches this.
_VISIBLE_PIXELS = 84
_LABEL_PIXELS = 150


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """Generated items. `items` is float32 with the items in dim 0.

    image: (B, H, W, C) in [0, 1]; video: (B, F, H, W, C) in [0, 1]; audio: (B, samples, channels)
    in [-1, 1]. `rate`: frames or samples per second, 0 for images.
    """

    kind: Literal["image", "video", "audio"]
    items: np.ndarray
    rate: int = 0


def check_writable(out: Path) -> None:
    """Make the folder if need be and try to write in it; what was made here is gone again.

    So a process that is killed while it computes leaves no empty folder. Raises ConfigError,
    so that this is known before anything is computed.
    """
    # Unlike Path.exists, False for a name that is too long; making it then says so.
    made = [place for place in (out, *out.parents) if not os.path.exists(place)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".stretto-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write into {out}: {error.strerror}\n"
            "  to fix: give another folder with --out, or mend its permissions"
        ) from None
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder inside `out` for files that move into `out` together when the block succeeds.

    `out` is made where it is missing. Raises ConfigError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=out, prefix=".partial-"))
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}") from error
    try:
        yield aside
        files = sorted(aside.iterdir())
        # Before the first of them moves: the others would be left out.
        taken = [file.name for file in files if (out / file.name).is_dir()]
        if taken:
            raise ConfigError(
                f"cannot write into {out}: {', '.join(taken)} there is a folder\n"
                "  to fix: give another folder with --out, or move that one away"
            )
        for file in files:
            file.chmod(0o666 & ~_umask())
            file.replace(out / file.name)
    except OSError as error:
        raise ConfigError(f"cannot write into {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_media(folder: Path, media: Media) -> list[str]:
    """One file per item, and for several pictures a sheet `grid.png`; the names written."""
    if media.kind == "image":
        names = []
        for index, picture in enumerate(media.items):
            names.append(f"{index:03d}.png")
            _picture(picture).save(folder / names[-1])
        if len(media.items) > 1:
            columns = math.ceil(math.sqrt(len(media.items)))
            rows = [media.items[i : i + columns] for i in range(0, len(media.items), columns)]
            _sheet([("", row) for row in rows]).save(folder / "grid.png")
            names.append("grid.png")
        return names
    write = _write_clip if media.kind == "video" else _write_sound
    return [write(folder, f"{i:03d}", item, media.rate) for i, item in enumerate(media.items)]


def write_comparison(folder: Path, rows: Sequence[tuple[str, Media]]) -> list[str]:
    """`compare.png`: a row per method, a column per item (of clips the middle frame)."""
    if not rows or rows[0][1].kind == "audio":
        return []
    pictures = [
        (label, m.items if m.kind == "image" else m.items[:, m.items.shape[1] // 2])
        for label, m in rows
    ]
    _sheet(pictures).save(folder / "compare.png")
    return ["compare.png"]


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """The result as JSON; what is not finite becomes null, since JSON has no such number."""
    file.write_text(json.dumps(finite(result), indent=1) + "\n")


def finite(value: Any) -> Any:
    """The same data with None for infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return (values.clip(0.0, 1.0) * 255).round().astype(np.uint8)


def _picture(values_HWC: np.ndarray):
    from PIL import Image

    pixels = _bytes_of(values_HWC)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _sheet(rows: Sequence[tuple[str, np.ndarray]]):
    """Pictures of one size in rows, with a label before each row if there are labels."""
    from PIL import Image, ImageDraw

    height, width = rows[0][1].shape[1:3]
    scale, gap = max(1, _VISIBLE_PIXELS // width), 2
    high, wide = height * scale + gap, width * scale + gap
    left = _LABEL_PIXELS if any(label for label, _ in rows) else 0
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (left + columns * wide + gap, len(rows) * high + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (label, pictures) in enumerate(rows):
        draw.multiline_text((4, y * high + gap), label, fill="black")
        for x, picture in enumerate(pictures):
            shown = _picture(picture).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            sheet.paste(shown.convert("RGB"), (left + x * wide + gap, y * high + gap))
    return sheet


def _write_clip(folder: Path, stem: str, frames_FHWC: np.ndarray, rate: int) -> str:
    """MP4 where ffmpeg is there, else GIF; the name written."""
    pixels = _bytes_of(frames_FHWC)
    pixels = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return _write_gif(folder, stem, pixels, rate)
    # The usual pixel format halves the colour planes, so both sides must be even.
    pad = [(0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)]
    pixels = np.pad(pixels, pad, mode="edge")
    name, size = f"{stem}.mp4", (pixels.shape[2], pixels.shape[1])
    options = {"fps": rate, "macro_block_size": 2, "ffmpeg_log_level": "error"}
    writer = imageio_ffmpeg.write_frames(str(folder / name), size, **options)
    writer.send(None)
    for frame in pixels:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return name


def _write_gif(folder: Path, stem: str, pixels: np.ndarray, rate: int) -> str:
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in pixels]
    name = f"{stem}.gif"
    first.save(
        folder / name, save_all=True, append_images=rest, duration=round(1000 / rate), loop=0
    )
    return name


def _write_sound(folder: Path, stem: str, samples_TC: np.ndarray, rate: int) -> str:
    """16-bit WAV."""
    name = f"{stem}.wav"
    values = (samples_TC.clip(-1.0, 1.0) * 32767).round().astype("<i2")
    with wave.open(str(folder / name), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return name
