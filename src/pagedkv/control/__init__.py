"""The control plane: who owns which block. NumPy and Numba only, never torch."""
