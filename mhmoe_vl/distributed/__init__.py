"""Everything that involves more than one process; the only package that imports ``torch.distributed``."""
