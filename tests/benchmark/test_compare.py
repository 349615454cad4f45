import copy
import json

import pytest

from npmix.benchmark import compare, read_result
from npmix.benchmark.compare import LAYOUT, figures, within_spread
from npmix.errors import InputError


def span(median, low=None, high=None):
    return {"median": median, "min": median if low is None else low, "max": median if high is None else high}


@pytest.fixture
def result():
    """A result as `benchmark` returns it, with made-up figures."""
    attention = {"operations": 5, "seconds": span(0.1), "share_of_float32": span(0.7), "rest_share_of_int8": span(0.8)}
    return {
        "bench": LAYOUT,
        "date": "2026-01-01T00:00:00Z",
        "machine": {"cpu": "x", "cores": 2, "system": "s", "int8_form": "plain", "python": "3", "numba": "0", "npmix": "0"},
        "model": {"path": "m", "layers": 2, "dim": 64, "format": "q8"},
        "settings": {"kv": "f16", "turns": 3},
        "start": {"cold_s": 10.0, "warm_s": 1.0, "what": "w"},
        "memory": {"anonymous": 1000000, "held": {}},
        "ceilings": [{"threads": 1, "read_gbs": span(10.0, 9.0, 11.0), "int8_gops": span(100.0), "float32_gops": span(30.0)}],
        "prefill": [
            {"threads": 1, "tokens": 16, "chunk": 16, "tokens_per_s": span(50.0, 40.0, 60.0), "share": span(0.5), "attention": attention}
        ],
        "decode": [
            {"threads": 1, "tokens": 8, "depth": 0, "tokens_per_s": span(5.0, 4.0, 6.0), "share": span(0.9), "outside_ms": span(0.0)}
        ],
        "scaling": [
            {
                "kind": "decode",
                "tokens": 8,
                "depth": 0,
                "chunk": 0,
                "threads": 2,
                "against": 1,
                "ratio": span(1.9),
                "ceiling_ratio": span(2),
            }
        ],
    }


def test_a_result_against_itself(result):
    """No property differs, no figure is missing, every ratio is 1 and within the spread; 0 against 0 has no ratio."""
    found = compare(result, copy.deepcopy(result))
    assert found["differs"] == found["only_old"] == found["only_new"] == []
    assert [row["name"] for row in found["figures"]] == list(figures(result))
    assert all(row["within_spread"] for row in found["figures"])
    assert {row["ratio"] for row in found["figures"] if row["name"] != "decode 8 at 0, 1 thread: outside kernels"} == {1.0}
    assert next(row["ratio"] for row in found["figures"] if row["name"].endswith("outside kernels")) is None


def test_what_changed(result):
    """The ratio is new by old; a figure beyond the spread, other settings and figures of one side alone are told."""
    new = copy.deepcopy(result)
    new["decode"][0]["tokens_per_s"] = span(10.0, 7.0, 12.0)
    new["prefill"][0].update(tokens=32)
    new["settings"]["kv"], new["machine"]["cpu"] = "f32", "y"
    del new["start"]
    found = compare(result, new)
    (row,) = [row for row in found["figures"] if row["name"] == "decode 8 at 0, 1 thread"]
    assert row["ratio"] == 2.0 and row["within_spread"] is False
    assert found["differs"] == [{"what": "machine cpu", "old": "x", "new": "y"}, {"what": "settings kv", "old": "f16", "new": "f32"}]
    assert "prefill 16, chunk 16, 1 thread" in found["only_old"] and "cold start" in found["only_old"]
    assert "prefill 32, chunk 16, 1 thread: share of ceiling" in found["only_new"]


@pytest.mark.parametrize(
    "old, new, expected",
    [
        (span(5, 4, 6), span(6, 6, 8), True),
        (span(5, 4, 6), span(7, 5, 8), True),
        (span(5, 4, 6), span(7, 6, 8), False),
        (span(5), span(5), True),
        (span(5), span(6), None),
        (span(5), span(6, 5, 7), True),
        (span(5), span(7, 6, 8), False),
    ],
)
def test_within_the_spread(old, new, expected):
    """Either median between the other's least and most; of figures that were both measured once nothing is known."""
    assert within_spread(old, new) is expected


def change(result, *keys, to):
    for key in keys[:-1]:
        result = result[key]
    result[keys[-1]] = to


@pytest.mark.parametrize(
    "keys, to",
    [
        (("bench",), LAYOUT + 1),
        (("bench",), None),
        (("ceilings",), 5),
        (("ceilings",), [5]),
        (("prefill", 0, "share"), None),
        (("prefill", 0, "share", "min"), float("nan")),
        (("prefill", 0, "tokens"), "16"),
        (("decode", 0, "tokens_per_s", "median"), True),
        pytest.param(("decode", 0, "tokens_per_s", "median"), 10**400, id="larger than any float"),
        (("machine",), []),
        (("machine",), {}),
        (("start",), None),
        (("memory",), {}),
        (("date",), None),
    ],
)
def test_damaged_results(result, tmp_path, keys, to):
    """A field that is missing or of another kind is an InputError that names the file."""
    change(result, *keys, to=to)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match="a.json"):
        read_result(file)


def test_the_same_row_twice(result, tmp_path):
    """Two rows of one name cannot be compared."""
    result["decode"] *= 2
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match="twice"):
        read_result(file)


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "{}", '{"a": 1}', "[" * 100000, "\x00", '{"bench": "2"}'])
def test_foreign_files(tmp_path, text):
    """Whatever is no result is an InputError."""
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError, match="npmix bench"):
        read_result(file)


def test_files_that_cannot_be_read(tmp_path):
    """A file that is not there, a folder, one far too large."""
    with pytest.raises(InputError, match="cannot read"):
        read_result(tmp_path / "no.json")
    with pytest.raises(InputError):
        read_result(tmp_path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="bytes"):
        read_result(tmp_path / "large")
