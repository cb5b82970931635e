"""Weights into other forms: released BEiT-3 checkpoints to runs and back, dense weights to sparse ones."""
