"""Mixtral on a CPU, from Python: `npmix.load(path).generate(prompt)`.

One hard fact: importing this loads neither numba, sentencepiece nor safetensors; what needs them comes on first use.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Engine", "Model", "NpmixError", "__version__", "errors", "evaluate", "load"]

_WHERE = {"Engine": "engine", "Model": "generate", "NpmixError": "errors", "evaluate": "evaluation", "load": "generate"}


def __getattr__(name: str):
    if name in _WHERE:
        value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    elif name == "errors":
        value = import_module(".errors", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
