"""How a visual tokenizer uses its codes, and what it keeps of the images."""
