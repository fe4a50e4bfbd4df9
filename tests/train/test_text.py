"""Text: the stream is documents and nothing else, in an order that seed and number decide."""

import numpy as np
import pytest
import torch

from stretto.errors import ConfigError
from stretto.train.text import END, Document, Stream, open_corpus
from tests.train.make import write_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(write_text(tmp_path_factory.mktemp("text")))


def laid(corpus):
    """The first epoch of seed 0 as one array, from the documents themselves."""
    order, _ = corpus.stream(0)._order(0)
    parts = [[END, *corpus.train[i].path.read_bytes()] for i in order]
    return np.concatenate([*parts, *parts])


def test_an_epoch_shows_every_whole_sequence_once(corpus):
    stream, whole = corpus.stream(0), laid(corpus)
    count = stream.tokens // 64
    seen = sorted(tuple(stream.packed(i, 64).tokens.tolist()) for i in range(count))
    wanted = sorted(tuple(whole[i * 64 : i * 64 + 64].tolist()) for i in range(count))
    assert seen == wanted


def test_labels_are_the_next_tokens_also_across_documents(corpus):
    packed, whole = corpus.stream(0).packed(3, 64), laid(corpus)
    assert packed.labels[:-1].equal(packed.tokens[1:])
    place = next(
        i for i in range(len(whole) - 64) if np.array_equal(whole[i : i + 64], packed.tokens)
    )
    assert packed.labels[-1] == whole[place + 64]


def test_positions_count_within_documents_that_start_at_every_end(corpus):
    packed = corpus.stream(0).packed(0, 2000)
    assert sum(packed.documents) == 2000
    assert len(packed.documents) > 2
    starts = np.cumsum((0, *packed.documents[:-1]))
    assert (packed.tokens[starts[1:]] == END).all()
    assert (packed.tokens[1:] == END).sum() == len(starts) - 1
    wanted = torch.cat([torch.arange(n) for n in packed.documents])
    assert packed.positions.equal(wanted)


def test_laying_sequences_together_changes_none_of_them(corpus):
    stream = corpus.stream(5)
    together = stream.packed(2, 64, count=3)
    apart = [stream.packed(2 + i, 64) for i in range(3)]
    for name in ("tokens", "labels", "positions"):
        parts = [getattr(one, name) for one in apart]
        assert getattr(together, name).equal(torch.cat(parts))
    assert together.documents == sum((one.documents for one in apart), ())


def test_seeds_and_epochs_differ_and_repeat(corpus):
    first = corpus.stream(0).packed(0, 64).tokens
    epoch = corpus.stream(0).tokens // 64
    assert corpus.stream(0).packed(0, 64).tokens.equal(first)
    assert not corpus.stream(1).packed(0, 64).tokens.equal(first)
    assert not corpus.stream(0).packed(epoch, 64).tokens.equal(first)


def test_a_sequence_longer_than_the_text_goes_around(corpus):
    stream = corpus.stream(0)
    packed = stream.packed(1, 2 * stream.tokens + 5)
    assert packed.tokens[: stream.tokens].equal(packed.tokens[stream.tokens : 2 * stream.tokens])


def test_held_out_files_are_never_trained_on(corpus):
    train, held_out = ({d.path for d in part} for part in (corpus.train, corpus.held_out))
    assert len(held_out) > 0
    assert not train & held_out
    assert len(train | held_out) == 60


def test_of_few_files_the_end_is_held_out(tmp_path):
    corpus = open_corpus(write_text(tmp_path / "few", files=2, size=1000))
    for train, held_out in zip(corpus.train, corpus.held_out, strict=True):
        assert train.path == held_out.path
        assert (train.begin, train.end) == (0, held_out.begin)
        assert held_out.end == train.path.stat().st_size


def test_one_file_is_a_corpus(tmp_path):
    (tmp_path / "one.txt").write_text("words " * 100)
    assert len(open_corpus(str(tmp_path / "one.txt")).train) == 1


def test_the_standard_library_is_the_default():
    corpus = open_corpus(None)
    assert len(corpus.train) > 300
    assert {d.path.suffix for d in corpus.train} == {".py"}
    assert not [d for d in corpus.train if "site-packages" in d.path.parts]


def test_binary_hidden_and_cached_files_are_no_text(tmp_path):
    folder = tmp_path / "mixed"
    write_text(folder, files=3)
    (folder / "picture").write_bytes(b"a\0b" * 100)
    (folder / ".hidden").write_text("x" * 100)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/x").write_text("x" * 100)
    assert {d.path.name for d in open_corpus(str(folder)).train} == {
        "000.txt",
        "001.txt",
        "002.txt",
    }


def test_a_digest_notices_another_file(tmp_path):
    folder = write_text(tmp_path / "text", files=3)
    before = open_corpus(folder).digest
    assert open_corpus(folder).digest == before
    (tmp_path / "text/zzz.txt").write_text("more text")
    assert open_corpus(folder).digest != before


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder"):
        open_corpus(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="0 text file"):
        open_corpus(str(tmp_path / "empty"))


def test_a_sequence_longer_than_the_text_is_refused(tmp_path):
    folder = write_text(tmp_path / "text", files=1, size=100)
    there = sum(document.tokens for document in open_corpus(folder).train)
    open_corpus(folder, tokens=there)
    with pytest.raises(ConfigError, match=f"--tokens {there} or fewer"):
        open_corpus(folder, tokens=there + 1)


def test_a_file_that_shrank_is_noticed(tmp_path):
    folder = write_text(tmp_path / "text", files=1, size=1000)
    corpus = open_corpus(folder)
    corpus.train[0].path.write_text("short")
    with pytest.raises(ConfigError, match="has 5 bytes"):
        Stream(corpus.train, 0).packed(0, 64)


def test_a_sequence_reads_its_own_bytes_and_no_whole_file(tmp_path, monkeypatch):
    """A corpus may be one file that is larger than memory."""
    text = bytes(i % 251 for i in range(1, 40_001)).replace(b"\0", b" ")
    (tmp_path / "one.txt").write_bytes(text)
    corpus = open_corpus(str(tmp_path / "one.txt"))
    lengths = []
    read = Document.read
    monkeypatch.setattr(
        Document,
        "read",
        lambda self, first, last: lengths.append(last - first) or read(self, first, last),
    )
    whole = [END, *text[: corpus.train[0].end]]
    stream = corpus.stream(0)
    for number in range(4):
        tokens = stream.packed(number, 64).tokens.tolist()
        assert any(tokens == whole[i : i + 64] for i in range(0, len(whole), 64))
    assert max(lengths) <= 65
    assert sum(lengths) == 4 * 65


@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1), (1, 1), (0, 4), (2, 5), (4, 5)])
def test_a_part_of_a_document_is_that_part(first, last, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"-abcd-")
    found = Document(tmp_path / "one.txt", 1, 5).read(first, last)
    assert found.dtype == np.int64
    assert found.tolist() == [END, *b"abcd"][first:last]
