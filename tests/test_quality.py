"""What quantisation costs on real text: the trained checkpoint against its packed stores, on modules it never saw.

One hard fact: the base is the unconverted path with a float32 cache, which the parity tests tie to transformers.
"""

import json

import numpy as np
import pytest
from quality import DATA, POSITIONS, base_logs, compare, heldout_windows

import npmix.generate
from npmix.checkpoint import open_checkpoint
from npmix.convert import convert, make_recipe, round_piece
from npmix.formats import CHUNK, PACKED
from npmix.quant.pack import dequantize, pack
from npmix.quant.tensor import Tensor
from npmix.store import open_store

# First choice and KL on this model, for whatever weights; the bounds that follow the weights stand in golden_trained.npz.
BOUNDS = {"q4": (0.955, 0.0065), "q2": (0.86, 0.075)}
# Relative squared error of the trained experts: near those of Gaussian weights (`test_round.py`), for training leaves few outliers
EXPERT_ERROR = {"q8": 2.55e-5, "q6": 3.2e-4, "q5": 0.00112, "q4": 0.0040, "q3": 0.0178, "q2": 0.0537}
KL_KV8 = 0.00022  # measured: 0.000144


@pytest.fixture(scope="module")
def windows():
    return heldout_windows()


@pytest.fixture(scope="module")
def base(windows):
    return base_logs(windows)


@pytest.mark.compiled
def test_q8(tmp_path, windows, base):
    """8 bits: the first choice agrees at 98.5 % of 20,000 held-out positions or more, mean KL is below 0.0006 (measured: 99.2 %, 0.00037)."""
    assert windows.size >= POSITIONS
    same, kl, _ = compare(convert(DATA / "tiny_mixtral", tmp_path / "q8", "q8"), windows, base)
    assert same >= 0.985 and 0 <= kl < 0.0006


@pytest.mark.compiled
@pytest.mark.parametrize("quant", BOUNDS)
def test_few_bits(tmp_path, windows, base, quant):
    """4 and 2 bits: the cost does not grow beyond what was measured when the golden file was made, a quarter of it aside."""
    same, kl, _ = compare(convert(DATA / "tiny_mixtral", tmp_path / quant, quant), windows, base)
    with np.load(DATA / "golden_trained.npz") as golden:
        golden_same, golden_kl = golden[quant][:2]
    assert 1 - same < 1.25 * (1 - golden_same) and 0 <= kl < 1.25 * golden_kl
    assert same > BOUNDS[quant][0] and kl < BOUNDS[quant][1]


@pytest.mark.parametrize("quant", PACKED)
def test_error_of_trained_weights(quant):
    """Each format keeps its budget on the experts of a trained model, whose weights are not quite Gaussian."""
    group = make_recipe(quant)["experts"][1]
    missed = total = 0.0
    with open_checkpoint(DATA / "tiny_mixtral") as source:
        for name in [name for name in source.names() if ".experts.3." in name]:
            w = dequantize(source.tensor(name))
            back = dequantize(Tensor(round_piece(source.tensor(name), 0, len(w), quant, group), quant, w.shape, group))
            missed, total = missed + ((back - w) ** 2).sum(dtype=np.float64), total + (w**2).sum(dtype=np.float64)
    print(f"{quant}: relative squared error {missed / total:.3g}")
    assert missed / total < EXPERT_ERROR[quant]


@pytest.mark.compiled
def test_float16_cache(windows, base):
    """A float16 cache costs next to nothing: the first choice agrees at 99.9 %, mean KL is below 1e-5."""
    same, kl, _ = compare(DATA / "tiny_mixtral", windows, base, kv="f16")
    assert same >= 0.999 and kl < 1e-5


@pytest.mark.compiled
def test_8_bit_cache(windows, base):
    """An 8-bit cache costs KL_KV8 nats at most, half as much again as was measured, and the first choice agrees at 99.5 %."""
    same, kl, _ = compare(DATA / "tiny_mixtral", windows, base, kv="q8")
    assert same >= 0.995 and 0 <= kl < KL_KV8


def simply_rounded(w, group):
    """8 bits as they were before scales were searched: max|w| / 127, codes -127..127; such stores are read like any other."""
    groups = np.pad(w, ((0, 0), (0, -w.shape[1] % group))).reshape(len(w), -1, group)
    scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    inverse = np.float32(1) / np.maximum(scales, np.float16(2.0**-24)).astype(np.float32)
    codes = (np.rint(groups * inverse[..., None]) + 128).astype(np.uint8).reshape(len(w), -1)[:, : w.shape[1]]
    return pack(codes, scales, np.zeros((len(w), -(-w.shape[1] // CHUNK)), np.uint8), "q8", group)


def test_bundled_model_is_the_checkpoint():
    """The model that npmix brings is, byte for byte, the checkpoint that the tests use, packed into 8 bits in the store's own groups
    by the simplest rule."""
    with open_checkpoint(DATA / "tiny_mixtral") as source, open_store(npmix.generate.BUNDLED) as bundled:
        assert source.config == bundled.config
        for name, shape in source.config.tensor_shapes().items():
            ours, w = bundled.tensor(name), source.tensor(name)
            assert (ours.format == "q8" or name.endswith(("norm", "router"))) and ours.shape == shape
            if ours.group:
                assert (ours.data == simply_rounded(dequantize(w), ours.group)).all(), name
            else:
                assert (dequantize(ours) == dequantize(w)).all(), name
            del ours, w
    names = (DATA / "tiny_mixtral" / "tokenizer.model", npmix.generate.BUNDLED / "tokenizer.model")
    assert names[0].read_bytes() == names[1].read_bytes()
    assert json.loads((npmix.generate.BUNDLED / "npmix.json").read_text())["recipe"]["name"] == "q8"
