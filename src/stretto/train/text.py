"""Text files as an endless stream of packed documents, the same for any number of ranks.

A token is a byte, or END, which opens every document and closes the one before it. What stands at
which place of the stream is a function of the seed alone, so a step number is a complete cursor.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stretto.errors import ConfigError

#: The token between documents; bytes are 0 .. 255.
END = 256
#: Rows of an embedding for these tokens: a multiple of 8, as tensor cores like it.
VOCABULARY = 264
#: One file in this many is held out; of fewer files, one part in this many of each.
HELD_OUT = 20
#: Folders that a corpus leaves out: installed packages, caches, files made to be odd.
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "node_modules"}
#: Key of the order of held-out text, which no seed reaches.
_HELD_OUT_ORDER = 2**63


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes `begin` to `end` of a file."""

    path: Path
    begin: int
    end: int

    @property
    def tokens(self) -> int:
        """Its bytes and the END before them."""
        return self.end - self.begin + 1

    def read(self, first: int, last: int) -> np.ndarray:
        """(last - first,) int64: its tokens `first` to `last`; of the file only their bytes.

        Raises ConfigError when the file has become shorter or is gone.
        """
        begin, end = self.begin + max(first - 1, 0), self.begin + last - 1
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(begin)
                content = file.read(max(end - begin, 0))
        except OSError as error:
            raise ConfigError(f"cannot read {self.path}: {error.strerror}") from None
        if size < self.end:
            raise ConfigError(
                f"{self.path} has {size} bytes, and had {self.end} when "
                "training began: the order of the data would change\n"
                "  to fix: train on files that nothing else writes"
            )
        opening = np.full(int(first == 0 < last), END, dtype=np.int64)
        return np.concatenate([opening, np.frombuffer(content, dtype=np.uint8)])


@dataclass(frozen=True, slots=True)
class Packed:
    """Consecutive tokens cut from the stream.

    tokens, labels, positions: (N,) int64; a label is the token that follows, a position counts
    within the document. `documents`: lengths that sum to N.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    documents: tuple[int, ...]


class Stream:
    """The documents of a split laid end to end and cut into sequences, anew in every epoch.

    In each epoch the documents are shuffled, then the sequences, so that those of one step come
    from all over the corpus. `seed` None is the one order of held-out text.
    """

    def __init__(self, documents: list[Document], seed: int | None):
        self.documents = documents
        self._seed = seed
        self._lengths = np.array([document.tokens for document in documents], dtype=np.int64)
        #: Tokens of one epoch.
        self.tokens = int(self._lengths.sum())
        self._laid: tuple[int, np.ndarray, np.ndarray] | None = None
        self._dealt: tuple[int, int, np.ndarray] | None = None

    def packed(self, number: int, tokens: int, count: int = 1) -> Packed:
        """Sequences `number` to `number + count`, of `tokens` each, laid end to end.

        A document never crosses the edge of a sequence, so how many are laid together changes
        nothing about what a token sees.
        """
        cuts = [self._sequence(number + index, tokens) for index in range(count)]
        starts = np.concatenate(
            [_starts(cut[:-1]) + index * tokens for index, cut in enumerate(cuts)]
        )
        lengths = np.diff(starts, append=count * tokens)
        positions = np.arange(count * tokens) - np.repeat(starts, lengths)
        return Packed(
            torch.from_numpy(np.concatenate([cut[:-1] for cut in cuts])),
            torch.from_numpy(np.concatenate([cut[1:] for cut in cuts])),
            torch.from_numpy(positions),
            tuple(map(int, lengths)),
        )

    def _sequence(self, number: int, tokens: int) -> np.ndarray:
        """(tokens + 1,): a sequence and the token after it."""
        each = max(1, self.tokens // tokens)
        epoch, turn = divmod(number, each)
        place = int(self._places(epoch, each)[turn])
        return self._slice(epoch, place * tokens, (place + 1) * tokens + 1)

    def _places(self, epoch: int, each: int) -> np.ndarray:
        """Which of the `each` sequences of an epoch comes when."""
        if self._dealt is None or self._dealt[:2] != (epoch, each):
            self._dealt = (epoch, each, self._shuffled(each, 2 * epoch + 1))
        return self._dealt[2]

    def _slice(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Tokens `begin` to `end` of an epoch, which starts over where it ends."""
        parts = []
        while begin < end:
            inside = begin % self.tokens
            length = min(end - begin, self.tokens - inside)
            parts.append(self._within(epoch, inside, inside + length))
            begin += length
        return np.concatenate(parts)

    def _within(self, epoch: int, begin: int, end: int) -> np.ndarray:
        order, ends = self._order(epoch)
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, end, side="left"))
        parts = []
        for index, stop in zip(order[first : last + 1], ends[first : last + 1], strict=True):
            start = int(stop - self._lengths[index])
            inside = max(begin - start, 0), min(end, int(stop)) - start
            parts.append(self.documents[index].read(*inside))
        return np.concatenate(parts)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of an epoch in order, and where in the epoch each ends."""
        if self._laid is None or self._laid[0] != epoch:
            order = self._shuffled(len(self.documents), 2 * epoch)
            self._laid = (epoch, order, np.cumsum(self._lengths[order]))
        return self._laid[1:]

    def _shuffled(self, count: int, which: int) -> np.ndarray:
        """An order of `count` things. Philox by key is the same in every numpy."""
        key = [_HELD_OUT_ORDER, 0] if self._seed is None else [self._seed, which]
        return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text split in two. `digest` names files, sizes and split, not what is in the files."""

    source: str
    train: list[Document]
    held_out: list[Document]
    digest: str

    def stream(self, seed: int) -> Stream:
        return Stream(self.train, seed)

    def held_out_stream(self) -> Stream:
        return Stream(self.held_out, None)


