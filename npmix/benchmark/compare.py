"""Two saved results of `npmix bench` side by side: which figures moved, and by more than they move by themselves.

One hard fact: two results come from different minutes, and a shared machine's speed changes by the minute: shares of the
ceilings compare, speeds compare only beside the ceilings they were measured with.
"""

import json
import math
from pathlib import Path

from ..errors import InputError

LAYOUT = 2  # of a result: the one that `measure` writes and that is read here
LARGEST = 16 << 20  # bytes of a file that is read; a result has some kilobytes
DESCRIBED = {
    "machine": ("cpu", "cores", "system", "int8_form", "python", "numba", "npmix"),
    "model": ("path", "layers", "dim", "format"),
    "settings": ("kv", "turns"),
}


def read_result(path) -> dict:
    """The result in a file that `npmix bench --json` wrote, checked; InputError for any other file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise InputError(f"{path} has more than {LARGEST} bytes, expected a result of `npmix bench --json`")
        found = json.loads(data)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not valid JSON ({str(e)[:120]}), expected a result of `npmix bench --json`") from None
    if not isinstance(found, dict) or found.get("bench") != LAYOUT:
        raise InputError(f"{path} is no result of this version's `npmix bench --json`; measure again")
    try:
        figures(found)
        _described(found)
        if not isinstance(found["date"], str):
            raise TypeError("the date is no text")
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise InputError(f"{path} is a damaged result of `npmix bench` ({type(e).__name__}: {str(e)[:80]}); measure again") from None
    return found


def figures(found: dict) -> dict[str, dict]:
    """Every figure of a result by its name: {"unit", "median", "min", "max"}; the units "share" and "ratio" are plain numbers."""
    out: dict[str, dict] = {}

    def put(name, unit, of):
        if name in out:
            raise ValueError(f"{name} twice")
        out[name] = {"unit": unit, **{key: _number(of[key]) for key in ("median", "min", "max")}}

    def put_one(name, unit, value):
        put(name, unit, {"median": value, "min": value, "max": value})

    for row in found["ceilings"]:
        on = _threads(row)
        put(f"memory read, {on}", "GB/s", row["read_gbs"])
        put(f"int8 peak, {on}", "GOP/s", row["int8_gops"])
        put(f"float32 peak, {on}", "GOP/s", row["float32_gops"])
    for row in found["prefill"]:
        name = f"prefill {row['tokens']:d}, chunk {row['chunk']:d}, {_threads(row)}"
        put(name, "tok/s", row["tokens_per_s"])
        put(f"{name}: share of ceiling", "share", row["share"])
        put(f"{name}: attention's share of float32", "share", row["attention"]["share_of_float32"])
        put(f"{name}: the rest's share of int8", "share", row["attention"]["rest_share_of_int8"])
    for row in found["decode"]:
        name = f"decode {row['tokens']:d} at {row['depth']:d}, {_threads(row)}"
        put(name, "tok/s", row["tokens_per_s"])
        put(f"{name}: share of ceiling", "share", row["share"])
        put(f"{name}: outside kernels", "ms", row["outside_ms"])
    for row in found["scaling"]:
        work = (
            f"prefill {row['tokens']:d}, chunk {row['chunk']:d}"
            if row["kind"] == "prefill"
            else f"decode {row['tokens']:d} at {row['depth']:d}"
        )
        name = f"{work}: {row['threads']:d} threads against {row['against']:d}"
        put(name, "ratio", row["ratio"])
        put(f"{name}, ceiling", "ratio", row["ceiling_ratio"])
    if "start" in found:
        put_one("cold start", "s", found["start"]["cold_s"])
        put_one("warm start", "s", found["start"]["warm_s"])
        if found["memory"]["anonymous"] is not None:
            put_one("anonymous memory", "MB", found["memory"]["anonymous"] / 1e6)
    return out


def _threads(row: dict) -> str:
    return f"{row['threads']:d} thread{'' if row['threads'] == 1 else 's'}"


def _number(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _described(found: dict) -> dict[str, str]:
    """What a result was measured on and with, by name, as text."""
    return {f"{part} {name}": str(found[part][name]) for part, names in DESCRIBED.items() for name in names}


def within_spread(old: dict, new: dict) -> bool | None:
    """Whether either median lies between the other's least and most; None where neither was measured more than once."""
    if old["min"] == old["max"] and new["min"] == new["max"] and old["median"] != new["median"]:
        return None
    return new["min"] <= old["median"] <= new["max"] or old["min"] <= new["median"] <= old["max"]


def compare(old: dict, new: dict) -> dict:
    """Two results (`read_result`) as {"differs", "figures", "only_old", "only_new"}.

    differs: [{"what", "old", "new"}], each property of machine, model and settings that is not the same. figures: a list of
    {"name", "unit", "old", "new", "ratio", "within_spread"}: old and new are {"median", "min", "max"}, ratio is new by
    old (None if that is next to 0), within_spread as the function says. only_old, only_new: names of figures the other one lacks.
    """
    ours, theirs = figures(new), figures(old)
    words, before = _described(new), _described(old)
    rows = []
    for name in theirs:
        if name in ours:
            a, b = theirs[name], ours[name]
            ratio = b["median"] / a["median"] if a["median"] else math.inf
            sides = {"old": {k: a[k] for k in ("median", "min", "max")}, "new": {k: b[k] for k in ("median", "min", "max")}}
            rows.append(
                {
                    "name": name,
                    "unit": a["unit"],
                    **sides,
                    "ratio": ratio if math.isfinite(ratio) else None,
                    "within_spread": within_spread(a, b),
                }
            )
    return {
        "differs": [{"what": what, "old": before[what], "new": words[what]} for what in before if before[what] != words[what]],
        "figures": rows,
        "only_old": [name for name in theirs if name not in ours],
        "only_new": [name for name in ours if name not in theirs],
    }
