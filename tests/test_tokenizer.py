"""Laws of the tokenizer; the real Mixtral tokenizer comes from mistral-common where that is installed."""

import io
import random

import make
import pytest
import sentencepiece

from npmix.config import Config
from npmix.errors import InputError, TokenizerError
from npmix.tokenizer import BYTE, Tokenizer, take_utf8

TEXTS = [
    "", " ", "  ", "a", " a", "a ", "def fibonacci(n):\n    return n", "\n", "\t\n  x", "naïve café", "e\u0301 a\u0308\u0323", "日本語のテキスト",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈", "ﷺ עברית العربية", "\x00\x01\x7f", "<s>[INST] </s> <unk> <0x0A>", "\u2581 literal", "\U0010ffff\ue000", "x" * 500,
]  # fmt: skip


def train(path, **options) -> Tokenizer:
    out = io.BytesIO()
    settings = {
        "vocab_size": 360, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1, "minloglevel": 2, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make.TEXT.splitlines() * 4), model_writer=out, **{**settings, **options}
    )
    path.write_bytes(out.getvalue())
    return Tokenizer(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return Tokenizer(make.train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


def random_ids(rng: random.Random, tokenizer: Tokenizer, length: int) -> list[int]:
    """A mix of anything, byte tokens (well and ill formed), control tokens and lone spaces."""
    first = tokenizer._kinds.find(BYTE)
    byte_ids = range(first, first + 256) if first >= 0 else ()
    space = tokenizer._model.piece_to_id("\u2581")
    ids: list[int] = []
    while len(ids) < length:
        what = rng.randrange(6)
        if what == 0 and byte_ids:
            ids += [byte_ids[b] for b in rng.choice(["😀", "é", "中", "\u0301"]).encode()]
        elif what == 1 and byte_ids:
            ids.append(byte_ids[rng.choice((0xE2, 0x96, 0x81, 0xF0, 0x9F, 0xED, 0xA0, 0xC0, 0xFF, 0x20, 0x00, rng.randrange(256)))])
        elif what == 2:
            ids.append(rng.choice((0, 1, 2, space)))
        else:
            ids.append(rng.randrange(tokenizer.vocab_size))
    return ids


def streamed(tokenizer: Tokenizer, ids, context=()) -> str:
    decoder = tokenizer.stream_decoder(context)
    return "".join([decoder.push(id) for id in ids]) + decoder.finish()


def check_stream(tokenizer: Tokenizer, rounds: int) -> None:
    rng = random.Random(20)
    for _ in range(rounds):
        ids = random_ids(rng, tokenizer, rng.choice((1, 2, 4, 12, 40)))
        assert streamed(tokenizer, ids) == tokenizer._model.decode(ids) == tokenizer.decode(ids), ids


def check_continuation(tokenizer: Tokenizer) -> None:
    for before in TEXTS[1:]:
        for text in TEXTS:
            ids, more = tokenizer.encode(before), tokenizer.encode_continuation(text)
            assert streamed(tokenizer, more, context=ids) == tokenizer.decode(ids + more).removeprefix(tokenizer.decode(ids))
            assert tokenizer.decode(ids + more) == tokenizer.decode(ids) + text.replace("\u2581", " ")


def test_roundtrip(tiny):
    """Text of any script survives encode and decode; only the sign sentencepiece writes spaces with becomes one."""
    for text in TEXTS:
        assert tiny.decode(tiny.encode(text)) == text.replace("\u2581", " ")


def test_bos_rules(tiny):
    """A text begins with the bos id and has no eos id; names of control tokens in a text stay text."""
    assert (tiny.bos_id, tiny.eos_id, tiny.encode("")) == (1, 2, [1])
    assert tiny.encode("def") == [1, *tiny.encode("def", bos=False)]
    assert not {0, 1, 2} & set(tiny.encode("<s> </s> <unk>", bos=False))


def test_streamed_equals_whole(tiny):
    """Pieces of a stream decoder joined equal decoding the whole sequence at once, for any ids."""
    check_stream(tiny, 3000)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"model_type": "unigram", "vocab_size": 330},
        {"byte_fallback": False, "vocab_size": 90},
        {"unk_surface": " ?? ", "user_defined_symbols": "def,  ,\u2581\u2581x"},
        {"bos_id": -1, "eos_id": 1, "pad_id": 2},
    ],
    ids=["no_prefix", "remove_spaces", "unigram", "no_bytes", "own_symbols", "no_bos"],
)
def test_streamed_equals_whole_for_other_settings(options, tmp_path):
    """The same holds whatever the tokenizer file says about spaces, unknown characters and bytes."""
    check_stream(train(tmp_path / "t.model", **options), 1500)


