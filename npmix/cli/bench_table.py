"""The words of `npmix bench`: a result, or two compared, as lines for people.

One hard fact: every figure is a median with its least and most in brackets; a figure alone was measured once.
"""

from .notices import size

BOUNDS = {"read": "memory read", "int8": "int8 peak"}
LONG = 512  # tokens from which attention's share is worth a look


def _plain(value: float) -> str:
    """Three figures, or thousandths: 0.086, 9.31, 28.6, 469, 24,937."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def _span(of: dict) -> str:
    """Median and, in brackets, least and most."""
    if of["min"] == of["max"]:
        return _plain(of["median"])
    return f"{_plain(of['median'])} ({_plain(of['min'])}-{_plain(of['max'])})"


def _share(of: dict) -> str:
    if of["min"] == of["max"]:
        return f"{100 * of['median']:.0f} %"
    return f"{100 * of['median']:.0f} % ({100 * of['min']:.0f}-{100 * of['max']:.0f})"


def _table(label: str, head: list[str], rows: list[list[str]], left: int = 0):
    """Rows below a head, columns right-aligned but the first `left`; the label stands before the head."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for number, row in enumerate([head, *rows]):
        cells = [cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        yield f"{'' if number else label:<10}{'  '.join(cells)}".rstrip()


def result_lines(found: dict):
    """One result of `npmix.benchmark.benchmark`."""
    on, model, settings = found["machine"], found["model"], found["settings"]
    yield f"machine   {on['cpu']}, {on['cores']} cores, {on['system']}, int8 form {on['int8_form']}"
    yield f"software  npmix {on['npmix']}, numba {on['numba']}, Python {on['python']}"
    yield f"model     {model['path']}: {model['layers']} layer{'' if model['layers'] == 1 else 's'}, {model['format']}"
    yield f"setting   KV cache {settings['kv']}, medians of {settings['turns']} turns (least-most)"
    ceilings = [
        [str(row["threads"]), _span(row["read_gbs"]), _span(row["int8_gops"]), _span(row["float32_gops"])] for row in found["ceilings"]
    ]
    yield from _table("ceilings", ["threads", "memory read, GB/s", "int8, GOP/s", "float32, GOP/s"], ceilings)
    if "start" in found:
        start, memory = found["start"], found["memory"]
        yield f"start     cold {start['cold_s']:.2f} s, warm {start['warm_s']:.2f} s to the first token ({start['what']})"
        if memory["anonymous"] is not None:
            yield f"memory    {size(memory['anonymous'])} anonymous, {size(memory['held']['kv_cache'])} of it the KV cache"
    head = ["threads", "tokens", "chunk", "tok/s", "GOP/s", "of the ceiling", "which is", "attention of float32", "the rest of int8"]
    yield from _table("prefill", head, [_prefill(row) for row in found["prefill"]])
    head = ["threads", "depth", "tok/s", "a token", "GB/s", "of memory read", "outside kernels, ms", "dispatch", "sampling"]
    yield from _table("decode", head, [_decode(row) for row in found["decode"]])
    if found["scaling"]:
        head = ["threads", "against", "work", "times as fast", "the ceiling"]
        yield from _table("scaling", head, [_scaling(row) for row in found["scaling"]])


def _prefill(row: dict) -> list[str]:
    of = row["attention"]
    apart = [_share(of["share_of_float32"]), _share(of["rest_share_of_int8"])] if row["tokens"] >= LONG else ["", ""]
    speed = [_span(row["tokens_per_s"]), _span(row["gops"]), _share(row["share"]), BOUNDS[row["bound"]]]
    return [str(row["threads"]), f"{row['tokens']:,}", f"{row['chunk']:,}", *speed, *apart]


def _decode(row: dict) -> list[str]:
    speed = [_span(row["tokens_per_s"]), size(row["bytes_per_token"]), _span(row["gbs"]), _share(row["share"])]
    outside = [_span(row["outside_ms"]), _plain(row["dispatch_ms"]["median"]), _plain(row["sampling_ms"]["median"])]
    return [str(row["threads"]), f"{row['depth']:,}", *speed, *outside]


def _scaling(row: dict) -> list[str]:
    work = f"prefill {row['tokens']:,}, chunk {row['chunk']:,}" if row["kind"] == "prefill" else f"decode at {row['depth']:,}"
    return [str(row["threads"]), str(row["against"]), work, _span(row["ratio"]), _span(row["ceiling_ratio"])]


def comparison_lines(old_path, new_path, old: dict, new: dict, found: dict):
    """Two results and what `npmix.benchmark.compare` found."""
    yield f"old       {old_path}, {old['date']}"
    yield f"new       {new_path}, {new['date']}"
    for row in found["differs"]:
        yield f"differs   {row['what']}: {row['old']} / {row['new']}"
    if any(row["what"] in ("machine cpu", "machine cores") for row in found["differs"]):
        yield "          the machines differ: shares of the ceilings compare, speeds do not"
    rows = []
    for row in found["figures"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        note = {None: "measured once", True: "within the spread", False: "beyond the spread"}[row["within_spread"]]
        unit = row["unit"] if row["unit"] not in ("share", "ratio") else ""
        span = _share if row["unit"] == "share" else _span
        rows.append([row["name"], unit, span(row["old"]), span(row["new"]), ratio, note])
    yield from _table("figures", ["", "", "old", "new", "ratio", ""], rows, left=2)
    for key, word in (("only_old", "old"), ("only_new", "new")):
        names = dict.fromkeys(name.split(": ")[0] for name in found[key])
        if names:
            yield f"only {word}  {'; '.join(names)}"
