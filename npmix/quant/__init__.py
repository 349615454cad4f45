"""Quantisation in plain NumPy: packing, rounding, and the twin of each integer kernel."""
