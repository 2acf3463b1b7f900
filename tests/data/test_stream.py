"""Streams over token shards: order, proportions, packing, and going on from any place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.manifest import Corpus, DataError, HeldOutFile, Manifest, Shard
from dsv3.data.stream import Batch, ChatStream, TokenStream, heldout, open_stream, pack, shuffled
from dsv3.text.bpe import save_tokenizer, train_tokenizer

BOS, EOS, PAD, USER, ASSISTANT = range(5)


def write(
    folder: Path, name: str, shards: list[list[list[int]]], loss: list[list[list[int]]] | None = None
) -> Corpus:
    """A corpus of these documents, in several shards, as `dsv3 data build` writes it."""
    place = folder / "tokens" / name
    place.mkdir(parents=True)
    made = []
    for i, documents in enumerate(shards):
        path = place / f"{i:05d}.ds"
        np.concatenate([np.array(d, "<u2") for d in documents]).tofile(path)
        np.cumsum([len(d) for d in documents]).astype("<u8").tofile(f"{path}.index")
        if loss is not None:
            np.concatenate([np.array(m, "u1") for m in loss[i]]).tofile(f"{path}.loss")
        made.append(Shard(path.relative_to(folder).as_posix(), len(documents), sum(map(len, documents)), ""))
    return Corpus("text" if loss is None else "chats", (), (), tuple(made))


def numbered(first: int, lengths: list[int]) -> list[list[int]]:
    """Documents of BOS, the document's own number over and over, EOS."""
    return [[BOS, *[first + i] * n, EOS] for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def lengths(count: int, low: int, high: int) -> list[int]:
        return rng.integers(low, high, count).tolist()

    corpora = {
        "long": write(
            folder, "long", [numbered(100, lengths(30, 40, 90)), numbered(130, lengths(11, 40, 90))]
        ),
        "short": write(folder, "short", [numbered(200, lengths(57, 2, 12))]),
    }
    for name, first, count, high in (("talk", 300, 80, 20), ("essays", 400, 40, 60)):
        sizes = [(int(a), int(b)) for a, b in rng.integers(1, high, (count, 2))]
        chats = [
            [BOS, USER, *[first + i] * a, ASSISTANT, *[first + i] * b, EOS] for i, (a, b) in enumerate(sizes)
        ]
        masks = [[0] * (a + 3) + [1] * (b + 1) for a, b in sizes]
        corpora[name] = write(folder, name, [chats], [masks])
    held = np.array([BOS, 7, 8, EOS], "<u2")
    (folder / "heldout").mkdir()
    held.tofile(folder / "heldout/long.ds")
    Manifest(
        {}, {}, 500, "", "uint16", None, corpora, {"long": HeldOutFile("heldout/long.ds", 1, 4, 9, "")}
    ).save(folder)
    save_tokenizer(folder, train_tokenizer(["a b c"], 300))
    return folder


def flat(stream: TokenStream, rows: int) -> list[int]:
    """The tokens of the next rows, without the one that each shares with the next."""
    return [int(t) for row in stream.next(rows).tokens for t in row[:-1]]


# --- order --------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_shuffle_is_a_permutation(length: int, key: int) -> None:
    assert sorted(shuffled(i, length, key) for i in range(length)) == list(range(length))


def test_the_shuffle_looks_random() -> None:
    order = np.array([shuffled(i, 10_000, 12345) for i in range(10_000)])
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    other = np.array([shuffled(i, 10_000, 12346) for i in range(10_000)])
    assert (order == other).sum() < 20, "another key gives another order"


def test_every_document_comes_once_in_each_epoch(data: Path) -> None:
    stream = TokenStream(data, {"short": 1.0}, seed=0, seq=16)
    tokens = stream.tokens_per_epoch
    read = flat(stream, 3 * tokens // 16)
    starts = [i for i, t in enumerate(read) if t == BOS]
    order = [read[i + 1] for i in starts]
    for epoch in range(2):
        assert sorted(order[57 * epoch : 57 * (epoch + 1)]) == list(range(200, 257))
    assert order[:57] != order[57:114], "each epoch has an order of its own"
    assert (
        TokenStream(data, {"short": 1.0}, 1, 16).next(4).tokens.tolist()
        != TokenStream(data, {"short": 1.0}, 0, 16).next(4).tokens.tolist()
    ), "and each seed"
    assert stream.epochs()["short"] == pytest.approx(3, abs=0.1)


# --- text ---------------------------------------------------------------------------------------------------


def test_documents_lie_end_to_end_and_whole(data: Path) -> None:
    stream = TokenStream(data, {"short": 0.5, "long": 0.5}, seed=3, seq=32)
    lengths = {**_lengths(data, "short", 200), **_lengths(data, "long", 100)}
    read = flat(stream, 60)
    starts = [i for i, t in enumerate(read) if t == BOS]
    assert starts[0] == 0
    for start, end in zip(starts, starts[1:], strict=False):
        number = read[start + 1]
        assert read[start:end] == [BOS, *[number] * lengths[number], EOS]


def _lengths(data: Path, name: str, first: int) -> dict[int, int]:
    ends = [
        np.diff(np.fromfile(f"{path}.index", "<u8"), prepend=0)
        for path in sorted((data / f"tokens/{name}").glob("*.ds"))
    ]
    return {first + i: int(n) - 2 for i, n in enumerate(np.concatenate(ends))}


def test_rows_overlap_by_one_token_across_batches(data: Path) -> None:
    stream = TokenStream(data, {"long": 1.0}, seed=0, seq=16)
    rows = torch.cat([stream.next(n).tokens for n in (3, 1, 4)])
    assert rows.shape == (8, 17) and rows.dtype == torch.int64
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    again = TokenStream(data, {"long": 1.0}, seed=0, seq=16).next(8).tokens
    assert torch.equal(rows, again), "the batch size does not change the stream"


def test_processes_that_share_a_batch_get_their_rows_and_the_same_place(data: Path) -> None:
    def stream() -> TokenStream:
        return TokenStream(data, {"long": 0.7, "short": 0.3}, seed=0, seq=16)

    whole, first, second = stream(), stream(), stream()
    for _ in range(5):
        batch = whole.next(6).tokens
        assert torch.equal(first.next(6, slice(0, 3)).tokens, batch[:3])
        assert torch.equal(second.next(6, slice(1, None, 2)).tokens, batch[1::2])
    assert whole.state() == first.state() == second.state()


@settings(max_examples=25, deadline=None)
@given(before=st.integers(0, 40), rows=st.integers(1, 7), after=st.integers(1, 10))
def test_text_goes_on_from_any_place(data: Path, before: int, rows: int, after: int) -> None:
    mixture = {"long": 0.3, "short": 0.7}
    stream = TokenStream(data, mixture, seed=5, seq=24)
    for _ in range(before):
        stream.next(rows)
    state = json.loads(json.dumps(stream.state()))
    other = TokenStream(data, mixture, seed=5, seq=24)
    other.load_state(state)
    for _ in range(after):
        assert torch.equal(stream.next(rows).tokens, other.next(rows).tokens)
    assert stream.state() == other.state()


@settings(max_examples=20, deadline=None)
@given(weight=st.floats(0.05, 0.95))
def test_a_mixture_keeps_its_shares(data: Path, weight: float) -> None:
    stream = TokenStream(data, {"long": weight, "short": 1 - weight}, seed=0, seq=32)
    for _ in range(40):
        stream.next(5)
        read = stream.state()["tokens"]
        total = sum(read.values())
        longest = 92  # tokens of a document at most
        assert abs(read["long"] - weight * total) <= longest, f"{read} at weight {weight}"


def test_a_corpus_that_was_read_often_enough_is_left_out(data: Path) -> None:
    stream = TokenStream(data, {"long": 0.5, "short": 0.5}, seed=0, seq=16, max_epochs=2)
    for _ in range(200):
        stream.next(1)
    assert stream.epochs()["short"] == 2 and stream.epochs()["long"] < 2
    with pytest.raises(DataError, match="has been read 2 times: train on fewer tokens"):
        for _ in range(1000):
            stream.next(1)


# --- chats --------------------------------------------------------------------------------------------------


def check_chats(batch: Batch) -> list[int]:
    """That the rows hold whole chats; returns their numbers."""
    tokens, mask, segments = batch.tokens, batch.loss_mask, batch.segments
    assert mask is not None and segments is not None
    assert mask.dtype == torch.bool and segments.dtype == torch.int64
    assert (tokens[segments == 0] == PAD).all() and not mask[segments == 0].any()
    found = []
    for row in range(len(tokens)):
        for number in range(1, int(segments[row].max()) + 1):
            at = torch.nonzero(segments[row] == number).flatten()
            assert (at.diff() == 1).all(), "a chat lies in one piece"
            ids, learned = tokens[row, at].tolist(), mask[row, at].tolist()
            assert ids[:2] == [BOS, USER] and ids[-1] == EOS and ids.count(BOS) == 1
            answer = ids.index(ASSISTANT)
            assert learned == [False] * (answer + 1) + [True] * (len(ids) - answer - 1)
            found.append(ids[2])
    return found


def test_chats_are_packed_whole(data: Path) -> None:
    stream = ChatStream(data, {"talk": 1.0}, seed=0, seq=63)
    found: list[int] = []
    while stream.epochs()["talk"] < 5:
        found += check_chats(stream.next(8))
    assert set(found) == set(range(300, 380))
    read = stream.next(128)
    assert read.segments is not None and (read.segments > 0).float().mean() > 0.95
    assert stream.tokens_per_epoch == sum(
        n for n in np.diff(np.fromfile(data / "tokens/talk/00000.ds.index", "<u8"), prepend=0)
    )


def test_each_epoch_has_every_chat_once(data: Path) -> None:
    stream = ChatStream(data, {"talk": 1.0}, seed=0, seq=63, max_epochs=3)
    found: list[int] = []
    with pytest.raises(DataError, match="read 3 times"):
        while True:
            found += check_chats(stream.next(1))
    assert sorted(found) == sorted([*range(300, 380)] * 3)


@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 300), rows=st.integers(1, 5))
def test_chats_go_on_from_any_place(data: Path, before: int, rows: int) -> None:
    mixture = {"talk": 0.4, "essays": 0.6}
    stream = ChatStream(data, mixture, seed=2, seq=100)
    stream.next(before, slice(0)) if before else None
    state = json.loads(json.dumps(stream.state()))
    other = ChatStream(data, mixture, seed=2, seq=100)
    other.load_state(state)
    for _ in range(40):
        assert _equal(stream.next(rows), other.next(rows))
    assert stream.state() == other.state()


