"""``webdataset``'s writer of tar files, imported without torch.

``webdataset`` uses torch where it is installed and goes on without it where it is not. Writing a tar does not need it,
and importing it takes longer than packing a small data set.
"""

from __future__ import annotations

import sys

__all__ = ["TarWriter"]

if "torch" in sys.modules:
    from webdataset.writer import TarWriter
else:
    sys.modules["torch"] = None  # type: ignore[assignment]  # to import it is then a ModuleNotFoundError
    try:
        from webdataset.writer import TarWriter
    finally:
        del sys.modules["torch"]
        # Whoever imports webdataset later in this process shall get it with torch.
        for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
            del sys.modules[name]
