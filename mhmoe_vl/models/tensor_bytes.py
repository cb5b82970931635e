"""Small files of tensors whose bytes depend on their content alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The library's own has its metadata in another order each time, and whoever compares files by
    their bytes or hashes (a run that goes on, shards with stored codes) would take it for another one."""
    data = save(dict(tensors), dict(metadata))
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    # Filled up so that tensors begin at a multiple of 8 bytes, as the format wants it.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
