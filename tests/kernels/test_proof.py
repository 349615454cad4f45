"""The proof of the int8 dot: a right form passes, a wrong one is dropped with a warning, and the outcome is kept."""

import pytest

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
    """The form chosen here gives the exact integers, and the pass is noted so that the next process need not repeat it."""
    form = cpu.form()
    assert all(proof.agrees(zero) for zero in (8, 128))
    assert proof.prove() == form
    assert form == "plain" or (_jit.cache_dir() / f"proved-{form}").exists()


def test_a_wrong_form_is_dropped(fresh, monkeypatch):
    """A form whose dots are off by one somewhere is found out, warned about and replaced by the plain one."""
    monkeypatch.setattr(cpu, "_best_form", lambda: "avx2")
    right = proof.dot_kernel

    def wrong(form, zero):
        def run(codes, inputs, totals, out, count):
            right(cpu.FORMS[-1], zero)(codes, inputs, totals, out, count)
            proof.poke(out, proof.peek(out, "int32", 1) + 1)

        return run

    monkeypatch.setattr(proof, "dot_kernel", wrong)
    with pytest.warns(UserWarning, match="avx2 form .* wrong"):
        assert proof.prove() == "plain"
    assert cpu.form() == "plain" and not (_jit.cache_dir() / "proved-avx2").exists()
