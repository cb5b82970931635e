"""Shards to batches: reading, decoding, masking, mixing. Knows nothing of models.

``shards`` finds and reads indexed tars, ``decode`` turns member bytes into images and text, ``prepare`` writes shards.
"""
