"""The forward pass: weights, run state, KV cache, prefill and decode; `reference.py` is the same in a page of NumPy."""