def _equal(one: Batch, two: Batch) -> bool:
    pairs: Any = ((one.tokens, two.tokens), (one.loss_mask, two.loss_mask), (one.segments, two.segments))
    return all(torch.equal(a, b) for a, b in pairs)


def test_long_chats_end_after_the_last_answer_that_fits(tmp_path: Path) -> None:
    turn = [USER, 9, ASSISTANT, 9, EOS]
    chats = [[BOS, *turn, *turn, *turn], [BOS, USER, *[9] * 30, ASSISTANT, 9, EOS]]
    masks = [[0, *[0, 0, 0, 1, 1] * 3], [0] * 33 + [1, 1]]
    corpora = {
        "c": write(tmp_path, "c", [chats], [masks]),
        "none": write(tmp_path, "none", [chats[1:]], [masks[1:]]),
    }
    Manifest({}, {}, 500, "", "uint16", None, corpora).save(tmp_path)
    save_tokenizer(tmp_path, train_tokenizer(["a b c"], 300))
    stream = ChatStream(tmp_path, {"c": 1.0}, seed=0, seq=12)
    batch = stream.next(5)
    assert batch.tokens.tolist() == [[BOS, *turn, *turn, PAD, PAD]] * 5
    with pytest.raises(DataError, match="no chat has an answer that ends within 13 tokens"):
        ChatStream(tmp_path, {"none": 1.0}, seed=0, seq=12).next(1)


