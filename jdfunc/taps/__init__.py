"""Taps: where a parameter is used as a matrix, its activations and cotangents."""