def test_continuation(tiny):
    """A continuation's text follows the text before it with nothing added, dropped or held back; no bos inside."""
    check_continuation(tiny)


def test_unfinished_characters_are_held_back(tiny):
    """No piece holds half a character: an emoji made of four byte tokens comes with its last one."""
    byte = [tiny._model.piece_to_id(f"<0x{b:02X}>") for b in "😀".encode()]
    decoder = tiny.stream_decoder()
    assert [decoder.push(id) for id in byte] == ["", "", "", "😀"]
    assert [decoder.push(byte[0]), decoder.push(byte[1]), decoder.finish(), decoder.finish()] == ["", "", "\ufffd\ufffd", ""]


def test_first_space(tiny):
    """The space before a text's first word is dropped, that before a continuation's first word is kept."""
    word = tiny.encode("return", bos=False)
    assert streamed(tiny, word) == "return"
    assert streamed(tiny, word, context=tiny.encode("x")) == " return"


@pytest.mark.parametrize("cut", [True, False])
def test_utf8_cut_anywhere(cut):
    """Bytes taken one by one give what they give together: U+FFFD for each byte that is part of no character."""
    rng = random.Random(3)
    for _ in range(2000):
        data = bytes(rng.choice((0x41, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xF4, 0xFF)) for _ in range(9))
        out, rest = "", b""
        for i in range(0, 9, 1 if cut else 4):
            text, rest = take_utf8(rest + data[i : i + (1 if cut else 4)], final=False)
            assert len(rest) <= 3
            out += text
        out += take_utf8(rest, final=True)[0]
        assert out == take_utf8(data, final=True)[0]
        assert out.replace("\ufffd", "") == data.decode("utf-8", "ignore")


def test_spare_ids(tiny):
    """Ids of the model beyond the tokenizer's have no text; negative ones are an error."""
    ids = tiny.encode("def f")
    assert tiny.decode([*ids, tiny.vocab_size, 10**6]) == streamed(tiny, [*ids, tiny.vocab_size]) == "def f"
    with pytest.raises(InputError, match="-1"):
        tiny.decode([-1])


def test_text_that_is_not_unicode(tiny):
    """A lone surrogate (a stray byte on the command line) is an error that says where."""
    with pytest.raises(InputError, match=r"udcff.*position 2"):
        tiny.encode("ab\udcff")


@pytest.mark.parametrize("content", [None, b"", b"\0", b"no model " * 50, "cut", "changed"])
def test_hostile_file(content, tmp_path):
    """A missing, empty, foreign, cut or damaged file raises TokenizerError that names it, and nothing else."""
    good = make.train_tokenizer(tmp_path / "good.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    if content == "cut":
        content = good[: len(good) // 2]
    elif content == "changed":  # bytes at random: a loader may take it or refuse it
        rng = random.Random(1)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                Tokenizer(path).encode("def f")
            except TokenizerError:
                pass
        return
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match="tokenizer.model"):
        Tokenizer(path)


def test_folder_instead_of_file(tmp_path):
    """A folder is no tokenizer file."""
    with pytest.raises(TokenizerError):
        Tokenizer(tmp_path)


def test_larger_than_the_vocabulary(tiny):
    """More tokens than the model has ids is an error; fewer is common and fine."""
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "hidden_dim": 16, "n_experts": 1, "n_active": 1}
    config = Config(**sizes, vocab_size=tiny.vocab_size - 1, norm_eps=1e-5, rope_theta=1e4, max_positions=64)
    with pytest.raises(TokenizerError, match=f"{tiny.vocab_size} tokens.*{tiny.vocab_size - 1}"):
        Tokenizer.for_model(tiny.path, config)
    config = Config(**sizes, vocab_size=tiny.vocab_size + 24, norm_eps=1e-5, rope_theta=1e4, max_positions=64)
    assert Tokenizer.for_model(tiny.path, config).vocab_size == tiny.vocab_size


@pytest.mark.transformers
def test_mixtral_known_ids(mixtral):
    """Mixtral's tokenizer: 32,000 ids, bos 1, eos 2, bytes from 3 on."""
    assert (mixtral.vocab_size, mixtral.bos_id, mixtral.eos_id) == (32000, 1, 2)
    assert mixtral.encode("Hello world") == [1, 22557, 1526]
    assert mixtral.encode("\n", bos=False) == [28705, 13]


@pytest.mark.transformers
def test_mixtral_streamed_equals_whole(mixtral):
    """With the real tokenizer, too, streamed text equals the whole decoded at once; texts survive the round trip."""
    check_stream(mixtral, 5000)
    for text in TEXTS:
        ids = mixtral.encode(text)
        assert streamed(mixtral, ids) == mixtral.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.transformers
def test_mixtral_continuation(mixtral):
    """The same for continuations."""
    check_continuation(mixtral)
