"""Text to token ids and back, by sentencepiece with Mixtral's rules.

One hard fact: sentencepiece drops the space before the first piece of a text and of that text only. So a
continuation is decoded with what came before it in mind, and text joined from pieces is never tokenised again.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .config import Config
from .errors import InputError, TokenizerError

MAX_BYTES = 1 << 26  # Mixtral's file has 0.5 MB, the largest known ones about 5 MB
SPACE = "\u2581"  # how sentencepiece writes a space inside a piece
REPLACEMENT = "\ufffd"
ANCHOR = "\0"  # a character that merges with nothing; see encode_continuation

# What a piece is when it is decoded; SPACED: text that begins with SPACE.
TEXT, SPACED, BYTE, SILENT = range(4)


def _load(path: Path) -> SentencePieceProcessor:
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise TokenizerError(f"{path} has {size} bytes, expected a sentencepiece model of 1 to {MAX_BYTES}: download it again")
        data = path.read_bytes()
    except OSError as e:
        raise TokenizerError(f"cannot read the tokenizer {path}: {e.strerror or e}") from e
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise TokenizerError(f"{path} is not a sentencepiece model ({reason}): download tokenizer.model again") from e


class Tokenizer:
    """A sentencepiece model. Safe to share between threads: nothing changes after construction.

    path: the file tokenizer.model. bos_id: the id that opens a text if the file names none.
    Raises TokenizerError for a file that cannot be read or is no sentencepiece model.
    """

    def __init__(self, path, bos_id: int | None = None):
        self.path = Path(path)
        self._model = _load(self.path)
        self.vocab_size: int = self._model.vocab_size()
        own_bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id: int | None = own_bos if own_bos >= 0 else bos_id
        self.eos_id: int | None = eos if eos >= 0 else None
        try:
            self._read_pieces()
        except (RuntimeError, ValueError, IndexError) as e:  # UnicodeDecodeError is a ValueError
            raise TokenizerError(f"{self.path} holds a malformed piece ({str(e)[:200]}): download tokenizer.model again") from e

    @classmethod
    def for_model(cls, path, config: Config) -> "Tokenizer":
        """The tokenizer of a model; TokenizerError if it has more ids than the model.

        Fewer is common (the vocabulary is padded to a round number): the spare ids are never sampled.
        """
        tokenizer = cls(path, bos_id=config.bos_id)
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{path} has {tokenizer.vocab_size} tokens, the model's vocabulary only {config.vocab_size}: they are of different models"
            )
        return tokenizer

    def _read_pieces(self) -> None:
        """Tables by id: kind, and text or byte value; and how a first space is treated."""
        model = self._model
        self._kinds = bytearray(self.vocab_size)
        self._values: list = [None] * self.vocab_size
        for id in range(self.vocab_size):
            piece = model.id_to_piece(id)
            if model.is_control(id):
                self._kinds[id] = SILENT
            elif model.is_byte(id):
                self._kinds[id] = BYTE
                self._values[id] = int(piece[3:5], 16)  # <0x0A>
            elif model.is_unknown(id):
                self._values[id] = model.decode([id])  # " ⁇ ", unless the file has another text for it
            else:
                self._kinds[id] = SPACED if piece.startswith(SPACE) else TEXT
                self._values[id] = piece.replace(SPACE, " ")
        self._drops_space, self._drops_all_spaces = self._probe_spaces()

    def _probe_spaces(self) -> tuple[bool, bool]:
        """Whether decoding drops a text's first space, and whether it drops all single-space pieces there.

        The file's settings add_dummy_prefix and remove_extra_whitespaces decide; sentencepiece does not tell them.
        """
        alone = self._model.piece_to_id(SPACE)
        if self._kinds[alone] == SPACED:
            left = self._model.decode([alone, alone])
            return len(left) < 2, not left
        other = self._kinds.find(SPACED)
        return other >= 0 and self._model.decode([other]) != self._values[other], False

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text that stands by itself, with the bos id in front if asked. InputError if it is not Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            found = text[e.start]
            raise InputError(
                f"the text holds {found!a} at position {e.start}, half of a character or a stray byte: give valid UTF-8 text"
            ) from e
        ids = self._model.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on where another ended: no bos and no space put in front of its first word.

        The text is encoded behind a character that is always a byte token of its own; what follows it is the answer.
        """
        ids = self.encode(ANCHOR + text, bos=False)
        anchor = self._model.piece_to_id("<0x00>")
        if self._kinds[anchor] == BYTE and anchor in ids:
            return ids[ids.index(anchor) + 1 :]
        return self.encode(text, bos=False)  # no byte tokens: the best such a vocabulary can do

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids as sentencepiece gives it; bytes that are no UTF-8 become U+FFFD each.

        Control ids and the model's spare ids (from vocab_size on) have no text. InputError for a negative id.
        """
        ids = [int(id) for id in ids]
        if ids and min(ids) < 0:
            raise InputError(f"token id {min(ids)} is negative, expected 0 to {self.vocab_size - 1}")
        return self._model.decode([id for id in ids if id < self.vocab_size])

    def stream_decoder(self, context: Iterable[int] = ()) -> "StreamDecoder":
        """A decoder that takes one id at a time. context: ids before the first one, whose text is not repeated."""
        decoder = StreamDecoder(self)
        for id in context:
            decoder.push(id)
        return decoder


class StreamDecoder:
    """Gives the text of a growing sequence, piece by piece; the pieces joined equal Tokenizer.decode of all ids.

    Each push costs the same however long the text: what is kept is at most three bytes of an unfinished
    character and whether the text has begun.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._begun = not tokenizer._drops_space
        self._bytes = b""

    def push(self, id: int) -> str:
        """The text that this id completes; "" while a character made of bytes is unfinished."""
        tokenizer = self._tokenizer
        if id >= tokenizer.vocab_size:
            return ""
        kind, value = tokenizer._kinds[id], tokenizer._values[id]
        if kind == BYTE:
            text, self._bytes = take_utf8(self._bytes + bytes((value,)), final=False)
            self._begun = True  # bytes always leave some text, if only U+FFFD
            return text
        text = self.finish()
        if kind == SILENT:
            return text
        if not self._begun:
            if kind == SPACED:
                value = value[1:]
                self._begun = not tokenizer._drops_all_spaces
            self._begun = self._begun or bool(value)
        return text + value

    def finish(self) -> str:
        """The text of a character that will not be finished: U+FFFD for each of its bytes."""
        text, self._bytes = take_utf8(self._bytes, final=True)
        return text


def take_utf8(data: bytes, final: bool) -> tuple[str, bytes]:
    """(text, rest): the characters in front of data, and an unfinished one at its end unless `final`.

    As sentencepiece does it: a byte that begins no valid character is U+FFFD by itself. (Python's own
    errors="replace" makes one U+FFFD of several bytes.)
    """
    out, at = [], 0
    while at < len(data):
        lead = data[at]
        size = 1 if lead < 0x80 else 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
        character = data[at : at + size]
        if len(character) < size and not final and all(0x80 <= byte < 0xC0 for byte in character[1:]):
            break
        try:
            text = character.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        out.append(text or REPLACEMENT)
        at += size if text else 1
    return "".join(out), data[at:]
