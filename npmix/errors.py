"""Every error npmix raises on purpose: one tree, so `except NpmixError` catches them all.

The command line prints these as one line on stderr and exits with 1; a message says what
was found, what was expected and what to do.
"""


class NpmixError(Exception):
    """Base of all errors of this package."""


class ConfigError(NpmixError):
    """A model's configuration is missing, malformed or asks for arithmetic npmix does not have."""


class CheckpointError(NpmixError):
    """Foreign weight files (Hugging Face) are missing, truncated or not what their headers claim."""


class StoreError(NpmixError):
    """A packed store is missing, damaged, half-written, locked or of a newer version."""


class ConversionError(NpmixError):
    """A conversion cannot start or cannot go on (space, permission, bad weights)."""


class CalibrationError(NpmixError):
    """A calibration cannot start or go on, or its file is damaged or made for another model."""


class TokenizerError(NpmixError):
    """A tokenizer file cannot be read or does not fit the model."""


class InputError(NpmixError):
    """A prompt, token id or option lies outside what the model takes."""


class ContextError(InputError):
    """More positions were asked for than the KV cache holds."""


class LogitsFileError(NpmixError):
    """A file of saved log-probabilities is missing, damaged, or of another text, vocabulary or setting."""


class EngineError(NpmixError):
    """The engine cannot run now: closed, busy in this thread, or used after a fork."""


class NumericsError(NpmixError):
    """Logits are not finite; the message names the first layer whose output is not."""
