"""Metrics over predictions and the decoding that makes them; the metrics need no model."""
