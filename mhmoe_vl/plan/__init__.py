"""What a run will need and take, before anything runs: ``python -m mhmoe_vl.plan``."""
