"""The training loop and the assembly of a run: ``python -m mhmoe_vl.train --config FILE a.b=c``."""
