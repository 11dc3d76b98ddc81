"""Optimized XLA programs, read from their text: what they cost, and what fills the memory."""
