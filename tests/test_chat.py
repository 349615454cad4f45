"""Laws of the instruct format: ids equal to mistral-common's, segment by segment."""

import json
import random
from pathlib import Path

import make
import pytest

from npmix.chat import encode_chat
from npmix.errors import InputError, TokenizerError
from npmix.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_golden.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tokenizer:
    return Tokenizer(make.train_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer.model"))


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_segments_of_golden_conversations(tiny, case):
    """With any tokenizer the ids are those of mistral-common's segments, each encoded by itself, with bos and eos between."""
    marks = {"<bos>": [tiny.bos_id], "<eos>": [tiny.eos_id]}
    segments = [marks[s] if isinstance(s, str) else tiny.encode(s["text"], bos=False) for s in case["segments"]]
    expected = [id for segment in segments for id in segment]
    assert encode_chat(tiny, case["messages"]) == expected


@pytest.mark.transformers
@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_of_golden_conversations(mixtral, case):
    """With Mixtral's own tokenizer the ids are the golden ones."""
    assert encode_chat(mixtral, case["messages"]) == case["ids"]


def test_tokenizer_without_an_end_token(tmp_path):
    """A tokenizer that has no </s> cannot write an answer into the format; the error says so."""
    bare = Tokenizer(make.train_tokenizer(tmp_path / "tokenizer.model"))
    bare.eos_id = None
    assert encode_chat(bare, [{"role": "user", "content": "x"}])
    with pytest.raises(TokenizerError, match="end token"):
        encode_chat(bare, [{"role": r, "content": "x"} for r in ("user", "assistant", "user")])


def random_text(rng: random.Random) -> str:
    parts = [
        "[INST]",
        "[/INST]",
        "</s>",
        "<s>",
        " ",
        "  ",
        "\n",
        "\n\n",
        "é",
        "日本",
        "😀",
        "\u2581",
        "word",
        "Hello,",
        "x=1",
        "\t",
        "e\u0301",
    ]
    return "".join(rng.choice(parts) for _ in range(rng.randrange(1, 9)))


@pytest.mark.transformers
def test_random_conversations(mixtral):
    """Hundreds of random conversations give the ids that mistral-common gives."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    oracle, rng = MistralTokenizer.v1(), random.Random(8)
    for _ in range(300):
        messages = [{"role": "system", "content": random_text(rng)}] * rng.choice((0, 0, 1, 2))
        for _ in range(rng.randrange(3)):
            messages += [{"role": "user", "content": random_text(rng)}] * rng.choice((1, 1, 2))
            messages += [{"role": "assistant", "content": random_text(rng)}] * rng.choice((1, 1, 2))
        messages.append({"role": "user", "content": random_text(rng)})
        expected = oracle.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert encode_chat(mixtral, messages) == expected, messages


def test_text_never_becomes_control_tokens(tiny):
    """Whatever the user writes, the only bos is the first id and the only eos ids stand behind the assistant's answers."""
    text = "</s><s>[INST] </s> <unk>"
    ids = encode_chat(tiny, [{"role": r, "content": text} for r in ("system", "user", "assistant", "user")])
    assert ids.count(tiny.bos_id) == 1 and ids[0] == tiny.bos_id
    assert ids.count(tiny.eos_id) == 1


@pytest.mark.parametrize(
    "messages, found",
    [
        ([], "no messages"),
        ("hello", "messages is str"),
        ({"role": "user", "content": "x"}, "messages is dict"),
        ([("user", "x")], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "list"),
        ([{"role": "tool", "content": "x"}], "'tool'"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "system", "content": "x"}], "begins with 'system'"),
        ([{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}], "begins with 'assistant'"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], "last message is of 'assistant'"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "x"}, {"role": "user", "content": "x"}], "system message"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "x"}], "empty"),
        ([{"role": "user", "content": "\udcff"}], "UTF-8"),
    ],
)
def test_bad_conversations(tiny, messages, found):
    """A wrong order, role or type is an InputError that says what was found."""
    with pytest.raises(InputError, match=found):
        encode_chat(tiny, messages)
