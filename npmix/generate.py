"""A loaded model: text in, text out.

    with npmix.load() as model:
        for piece in model.stream("def fibonacci(n):"):
            print(piece, end="", flush=True)

One hard fact: this is the layer where text and ids meet; the engine below knows ids only. A model may be used from
several threads: their calls queue.
"""

import operator
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from .chat import encode_chat, encode_user, end_id
from .config import Config
from .engine import Engine
from .errors import ContextError, EngineError, InputError, StoreError, TokenizerError
from .sampling import Sampling, check_number
from .stream import Request, Stats, Stream, Turns
from .tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parent / "bundled"
MAX_SEED = (1 << 64) - 1
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024


def load(path=None, *, threads: int | None = None, context: int | None = None, chunk: int | None = None, kv: str = "f16",
         ram=None, load: str | None = None) -> "Model":  # fmt: skip
    """Open a model: a Hugging Face folder or a packed store; without a path the small one that npmix brings.

    threads: default the physical cores. context: positions of the KV cache, default the smaller of the model's maximum and
    4096. chunk: prompt tokens computed at once. kv: "f16", "f32" or "q8" (8 bits), how keys and values are kept.
    ram: memory for the whole process, as "8G", bytes, a share of what the machine has, or "auto"; experts that do not fit are
    read from the packed store when they are wanted. load: "map" or "read" the weights; see `Engine`.
    Raises a NpmixError that says what is wrong with the folder or an option.
    """
    bundled = path is None or Path(path).resolve() == BUNDLED
    if path is None and not (BUNDLED / "npmix.json").exists():
        raise StoreError(f"this installation of npmix lacks its bundled model in {BUNDLED}: install it again, or give a model's folder")
    engine = Engine(BUNDLED if path is None else path, threads=threads, context=context, chunk=chunk, kv=kv, ram=ram, load=load)
    try:
        file = engine.source.tokenizer_path
        tokenizer = Tokenizer.for_model(file, engine.config) if file else None
        return Model(engine, tokenizer, engine.source.is_instruct, is_bundled=bundled)
    except BaseException:
        engine.close()
        raise


class Model:
    """An engine with its tokenizer. Made by `load`; close it, or use it in `with`."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, is_instruct: bool, is_bundled: bool = False):
        self.engine = engine
        self.is_instruct = is_instruct
        self.is_bundled = is_bundled
        self.turns = Turns()
        self._tokenizer = tokenizer
        self._cached: list[int] = []  # the ids whose keys and values the cache holds

    @property
    def config(self) -> Config:
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer:
        """TokenizerError if the model's folder has none."""
        if self._tokenizer is None:
            raise TokenizerError(f"{self.engine.source.path} has no tokenizer.model: copy it from where the weights came from")
        return self._tokenizer

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        on_progress: Callable | None = None,
    ) -> Stream:
        """An iterator over pieces of the text that follows a prompt; its `stats` hold ids, times and why it ended.

        prompt: text (the bos id is put in front) or ids as they are. temperature: default 0 (greedy) for the
        bundled model, else 0.7; top_p: default 0.95; the rest as in `Sampling`. seed: 0 to 2^64 - 1; the same
        seed gives the same text on any number of threads; default a random one, kept in `stats`. stop: strings
        that end the text and are not part of it. ignore_eos: go on after the model's end token. on_progress: passed
        on to `Engine.prefill`. All options are checked at once; the model is taken at the first `next`.

        Raises InputError, ContextError (no room for a token behind the prompt), EngineError (closed, or another
        stream is open in this thread), NumericsError.
        """
        ids = self._prompt_ids(prompt)
        return self.start(
            ids, context=ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop, ignore_eos=ignore_eos, on_progress=on_progress,
        )  # fmt: skip

    def generate(self, prompt: str | Sequence[int], **options) -> str:
        """The text that follows a prompt. Options as `stream`."""
        return "".join(self.stream(prompt, **options))

    def chat_stream(self, messages: Sequence[Mapping[str, str]], **options) -> Stream:
        """The answer to a conversation in Mixtral's instruct format; see `chat.encode_chat`. Options as `stream`."""
        return self.start(encode_chat(self.tokenizer, messages), context=[], **options)

    def chat(self, messages: Sequence[Mapping[str, str]], **options) -> str:
        """The answer to a conversation as text. Arguments as `chat_stream`."""
        return "".join(self.chat_stream(messages, **options))

    def session(self, *, chat: bool | None = None, system: str = "") -> "Session":
        """A conversation (or, with chat false, a text) that grows and keeps its KV cache between turns."""
        return Session(self, self.is_instruct if chat is None else chat, system)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (T, V): row t holds the logits of the token after ids[: t + 1]. InputError, ContextError."""
        ids = self._check_ids(ids)
        mark: list[int] = []
        try:
            self.turns.take(mark)
            with self.turns.running():
                self._cached = []
                return self.engine.logits(ids)
        finally:
            self.turns.give(mark)

    def close(self) -> None:
        """Free the cache and the maps. Waits for the engine's running call; open streams raise at their next piece."""
        if self.turns.closed or self.turns.forked:
            return
        with self.turns.running():
            self.turns.closed = True
            self.engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def start(self, ids: list[int], *, context: list[int], reuse: bool = False, temperature=None, top_p=None, seed=None, stop=(),
              max_tokens=256, ignore_eos=False, on_progress=None, **sampling) -> Stream:  # fmt: skip
        """The stream of a prompt given as ids; checks all options. context: ids whose text the answer goes on from."""
        self.turns.check_free()
        if temperature is None:
            temperature = 0.0 if self.is_bundled else 0.7
        settings = Sampling(temperature=temperature, top_p=0.95 if top_p is None else top_p, **sampling)
        check_number("max_tokens", max_tokens, 1, (1 << 31) - 1)
        if seed is None:
            seed = random.SystemRandom().getrandbits(32)
        check_number("seed", seed, 0, MAX_SEED)
        if len(ids) + 1 > self.engine.context:
            raise ContextError(
                f"the prompt has {len(ids)} tokens, the context {self.engine.context} positions, and the answer needs one or more: "
                "shorten the prompt or raise the context (--context)"
            )
        request = Request(ids, context, settings, int(seed), max_tokens, check_stops(stop), ignore_eos, reuse, on_progress)
        return Stream(self, request)

    def feed(self, ids: list[int], reuse: bool, on_progress) -> tuple[np.ndarray, int]:
        """(logits after ids, ids found in the cache): fill the cache with ids. Only for who has the turn."""
        engine, common = self.engine, 0
        if reuse and engine.position == len(self._cached):
            # At least the last id is computed again, for its logits. Equal ids give equal bits, cached or not.
            common = common_prefix(self._cached, ids[:-1])
            if self.config.sliding_window and common != engine.position:
                common = 0  # a ring has overwritten what a shorter prefix would need
        engine.reset(common)
        self._cached = ids[:common]
        try:
            return engine.prefill(ids[common:], on_progress), common
        finally:  # an interrupted prefill leaves whole chunks behind
            self._cached = ids[: engine.position]

    def step(self, id: int) -> np.ndarray:
        """Logits after one more id. Only for who has the turn."""
        try:
            return self.engine.step(id)
        finally:
            if self.engine.position > len(self._cached):
                self._cached.append(id)

    def _prompt_ids(self, prompt) -> list[int]:
        if not isinstance(prompt, str):
            return self._check_ids(prompt)
        if not prompt:
            raise InputError("the prompt is empty: give some text")
        return self.tokenizer.encode(prompt)

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        try:
            ids = [operator.index(id) for id in ids]
        except TypeError as e:
            raise InputError(f"the prompt is {type(ids).__name__}, expected text or a list of token ids") from e
        if not ids:
            raise InputError("the prompt is empty: give at least one token")
        for id in (min(ids), max(ids)):
            if not 0 <= id < self.config.vocab_size:
                raise InputError(f"token id {id} is outside the vocabulary, expected 0 to {self.config.vocab_size - 1}")
        return ids


