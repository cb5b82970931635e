"""The multiway encoder and its heads; everything here runs on a single device and knows nothing of ranks."""
