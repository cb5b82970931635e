"""Data sets to shards: one reader per source format, one packing core, tokenizer training and verification."""
