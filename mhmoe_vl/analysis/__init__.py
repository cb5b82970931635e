"""What the experts of a trained model do, measured on held-out samples: ``python -m mhmoe_vl.analysis``.

Figures of the load alone (activation, entropy, MaxVio, dead and collapsed experts) are in ``mhmoe_vl.moe.stats``, where
training takes them from too.
"""
