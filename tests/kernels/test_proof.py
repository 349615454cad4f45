"""The proof of the int8 dot and of the lookups: a right form passes, a wrong one is dropped with a warning, the outcome is kept."""

import pytest

from npmix.formats import PACKED, span_bytes
from npmix.kernels import _jit, cpu, proof

pytestmark = pytest.mark.compiled


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and nothing settled yet."""
    monkeypatch.setenv("NPMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "_wrong", set())
    _jit.cache_dir.cache_clear()
    proof.prove.cache_clear()
    yield
    _jit.cache_dir.cache_clear()
    proof.prove.cache_clear()


def test_this_machines_form_is_right(fresh):
    """The form chosen here gives the exact integers and reads every packed format, and each pass is noted so that the next process
    need not repeat it; formats that are not asked for are not looked at."""
    form = cpu.form()
    assert proof.dots_agree() and all(proof.unpacks(name) for name in PACKED)
    assert proof.prove() == proof.prove(tuple(PACKED)[:1]) == form
    notes = {path.name for path in _jit.cache_dir().glob("proved-*")}
    assert form == "plain" or notes == {f"proved-{form}", f"proved-{form}-{next(iter(PACKED))}"}
    assert proof.prove(tuple(PACKED)) == form
    assert form == "plain" or all((_jit.cache_dir() / f"proved-{form}-{name}").exists() for name in PACKED)


def test_what_was_proved_is_not_proved_again(fresh, monkeypatch):
    """With the notes of an earlier process no kernel of the proof is compiled."""
    assert proof.prove(tuple(PACKED)) == cpu.form()
    proof.prove.cache_clear()

    def never(*_):
        raise AssertionError("proved again")

    monkeypatch.setattr(proof, "dots_agree", never)
    monkeypatch.setattr(proof, "unpacks", never)
    assert proof.prove(tuple(PACKED)) == cpu.form()


def test_a_wrong_form_is_dropped(fresh, monkeypatch):
    """A form whose dots are off by one somewhere is found out, warned about and replaced by the plain one."""
    monkeypatch.setattr(cpu, "_best_form", lambda: "avx2")
    right = proof.dot_kernel

    def wrong(form):
        def run(codes, inputs, totals, out, count):
            right(cpu.FORMS[-1])(codes, inputs, totals, out, count)
            proof.poke(out, proof.peek(out, "int32", 1) + 1)

        return run

    monkeypatch.setattr(proof, "dot_kernel", wrong)
    with pytest.warns(UserWarning, match="avx2 form .* wrong"):
        assert proof.prove() == "plain"
    assert cpu.form() == "plain" and not (_jit.cache_dir() / "proved-avx2").exists()


@pytest.mark.parametrize("name", PACKED)
def test_a_wrong_lookup_is_dropped(fresh, monkeypatch, name):
    """A form that misreads one byte of one packed format is found out when a model has that format, and not before; the warning names the
    form, and the plain one takes its place."""
    monkeypatch.setattr(cpu, "_best_form", lambda: "avx2")
    monkeypatch.setattr(proof, "dots_agree", lambda: True)
    group = PACKED[name].group

    def wrong(form, other):
        def run(w, n_groups, out):
            proof.unpack_block(other, PACKED[other].group).twin(w, n_groups, out)
            if other == name:
                at = out + n_groups // 2 * span_bytes("q8", group) - 1
                proof.poke(at, proof.peek(at, "uint8", 1) ^ 1)

        return run

    monkeypatch.setattr(proof, "unpack_kernel", wrong)
    assert proof.prove(tuple(other for other in PACKED if other != name)) == "avx2"
    with pytest.warns(UserWarning, match="avx2 form .* wrong"):
        assert proof.prove(tuple(PACKED)) == "plain"
    assert cpu.form() == "plain" and not list(_jit.cache_dir().glob(f"proved-*-{name}"))
