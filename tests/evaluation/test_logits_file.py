"""Saved log-probabilities: how exact they are, and what happens to bad files."""

import json
import shutil

import numpy as np
import pytest

from npmix.errors import LogitsFileError
from npmix.evaluation import logits_file
from npmix.evaluation.logits_file import LogitsReader, LogitsWriter, decode, encode
from npmix.evaluation.scores import Block, divergences, mean, normalised, score
from npmix.evaluation.windows import make_plan

VOCAB, IDS = 50, [1, *np.random.default_rng(0).integers(0, 50, 39).tolist()]
PLAN = make_plan(IDS, 10, None, 1)


def logits(count, vocab, seed=0, scale=4.0):
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * scale).astype(np.float32)


@pytest.fixture
def saved(tmp_path):
    """(file, blocks of its windows)"""
    blocks = [score(logits(w.scored, VOCAB, w.begin), PLAN.targets(w)) for w in PLAN.windows]
    with LogitsWriter(tmp_path / "base.lp", PLAN, VOCAB, "the base") as writer:
        for block in blocks:
            for part in (slice(0, 1), slice(1, None)):
                writer.add(Block(block.logs[part], block.nll[part], block.top[part]))
            writer.end_window()
        writer.finish()
    assert [f.name for f in tmp_path.iterdir()] == ["base.lp"]
    return tmp_path / "base.lp", blocks


def read(path, plan=PLAN, vocab=VOCAB):
    """All blocks of a file, a window each, read in pieces."""
    out = []
    with LogitsReader(path, plan, vocab) as reader:
        for window in plan.windows:
            reader.begin(window)
            parts = [reader.read(n) for n in (2, window.scored - 2)]
            out.append(Block(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("logs", "nll", "top"))))
    return out


def test_round_trip(saved):
    """Losses and first choices come back exactly, log-probabilities within the codes' half step, summing to 1."""
    path, blocks = saved
    for made, back in zip(blocks, read(path), strict=True):
        assert (made.nll == back.nll).all() and (made.top == back.top).all()
        below = made.logs.max(-1, keepdims=True) - made.logs
        assert (np.abs(back.logs - made.logs) <= 1.2 * 0.5 * 8 / 65536 * np.exp(below / 8)).all()
        assert np.allclose(np.exp(back.logs).sum(-1), 1, rtol=0, atol=1e-12)


def test_codes():
    """Equal logits have equal codes, the likeliest 0; what is 88 nats below or more shares the last one and is no NaN."""
    logs = normalised(np.array([[0.0, 0, -1, -87, -89, -500]]))
    codes = encode(logs)
    assert codes[0, :2].tolist() == [0, 0] and 0 < codes[0, 2] < codes[0, 3] and codes[0, 4] == codes[0, 5] == 65535
    assert np.isfinite(decode(codes)).all() and (decode(encode(decode(codes))) == decode(codes)).all()


@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 0.1])
def test_small_divergences_survive(scale, size):
    """A mean KL near `size` moves by 2e-9 and a few hundredths of its own standard error at most, flat and peaked, over 32,000 tokens."""
    base = logits(48, 32000, 1, scale)
    noise = np.random.default_rng(2).standard_normal(base.shape) * np.sqrt(2 * size)
    a, b = score(base, [0] * len(base)), score(base.astype(np.float64) + noise, [0] * len(base))
    stored = Block(decode(encode(a.logs)), a.nll, a.top)
    exact, error = mean(divergences(a, b))
    assert size / 4 < exact < 2 * size
    assert abs(divergences(stored, b).mean() - exact) < 2e-9 + 0.03 * error


def test_fewer_windows(saved):
    """A file serves a plan of its first windows too."""
    path, blocks = saved
    (back,) = read(path, make_plan(IDS, 10, None, 1, limit=1))
    assert (back.nll == blocks[0].nll).all()