def open_corpus(source: str | None, *, tokens: int = 1) -> Corpus:
    """The text below a folder, or in a file; None is the installed standard library's sources.

    A file whose first kilobyte holds a zero byte is no text. Raises ConfigError: no such place,
    less text there than two tokens on each side of the split, or than a sequence of `tokens`.
    """
    root = Path(source or sysconfig.get_paths()["stdlib"])
    pattern = "*" if source else "*.py"
    if not root.exists():
        raise ConfigError(f"no file or folder {root}: --data takes text, one file per document")
    files = [root] if root.is_file() else list(_files(root, pattern))
    sizes = {file: size for file in files if (size := file.stat().st_size)}
    train, held_out = _split(root, sizes)
    if sum(d.tokens for d in train) < 2 or not held_out:
        raise ConfigError(
            f"{root} holds {len(sizes)} text file(s) of {sum(sizes.values())} bytes in all: too "
            f"little to hold out one part in {HELD_OUT}; give more text"
        )
    there = sum(d.tokens for d in train)
    if tokens > there:
        raise ConfigError(
            f"a sequence of {tokens} tokens, and {root} holds {there} to train on\n"
            "  why: it would hold the same text several times, to be copied and not learnt\n"
            f"  to fix: --tokens {there} or fewer, or more text"
        )
    named = [(str(d.path.relative_to(root)), d.begin, d.end) for d in (*train, *held_out)]
    digest = hashlib.sha256(repr((named, len(train))).encode()).hexdigest()[:16]
    return Corpus(str(root), train, held_out, digest)


def _files(root: Path, pattern: str) -> Iterator[Path]:
    """Text files below a folder in the order of their paths; hidden ones are left out."""
    for file in sorted(root.rglob(pattern)):
        inner = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in inner)
        if not hidden and not _SKIPPED & set(inner[:-1]) and file.is_file() and _is_text(file):
            yield file


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return b"\0" not in opened.read(1024)
    except OSError:
        return False


def _split(root: Path, sizes: dict[Path, int]) -> tuple[list[Document], list[Document]]:
    """Whole files held out where there are many, else the end of each."""
    train, held_out = [], []
    for file, size in sizes.items():
        cut = size - size // HELD_OUT
        if len(sizes) >= 2 * HELD_OUT:
            name = str(file.relative_to(root)).encode()
            rest = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % HELD_OUT
            cut = 0 if rest == 0 else size
        if cut:
            train.append(Document(file, 0, cut))
        if cut < size:
            held_out.append(Document(file, cut, size))
    return train, held_out


def _starts(sequence: np.ndarray) -> np.ndarray:
    """Where documents begin: at the edge, and at every END."""
    begins = sequence == END
    begins[0] = True
    return np.flatnonzero(begins)
