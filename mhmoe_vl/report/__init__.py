"""One HTML page about a pretraining run and its fine-tunings: ``python -m mhmoe_vl.report``."""