@given(lengths=st.lists(st.integers(1, 50), max_size=200))
def test_packing_loses_nothing(lengths: list[int]) -> None:
    rows = pack(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    half = [row for row in rows if sum(lengths[i] for i in row) <= 25]
    assert len(half) <= 1, "two rows that fit into one are one"


# --- what can be wrong --------------------------------------------------------------------------------------


def test_streams_are_opened_by_what_they_hold(data: Path) -> None:
    assert isinstance(open_stream(data, {"long": 1, "talk": 0}, 0, 16), TokenStream)
    assert isinstance(open_stream(data, {"talk": 1}, 0, 16), ChatStream)
    with pytest.raises(DataError, match=r"text \(long\) and chats \(talk\)"):
        open_stream(data, {"long": 1, "talk": 1}, 0, 16)
    with pytest.raises(DataError, match=r"names the corpus 'nothing', but .* has long, short, talk, essays"):
        open_stream(data, {"nothing": 1}, 0, 16)
    with pytest.raises(DataError, match="no corpus with a weight above 0"):
        open_stream(data, {"long": 0}, 0, 16)
    with pytest.raises(DataError, match="weight of the corpus 'long' is -1"):
        open_stream(data, {"long": -1}, 0, 16)


def test_a_place_of_another_mixture_is_refused(data: Path) -> None:
    state = TokenStream(data, {"long": 1}, 0, 16).state()
    with pytest.raises(DataError, match="of the mixture long, this one is of short"):
        TokenStream(data, {"short": 1}, 0, 16).load_state(state)


def test_missing_and_broken_data_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"manifest.json does not exist: build the data with `dsv3 data build"
    ):
        open_stream(tmp_path, {"long": 1}, 0, 16)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_stream(tmp_path, {"long": 1}, 0, 16)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="not a manifest of this version"):
        open_stream(tmp_path, {"long": 1}, 0, 16)
    (tmp_path / "manifest.json").write_text((data / "manifest.json").read_text())
    with pytest.raises(DataError, match=r"00000.ds cannot be read"):
        open_stream(tmp_path, {"long": 1}, 0, 16)
    (tmp_path / "tokens/short").mkdir(parents=True)
    (tmp_path / "tokens/short/00000.ds").write_bytes(b"abc")
    with pytest.raises(DataError, match="has 3 bytes instead of"):
        open_stream(tmp_path, {"short": 1}, 0, 16)


def test_held_out_sets(data: Path) -> None:
    (held,) = heldout(data).values()
    assert held.tokens.tolist() == [BOS, 7, 8, EOS] and (held.bytes, held.documents) == (9, 1)
