"""Scripts that turn data sets into shards; run them from a checkout as ``python -m data_prep.NAME``."""
