"""The data plane: where keys and values live, and attention over them. torch and Numba."""
