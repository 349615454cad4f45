"""How fast a model runs here, as a share of what this machine can do.

One hard fact: memory bandwidth on a shared machine halves and doubles for minutes at a time, so the ceilings are
measured in turns with the program, and shares are medians over the turns, never quotients of two medians.

`needs` counts what work must read and compute, `measure` times it, `starts` times whole processes, `compare` holds two saved
results side by side, `host` says what all this ran on, `disk` how fast files are read. Importing this package loads none of
numba, numpy, safetensors.
"""

from .compare import LAYOUT, compare, read_result
from .disk import disk_speed
from .host import anonymous_memory, machine, peak_memory, weight_formats
from .measure import benchmark, make_plan, token_ids
from .needs import attention_operations, decode_bytes, prefill_ceiling, prefill_operations, prompt_bytes

__all__ = [
    "LAYOUT",
    "anonymous_memory",
    "attention_operations",
    "benchmark",
    "compare",
    "decode_bytes",
    "disk_speed",
    "machine",
    "make_plan",
    "peak_memory",
    "prefill_ceiling",
    "prefill_operations",
    "prompt_bytes",
    "read_result",
    "token_ids",
    "weight_formats",
]
