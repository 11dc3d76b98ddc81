"""Ablations: what was varied, by how much it matters, and whether that can be told from noise."""
