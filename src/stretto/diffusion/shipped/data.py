"""Training pictures for the shipped models, from files that need no hub."""

from __future__ import annotations

import gzip
import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from stretto.errors import ConfigError

# Where the Debian package puts its files.
FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
FASHION_SOURCE = (
    "Fashion-MNIST training set (60000 pictures, MIT licence, "
    "https://github.com/zalandoresearch/fashion-mnist), as in Debian package "
    "dataset-fashion-mnist 0.0~git20200523.55506a9-1"
)
# The first four bytes of an idx file: two zeros, 08 for unsigned bytes, the number of dims.
IDX_BYTES_TYPE = 0x08


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures: images (n, 1, S, S) float32 in [-1, 1], labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor
    source: str
    sha256: str

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.images.shape[-1]


def load(name: str, folder: Path | None = None) -> Pictures:
    """Training pictures by name: "fashion" (28 x 28) or "digits" (16 x 16), 10 classes each.

    folder holds the idx .gz files of fashion, by default where Debian's package puts them.
    Raises ConfigError for an unknown name, a missing or damaged file, or no scikit-learn.
    """
    if name == "fashion":
        return fashion(folder or FASHION_DIR)
    if name == "digits":
        return digits()
    raise ConfigError(f"no data set {name!r}: choose fashion or digits")


def fashion(folder: Path) -> Pictures:
    """Fashion-MNIST's training set from folder's idx .gz files; sha256 is of the picture file."""
    image_file = folder / "train-images-idx3-ubyte.gz"
    label_file = folder / "train-labels-idx1-ubyte.gz"
    images, labels = read_idx(image_file), read_idx(label_file)
    if len(images) != len(labels):
        raise ConfigError(
            f"{len(images)} pictures in {image_file} and {len(labels)} labels in {label_file}: "
            "the two files belong to different sets; copy both from one source"
        )
    digest = hashlib.sha256(image_file.read_bytes()).hexdigest()
    return Pictures(normalised(images[:, None], 255.0), labels.long(), FASHION_SOURCE, digest)


def digits() -> Pictures:
    """scikit-learn's 1797 handwritten digits, 8 x 8 resized to 16 x 16 bilinearly."""
    try:
        from sklearn import __version__, datasets
    except ImportError:
        raise ConfigError(
            "data set digits comes with scikit-learn, which is not installed: "
            "pip install scikit-learn, or take fashion"
        ) from None
    raw = datasets.load_digits()
    small = torch.as_tensor(raw.images, dtype=torch.float32)[:, None]
    images = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")
    return Pictures(
        normalised(images, 16.0),
        torch.as_tensor(raw.target).long(),
        f"load_digits of scikit-learn {__version__}, resized to 16 x 16",
        hashlib.sha256(raw.images.tobytes()).hexdigest(),
    )


def normalised(images: torch.Tensor, maximum: float) -> torch.Tensor:
    """Map [0, maximum] to [-1, 1], float32."""
    return images.float() / (maximum / 2) - 1


def read_idx(file: Path) -> torch.Tensor:
    """Array of unsigned bytes in a gzipped idx file, in the shape its header declares.

    Raises ConfigError when the file is missing, of another type, or shorter or longer than
    declared. Source of the format: the MNIST page of Yann LeCun.
    """
    if not file.is_file():
        raise ConfigError(
            f"no file {file}: fashion needs the Fashion-MNIST idx files; install Debian's "
            "dataset-fashion-mnist, or pass the folder that holds them (--data-dir)"
        )
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ConfigError(f"{file} is no intact gzip file ({error}): copy it again") from None
    if len(content) < 4 or content[:3] != bytes((0, 0, IDX_BYTES_TYPE)):
        raise ConfigError(
            f"{file} starts with {content[:4].hex()}: an idx file of bytes starts with 000008; "
            "copy it again"
        )
    return _idx_body(content, file)


def _idx_body(content: bytes, file: Path) -> torch.Tensor:
    dims = content[3]
    start = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", content[4:start]) if len(content) >= start else ()
    expected = start + int(torch.tensor(shape, dtype=torch.int64).prod())
    if not shape or len(content) != expected:
        raise ConfigError(
            f"{file} holds {len(content)} bytes, its header declares {expected} for shape "
            f"{shape}: copy it again"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
