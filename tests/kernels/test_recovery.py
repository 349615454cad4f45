"""After numbers that were not finite, a model is as good as new."""

import numpy as np
import pytest
from kernel_tools import same_bits
from make import TINY, tiny_arrays, tiny_hf

from npmix.engine import Engine
from npmix.errors import NumericsError

ODD = {"hidden_size": 72, "head_dim": 18, "num_hidden_layers": 1}  # rows with padding, which kernels read too


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_error_leaves_nothing_behind(tmp_path):
    """A token whose embedding is NaN is an error by decode and by prefill; afterwards other tokens have the bits they had before."""
    arrays = tiny_arrays({**TINY, **ODD})
    arrays["model.embed_tokens.weight"][7] = np.nan
    good = [3, 5, 11, 4, 9]
    with Engine(tiny_hf(tmp_path, arrays=arrays, **ODD), threads=1, context=64) as engine:
        expected = engine.logits(good)
        for bad in ([7], [3, 7, 5, 7]):
            with pytest.raises(NumericsError, match="embeddings"):
                engine.prefill(bad)
            engine.reset()
            assert same_bits(engine.logits(good), expected)
            assert same_bits(np.stack([engine.step(t) for t in good]), expected)
            engine.reset()
