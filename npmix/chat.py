"""Conversations as token ids, in the instruct format of Mixtral-8x7B-Instruct v0.1 (Mistral's "v1").

    <s> [INST] user [/INST] answer</s> [INST] user [/INST]

One hard fact: every segment is tokenised by itself and joined as ids, as in training; <s> and </s> are ids put
between the segments, so "</s>" in a message stays plain text. In v1, [INST] is plain text too.
Equal to mistral-common's `MistralTokenizer.v1()`.
"""

from collections.abc import Mapping, Sequence

from .errors import InputError, TokenizerError
from .tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
JOIN = "\n\n"  # between the system text and the first question, and between messages in a row of one role


def _read(messages) -> list[tuple[str, str]]:
    """[(role, content)] with the types checked."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(f'messages is {type(messages).__name__}, expected a list of {{"role": ..., "content": ...}}')
    if not messages:
        raise InputError("the conversation has no messages: expected at least one of the user")
    turns = []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f'message {n} is {str(message)[:80]!r}, expected {{"role": ..., "content": ...}}')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"message {n} has the role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"message {n} has a content of type {type(content).__name__}, expected text")
        turns.append((role, content))
    return turns


def _merge(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Messages in a row of one role become one; empty ones among them leave no trace."""
    merged: list[tuple[str, str]] = []
    for role, content in turns:
        if merged and merged[-1][0] == role:
            content = JOIN.join(part for part in (merged.pop()[1], content) if part)
        merged.append((role, content))
    return merged


def _check_order(turns: list[tuple[str, str]]) -> None:
    """[system] user (assistant user)*, or InputError."""
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        raise InputError("a system message comes after another role, expected it only at the beginning")
    after = roles[1:] if roles[0] == "system" else roles
    if not after or after[0] != "user":
        raise InputError(f"the conversation begins with {(after or roles)[0]!r}, expected a message of the user (after the system's)")
    if after[-1] != "user":
        raise InputError(f"the last message is of {after[-1]!r}, expected one of the user to answer")
    for role, content in turns:
        if role == "assistant" and not content:
            raise InputError("a message of the assistant is empty: leave it out or give its text")


def encode_user(tokenizer: Tokenizer, content: str, system: str = "") -> list[int]:
    """Ids of one question. system: put before the first one of a conversation."""
    text = system + JOIN + content if system else content
    return tokenizer.encode(f"[INST] {text} [/INST]", bos=False)


def encode_answer(tokenizer: Tokenizer, content: str) -> list[int]:
    """Ids of an answer given as text, with the end id behind it."""
    return [*tokenizer.encode(content, bos=False), end_id(tokenizer)]


def end_id(tokenizer: Tokenizer) -> int:
    """The id behind an answer; TokenizerError for a tokenizer that has none."""
    if tokenizer.eos_id is None:
        raise TokenizerError(f"{tokenizer.path} has no end token (</s>), which the instruct format needs: use an instruct model")
    return tokenizer.eos_id


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation that ends with a question.

    messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]: the system's at the beginning if
    at all, then user and assistant in turn; messages in a row of one role are joined by an empty line.
    Raises InputError for any other order, an unknown role or a content that is not text.
    """
    turns = _merge(_read(messages))
    _check_order(turns)
    system = ""
    if turns[0][0] == "system":
        (_, system), *turns = turns
    ids = tokenizer.encode("", bos=True)
    for role, content in turns:
        if role == "user":
            ids += encode_user(tokenizer, content, system)
            system = ""
        else:
            ids += encode_answer(tokenizer, content)
    return ids