class Session:
    """A text that grows by turns: what is said is fed, the model goes on, and nothing is computed twice.

    A chat session feeds questions in the instruct format; the model's answers stay the ids it made. A plain one
    feeds text that continues what stands there. Other use of the model between turns costs only time.
    """

    def __init__(self, model: Model, chat: bool, system: str = ""):
        if not isinstance(system, str):
            raise InputError(f"system is {type(system).__name__}, expected text")
        if system and not chat:
            raise InputError("a system text needs a chat session")
        self.model = model
        self.is_chat = chat
        self.system = system
        self.reset()

    @property
    def ids(self) -> list[int]:
        """All ids so far. A turn counts from its first generated id on; before that it leaves no trace."""
        prompt, stats = self._turn
        return prompt + stats.ids if stats and stats.ids else list(self._ids)

    def reset(self) -> None:
        """Forget the conversation."""
        self._ids: list[int] = []
        self._turn: tuple[list[int], Stats | None] = [], None  # the last turn's prompt ids and figures

    def send(self, text: str, **options) -> Stream:
        """The model's answer to (or continuation of) a text. Options as `Model.stream`.

        Raises as `Model.stream`; ContextError when the conversation has outgrown the context: `reset` it.
        """
        if self._turn[1] and self._turn[1].ids and self._turn[1].stop_reason is None:
            raise EngineError("the answer before is still open: finish or close() its stream first")
        if not isinstance(text, str):
            raise InputError(f"the text is {type(text).__name__}, expected str")
        old = self.ids
        ids = self._append_question(old, text) if self.is_chat else self._append_text(old, text)
        stream = self.model.start(ids, context=[] if self.is_chat else ids, reuse=True, **options)
        self._ids, self._turn = old, (ids, stream.stats)
        return stream

    def _append_question(self, ids: list[int], text: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if not ids:
            return tokenizer.encode("") + encode_user(tokenizer, text, self.system)
        end = [] if ids[-1] in self.model.config.eos_ids else [end_id(tokenizer)]  # an answer that was cut ends here
        return ids + end + encode_user(tokenizer, text)

    def _append_text(self, ids: list[int], text: str) -> list[int]:
        tokenizer = self.model.tokenizer
        if not ids:
            if not text:
                raise InputError("the prompt is empty: give some text")
            return tokenizer.encode(text)
        while ids and ids[-1] in self.model.config.eos_ids:
            ids = ids[:-1]  # the text goes on where the model had ended it
        return ids + tokenizer.encode_continuation(text)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple, checked; one string stands for itself. InputError."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise InputError(f"{len(stops)} stop strings, expected at most {MAX_STOPS}")
    for s in stops:
        if not isinstance(s, str) or not 1 <= len(s) <= MAX_STOP_LENGTH:
            raise InputError(f"the stop string {str(s)[:40]!r} is not a text of 1 to {MAX_STOP_LENGTH} characters")
    return stops
