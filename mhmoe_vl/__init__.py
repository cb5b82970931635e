"""Vision-language pretraining with Multi-Head Mixture-of-Experts.

Nothing is imported eagerly, so that ``mhmoe_vl.moe`` can be used alone with torch as its only dependency.
"""

__version__ = "0.1.0"
