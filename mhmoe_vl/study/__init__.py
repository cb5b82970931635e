"""Kinds of feed-forward layer compared over tasks and seeds, at equal cost: ``python -m mhmoe_vl.study``."""
