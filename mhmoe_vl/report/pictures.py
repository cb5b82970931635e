"""Pictures as data URIs, so that the page needs no file beside it."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

_MAX_SIDE = 288
_MAX_SIDE_LOSSLESS = 128


def data_uri(picture: Image.Image) -> str:
    """``picture`` scaled down to the size of the page: PNG if it is small, JPEG for photographs."""
    picture = picture.convert("RGB")
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    kind = "png" if max(picture.size) <= _MAX_SIDE_LOSSLESS else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tensor_data_uri(image_3HW: Tensor) -> str:
    """The same for pixels, uint8 ``[3, H, W]``."""
    return data_uri(Image.fromarray(image_3HW.permute(1, 2, 0).cpu().numpy()))
