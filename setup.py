"""The one part that is compiled, and may be absent: activations of the CPU engine (mhmoe_vl/moe/activations.py)."""

import os

from setuptools import Extension, setup

# No branches, no errno, no traps: what it takes to turn the loops into vector instructions.
flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"] if os.name == "posix" else ["/O2"]
setup(
    ext_modules=[
        Extension("mhmoe_vl.moe._activations", ["mhmoe_vl/moe/activations.c"], extra_compile_args=flags, optional=True)
    ]
)
