"""lmjax: pretraining language models in JAX.  Importing it imports nothing else."""
