"""From text to batches: NumPy until `loader.py` hands the arrays to JAX."""
