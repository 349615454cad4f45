"""Which tokens are scored, against loops written down from the two definitions."""

import pytest

from npmix.errors import InputError
from npmix.evaluation.windows import make_plan

BOS = 1


def text(count):
    """ids 1, 100, 101, ...: each token tells where it stands."""
    return [BOS, *range(100, 99 + count)]


def found(plan):
    """[(ids fed before the token, token)] of everything scored."""
    out = []
    for window in plan.windows:
        fed, targets = plan.fed(window), plan.targets(window)
        assert (len(fed), len(targets)) == (window.fed, window.scored)
        out += [(fed[: window.first + 1 + i], token) for i, token in enumerate(targets)]
    return out


@pytest.mark.parametrize("context", [4, 5, 8, 13])
@pytest.mark.parametrize("count", [13, 26, 27, 40])
def test_side_by_side(count, context):
    """llama.cpp: token j of a window, n_ctx/2 < j < n_ctx, is predicted by bos and the window's tokens 1 .. j - 1; the rest is dropped."""
    ids = text(count)
    expected = []
    for chunk in range(count // context):
        tokens = ids[chunk * context : (chunk + 1) * context]
        tokens[0] = BOS
        expected += [(tokens[: j + 1], tokens[j + 1]) for j in range(context // 2, context - 1)]
    assert found(make_plan(ids, context, None, BOS)) == expected


def test_without_bos():
    """A tokenizer that adds no bos id: windows keep their first token."""
    plan = make_plan(list(range(100, 120)), 10, None, None)
    assert [plan.fed(w)[0] for w in plan.windows] == [100, 110]


@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("count", [2, 7, 8, 9, 16, 17, 29])
def test_strided(count, stride):
    """Hugging Face's guide: targets behind prev_end only, less the first of a window; and its weights, loss times (trg_len - 1)."""
    ids, context = text(count), 8
    expected, weights, prev_end = [], [], 0
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        labels = [None] * (end - begin)
        trg_len = end - prev_end
        labels[-trg_len:] = ids[begin:end][-trg_len:]
        shifted = [(ids[begin : begin + i], label) for i, label in enumerate(labels) if i and label is not None]
        expected += shifted
        weights += [(trg_len - 1) / len(shifted)] * len(shifted) if shifted else []
        prev_end = end
        if end == count:
            break
    plan = make_plan(ids, context, stride, BOS)
    assert found(plan) == expected
    assert [w.guide_weight for w in plan.windows for _ in range(w.scored)] == weights
    assert [token for _, token in expected] == ids[1:] or stride == context  # each token once; without overlap a window's first is lost


@pytest.mark.parametrize("stride", [None, 3])
def test_limit(stride):
    """limit: the first windows and no others; more than there are is all."""
    whole, some = make_plan(text(60), 8, stride, BOS), make_plan(text(60), 8, stride, BOS, limit=3)
    assert some.windows == whole.windows[:3]
    assert make_plan(text(60), 8, stride, BOS, limit=1000).windows == whole.windows


@pytest.mark.parametrize("count, context, stride", [(1, 8, 4), (7, 8, None), (1, 8, None), (511, 512, None)])
def test_too_short(count, context, stride):
    """A text that fills no window is an error that says how many tokens it has."""
    with pytest.raises(InputError, match=f"text has {count} tokens.*longer"):
        make_plan(text(count), context, stride, BOS)


@pytest.mark.parametrize(
    "name, values",
    [("context", (0, 3, -5, 1 << 30, 8.0, True)), ("stride", (0, 9, -1, 4.0, "4")), ("limit", (0, -1, 2.0, True))],
)
def test_numbers_out_of_range(name, values):
    """A window, stride or limit that makes no sense is an InputError that names it."""
    for value in values:
        with pytest.raises(InputError, match=f"{name} is "):
            make_plan(text(100), **{"context": 8, "stride": None, "bos_id": BOS, "limit": None, name: value})