def change(path, **fields):
    """Rewrite the header's fields, as a maker of hostile files would."""
    data = path.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    text = json.dumps({**json.loads(data[16 : 16 + length]), **fields}).encode()
    path.write_bytes(data[:8] + len(text).to_bytes(8, "little") + text + data[16 + length :])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"vocab_size": 51}, "vocab_size 51, expected 50"), ({"vocab_size": 50.0}, "vocab_size 50.0"), ({"context": 8}, "context 8"),
        ({"context": True}, "context True"), ({"stride": 5}, "stride 5, expected None"), ({"tokens": 41}, "tokens 41"),
        ({"sha256": "0" * 64}, "sha256 000"), ({"windows": 3}, "3 windows, expected 4 or more"), ({"windows": 5}, "header claims"),
        ({"windows": 10**30}, "windows"), ({"windows": -1}, "windows"), ({"windows": "4"}, "windows"), ({"base": 3}, "lacks one of"),
        ({"extra": 1}, "lacks one of"),
    ],
)  # fmt: skip
def test_wrong_header(saved, fields, said):
    """A header that claims another text, another setting or nonsense: an error that names the file and the field."""
    path, _ = saved
    change(path, **fields)
    with pytest.raises(LogitsFileError, match=said) as e:
        read(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def damage(data, kind):
    length = int.from_bytes(data[8:16], "little")
    return {
        "empty": b"", "magic only": data[:8], "cut in the header": data[:40], "cut": data[:-1], "longer": data + b"\0",
        "other magic": b"safetens" + data[8:], "huge header": data[:8] + (1 << 60).to_bytes(8, "little") + data[16:],
        "no JSON": data[:16] + b"\xff" * length + data[16 + length :], "a list": data[:16] + b"[]".ljust(length) + data[16 + length :],
        "deep": data[:8] + (40000).to_bytes(8, "little") + b"[" * 40000,
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["empty", "magic only", "cut in the header", "cut", "longer", "other magic", "huge header", "no JSON", "a list", "deep"]
)
def test_damaged_file(saved, kind):
    """A file cut anywhere or of another kind is refused when it is opened, before any model has run."""
    path, _ = saved
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(LogitsFileError, match="base.lp"):
        LogitsReader(path, PLAN, VOCAB)


@pytest.mark.parametrize("where", [-1, -5, -300, 400])
def test_changed_byte(saved, where):
    """One flipped bit anywhere in the numbers: the checksum of its window says so."""
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    with pytest.raises(LogitsFileError, match="checksum"):
        read(path)


@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0])
def test_loss_that_is_none(tmp_path, loss):
    """A checksum that fits numbers that cannot be: refused all the same."""
    block = score(logits(4, VOCAB), [0] * 4)
    block.nll[2] = loss
    plan = make_plan(IDS, 10, None, 1, limit=1)
    with LogitsWriter(tmp_path / "f", plan, VOCAB, "") as writer:
        writer.add(block)
        writer.end_window()
        writer.finish()
    with pytest.raises(LogitsFileError):
        read(tmp_path / "f", plan)


def test_missing_file(tmp_path):
    """No such file, or a folder: one line."""
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(LogitsFileError, match="cannot read"):
            LogitsReader(path, PLAN, VOCAB)


def test_nothing_half_written(tmp_path):
    """A writer that is left by an exception leaves nothing, and what stood there before still stands."""
    path = tmp_path / "base.lp"
    path.write_bytes(logits_file.MAGIC + b"old")
    with pytest.raises(KeyError), LogitsWriter(path, PLAN, VOCAB, "") as writer:
        writer.add(score(logits(4, VOCAB), [0] * 4))
        raise KeyError
    assert [f.name for f in tmp_path.iterdir()] == ["base.lp"] and path.read_bytes() == logits_file.MAGIC + b"old"


def test_foreign_file_is_kept(tmp_path):
    """A file that npmix did not write is not written over."""
    path = tmp_path / "thesis.txt"
    path.write_text("irreplaceable")
    with pytest.raises(LogitsFileError, match="choose another name"):
        LogitsWriter(path, PLAN, VOCAB, "")
    assert path.read_text() == "irreplaceable"


def test_room(tmp_path, monkeypatch):
    """A disk with too little room: said before anything is computed, and nothing is left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(LogitsFileError, match="would take .* the disk has 1"):
        LogitsWriter(tmp_path / "f", PLAN, VOCAB, "")
    assert not list(tmp_path.iterdir())
