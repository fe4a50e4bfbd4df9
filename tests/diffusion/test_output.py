"""Files come whole or not at all, and hold what was generated."""

import json
import math
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from stretto.diffusion.output import (
    Media,
    check_writable,
    staged,
    write_comparison,
    write_media,
    write_result,
)
from stretto.errors import ConfigError


def gradient(*shape):
    return np.linspace(0, 1, math.prod(shape), dtype=np.float32).reshape(shape)


def test_pictures_keep_their_values(tmp_path):
    items = gradient(3, 4, 6, 1)
    names = write_media(tmp_path, Media("image", items))
    assert names == ["000.png", "001.png", "002.png", "grid.png"]
    for index, item in enumerate(items):
        pixels = np.asarray(Image.open(tmp_path / f"{index:03d}.png"))
        assert np.array_equal(pixels, (item[..., 0] * 255).round().astype(np.uint8))


def test_a_single_picture_needs_no_grid(tmp_path):
    assert write_media(tmp_path, Media("image", gradient(1, 4, 4, 3))) == ["000.png"]
    assert Image.open(tmp_path / "000.png").mode == "RGB"


def test_comparison_has_a_row_per_method_and_a_column_per_item(tmp_path):
    dark, light = np.zeros((2, 28, 28, 1)), np.ones((2, 28, 28, 1))
    rows = [("sequential", Media("image", dark)), ("ours", Media("image", light))]
    assert write_comparison(tmp_path, rows) == ["compare.png"]
    sheet = Image.open(tmp_path / "compare.png").convert("L")
    half = sheet.height // 4
    at = [(sheet.width - x, y) for y in (half, 3 * half) for x in (40, 120)]
    assert [sheet.getpixel(place) for place in at] == [0, 0, 255, 255]


def test_comparison_of_sounds_has_no_picture(tmp_path):
    sound = Media("audio", np.zeros((1, 8, 1), np.float32), 8000)
    assert write_comparison(tmp_path, [("ours", sound)]) == []


def test_wav_holds_the_samples(tmp_path):
    samples = np.array([[[0.0, 1.0], [-1.0, 0.5]]], np.float32)
    assert write_media(tmp_path, Media("audio", samples, 16000)) == ["000.wav"]
    with wave.open(str(tmp_path / "000.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 2)
        found = np.frombuffer(file.readframes(2), "<i2")
    assert found.tolist() == [0, 32767, -32767, 16384]


def test_video_of_odd_size_is_padded_and_readable(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    assert write_media(tmp_path, Media("video", gradient(1, 5, 17, 33, 3), 8)) == ["000.mp4"]
    facts = next(imageio_ffmpeg.read_frames(str(tmp_path / "000.mp4")))
    assert facts["size"] == (34, 18)
    assert facts["fps"] == 8


def test_video_without_ffmpeg_is_a_gif(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert write_media(tmp_path, Media("video", gradient(1, 5, 16, 16, 3), 8)) == ["000.gif"]
    assert Image.open(tmp_path / "000.gif").n_frames == 5


def test_result_has_null_for_what_json_cannot_say(tmp_path):
    write_result(tmp_path / "r.json", {"a": math.inf, "b": [1.5, math.nan], "c": {"d": 2}})
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": 2},
    }


def test_a_failure_leaves_nothing(tmp_path):
    def write_and_fail():
        with staged(tmp_path) as aside:
            (aside / "half.png").write_bytes(b"x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_leaves_older_files_as_they_are(tmp_path):
    (tmp_path / "001.png").mkdir()
    (tmp_path / "000.png").write_text("older")
    newer = Media("image", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ConfigError, match=r"001\.png there is a folder"), staged(tmp_path) as aside:
        write_media(aside, newer)
    assert (tmp_path / "000.png").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 2


def test_success_replaces_older_files(tmp_path):
    (tmp_path / "a").write_text("old")
    with staged(tmp_path) as aside:
        (aside / "a").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("a", "new")]


def test_looking_makes_no_folder_and_writing_does(tmp_path):
    """So a process that is killed before it has something to write leaves nothing."""
    check_writable(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path / "new" / "deep") as aside:
        (aside / "a").write_text("")
    assert [file.name for file in (tmp_path / "new" / "deep").iterdir()] == ["a"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write into .*taken"):
        check_writable(tmp_path / "taken" / "out")
