"""Other forms of the machine code, each in a process of its own: all kernels give the native form's bits.

One hard fact: only the int8 dot has forms; all else is one IR on 16 lanes, so even a CPU without AVX-512 gives equal bits.
"""

from pathlib import Path

import numpy as np
import pytest
from forms_probe import TOKENS, kernels, logits
from kernel_tools import child, same_bits, ulps
from make import tiny_hf
from test_dot import FORMS

from npmix.convert import convert
from npmix.kernels import cpu

HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"}
SCRIPT = str(Path(__file__).with_name("forms_probe.py"))
PROBE = f"import runpy, sys; sys.argv[0] = 'probe'; runpy.run_path({SCRIPT!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def native():
    return kernels()


def probe(tmp_path, *what, **env):
    """(results by name, printed words) of the probe in a child."""
    words = child(PROBE, tmp_path / "cache", tmp_path / "out.npz", *what, timeout=900, **env).stdout.split()
    with np.load(tmp_path / "out.npz") as file:
        return dict(file), words


@pytest.mark.compiled
@pytest.mark.parametrize("form", [form for form in FORMS if form not in (cpu.form(), "avx2")])
def test_every_form_gives_the_native_bits(form, native, tmp_path):
    """Each form that this CPU can run, asked for by NPMIX_FORM: every matrix product is the native one, bit for bit."""
    results, words = probe(tmp_path, NPMIX_FORM=form)
    assert words[0] == form and {f"matmul {name} 128 {n}" for name in ("q8", "q4") for n in TOKENS} <= results.keys()
    for name in results:
        assert same_bits(results[name], native[name]), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.compiled
def test_the_twins_agree(native, tmp_path):
    """Without the JIT the same kernels run on NumPy twins: integers are equal, floats within 2 units of the last place."""
    results, _ = probe(tmp_path, "-", NUMBA_DISABLE_JIT="1")
    assert results.keys() == native.keys()
    for name, value in native.items():
        if value.dtype == np.float32:
            assert ulps(results[name], value) <= 2, name
        else:
            assert (results[name] == value).all(), name


@pytest.mark.compiled
@pytest.mark.skipif(not (cpu.is_x86() and "avx2" in FORMS), reason="no AVX2 here")
def test_a_cpu_without_avx512(native, tmp_path):
    """Compiled for Haswell: no zmm register in the machine code, all kernels and the logits of a model of q4 and q8 (decode and prefill)
    have the native form's bits, and a second process compiles nothing."""
    hf = tiny_hf(tmp_path / "hf")
    convert(hf, tmp_path / "q4", quant="q4")
    expected = native | logits(tmp_path)
    results, words = probe(tmp_path, tmp_path, NPMIX_FORM=None, **HASWELL)
    assert words[:3] == ["avx2", "False", "True"] and int(words[3]) >= 1
    assert results.keys() == expected.keys()
    for name in expected:
        assert same_bits(results[name], expected[name]), name
    assert same_bits(expected["prefill"], expected["decode"])
    again, words = probe(tmp_path, tmp_path, NPMIX_FORM=None, **HASWELL)
    assert words[3] == "0" and all(same_bits(again[name], expected[name]) for name in expected)
