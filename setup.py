"""The one part that is compiled, and may be absent: loops of the CPU engine (mhmoe_vl/moe/compiled.py)."""

import zlib
from pathlib import Path

from setuptools import Extension, setup

SOURCES = [
    f"mhmoe_vl/moe/{name}"
    for name in (
        "activations.c",
        "activations_bfloat16.c",
        "choice.c",
        "order.c",
        "rows.c",
        "activations.h",
        "vector.h",
    )
]
# As in compiled.py, which compares.
checksum = zlib.crc32(b"".join((Path(__file__).parent / source).read_bytes() for source in SOURCES)) & 0x7FFFFFFF

setup(
    ext_modules=[
        Extension(
            "mhmoe_vl.moe._compiled",
            [source for source in SOURCES if source.endswith(".c")],
            depends=[source for source in SOURCES if source.endswith(".h")],
            define_macros=[("CHECKSUM", str(checksum))],
            # What it takes to turn the loops into vector instructions: no branches, no errno, no traps, and sums in any
            # order where a loop says so (nothing of OpenMP is linked).
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp-simd"],
            optional=True,
        )
    ]
)
