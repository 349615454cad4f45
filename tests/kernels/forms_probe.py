"""What `test_forms.py` runs in this process and, for other forms of the machine code, in children: all kernels on fixed input.

python forms_probe.py OUT.npz              products alone: the int8 dot is all that has forms
python forms_probe.py OUT.npz -            all kernels
python forms_probe.py OUT.npz FOLDER       all kernels, and logits of the model in FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from kernel_tools import Memory, memory
from test_attention import Cache, queries
from test_matmul import _fill, activations, product, weights
from test_ops import exp2
from test_router import choice

from npmix.kernels import outline
from npmix.kernels.attention import attend
from npmix.kernels.matmul import matmul
from npmix.kernels.rows import quantise_row, rms_norm, rope, swiglu

F = np.float32
FORMATS = [("q8", 128), ("q4", 128), ("bf16", 0)]  # other packed formats differ in how they are unpacked alone: `test_unpack.py`
TOKENS = (1, 7, 29)  # single row blocks, tiles in registers, panels
IDS = np.random.default_rng(0).integers(3, 384, 40)


def attention(kv):
    return Cache(kv, 80, 512).fill(range(300)).attend(queries(6, 80), 297, heads=2)


def products() -> dict[str, np.ndarray]:
    """Matrix products and the activations they take, by name, and attention over 8-bit keys and values."""
    rng, results = np.random.default_rng(11), {}
    for name, group in FORMATS:
        tensor, _ = weights(name, group, 50, 300, 7)
        x = rng.standard_normal((max(TOKENS), 300)).astype(F)
        for tokens in TOKENS:
            results[f"matmul {name} {group} {tokens}"] = product(matmul(name, group), tensor, x[:tokens], 0, 4)
        results[f"acts {group}"] = activations(x[:4], group).array if group else np.zeros(0, np.uint8)  # one tile in every form
    results["attention q8"] = attention("q8")
    return results


def kernels() -> dict[str, np.ndarray]:
    """Results of all kernels by name, integers as integers."""
    rng, results = np.random.default_rng(12), products()
    results["exp2"] = exp2(np.linspace(-130, 130, 4096))
    row, other, out = memory(rng.standard_normal(256).astype(F)), memory(rng.standard_normal(256).astype(F)), Memory(256, F)
    results["squares"] = np.array([rms_norm(row.at, other.at, 250, 256, F(1e-5), out.at)], F)
    results["rms_norm"] = out.array.copy()
    swiglu(row.at, other.at, 256, out.at)
    results["swiglu"] = out.array.copy()
    rope(row.at, other.at, 100, F(0.3), out.at)
    results["rope"] = out.array[:200].copy()
    codes = Memory(256 + 8 * (4 + 4), np.uint8)
    quantise_row(row.at, 256, 32, codes.at)
    results["quantised"] = codes.array.copy()
    experts, results["router"] = choice(rng.standard_normal(8), 3)
    results["experts"] = np.array(experts)
    for kv in ("f16", "f32"):
        results[f"attention {kv}"] = attention(kv)
    return results


def logits(folder) -> dict[str, np.ndarray]:
    """Logits of a q4 model, whose other matrices are q8, by decode and by prefill."""
    from npmix.engine import Engine

    with Engine(folder / "q4", threads=2, chunk=16) as engine:
        return {"prefill": engine.logits(IDS), "decode": np.stack([engine.step(int(t)) for t in IDS])}


def assembly() -> str:
    """The machine code of what was compiled here: matrix products, activations, and the rest where it was run."""
    tiles = [function for tile in outline._tiles for function in tile._registered.values()]  # called by name, so in no other's code
    assert len(tiles) >= 10
    compiled = [*tiles, *(matmul(*pair) for pair in FORMATS), _fill, rms_norm, swiglu, attend("f16"), attend("f32"), attend("q8")]
    return "\n".join(text for function in compiled for text in function.inspect_asm().values())


def main(out, folder=None):
    from npmix.kernels import cpu
    from npmix.kernels._jit import DISABLED, cache_counts

    results = kernels() if folder else products()
    if folder and folder != "-":
        results |= logits(Path(folder))
    np.savez(out, **results)
    code = "" if DISABLED else assembly()
    print(cpu.form(), "zmm" in code, "ymm" in code, cache_counts()["misses"])


if __name__ == "__main__":
    main(*sys.argv[1:])
