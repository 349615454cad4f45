"""Write tests/data/chat_golden.json: conversations and what mistral-common makes of them for Mixtral-Instruct v0.1.

    python tools/make_chat_golden.py

For each conversation: its segments (the bos id, each text as it reaches the tokenizer, the eos id), so that any
tokenizer can be held to it, and the ids with Mixtral's own tokenizer. Needs mistral-common (extra "test").
"""

import json
from pathlib import Path

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "chat_golden.json"


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Contents of the user and the assistant in turn, as messages."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def in_a_row(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATIONS = [
    turns("What is 2 + 2?"),
    turns(""),
    turns(" "),
    turns("  leading and trailing  "),
    turns("\n\nlines\n\n"),
    turns("\ttab"),
    turns("Hello", system="You are terse."),
    turns("Hello", system=""),
    turns("Hello", system=" spaces around \n"),
    turns("", system="Only a system text."),
    turns("Hi", "Hello!", "How are you?"),
    turns("Hi", " Hello! ", " How are you? "),
    turns("Hi", "\nHello!\n\n", "And?", system="Be kind."),
    turns("a", "b", "c", "d", "e", "f", "g"),
    turns("one", "two", "three", "four", "five", system="Count."),
    turns("日本語で答えて", "はい。", "ありがとう"),
    turns("😀👩‍👩‍👧‍👦 emoji", "🏳️‍🌈", "é e\u0301 ﷺ עברית"),
    turns("What does [INST] mean?", "[INST] opens, [/INST] closes.", "[/INST]"),
    turns("</s>", "<s>", "<unk> <0x0A> </s></s>"),
    turns("[INST] pretend [/INST] yes</s>[INST] more", "no", "ok", system="[INST] <s> </s> [/INST]"),
    turns("\u2581 literal \u2581sign", "\u2581", "end"),
    turns("def f(x):\n    return x\n", "```python\nprint(1)\n```", "why?\r\n"),
    turns("word " * 300, "answer " * 300, "go on"),
    turns("\x00\x01\x7f control"),
    in_a_row(("user", "one"), ("user", "two")),
    in_a_row(("user", ""), ("user", "two"), ("user", "")),
    in_a_row(("system", "A"), ("system", "B"), ("user", "q"), ("assistant", "x"), ("assistant", "y"), ("user", "r")),
]


def record(tokenizer, messages: list[dict]) -> dict:
    """Encode a conversation and note every call of the text tokenizer."""
    inner = tokenizer.instruct_tokenizer.tokenizer
    original, segments = inner.encode, ["<bos>"]

    def encode(text, bos, eos):
        assert not bos and not eos
        segments.append({"text": text})
        return original(text, bos=False, eos=False)

    inner.encode = encode
    try:
        ids = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    finally:
        del inner.encode
    return {"messages": messages, "segments": with_ends(segments, ids, inner, original), "ids": ids}


def with_ends(segments: list, ids: list[int], inner, encode) -> list:
    """The segments with "<eos>" where the ids have it; fails if they do not add up to the ids."""
    out, built = [], []
    for segment in segments:
        if ids[len(built) : len(built) + 1] == [inner.eos_id]:
            out.append("<eos>")
            built.append(inner.eos_id)
        out.append(segment)
        built += [inner.bos_id] if segment == "<bos>" else encode(segment["text"], bos=False, eos=False)
    assert built == ids
    return out


def main() -> None:
    tokenizer = MistralTokenizer.v1()
    lines = [json.dumps(record(tokenizer, messages)) for messages in CONVERSATIONS]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{OUT}: {len(lines)} conversations, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
