"""Images as small as a page shows them, inside the page itself."""

from __future__ import annotations

import base64
import io

from PIL import Image

from itm.data.pixels import decode

SIDE = 160  # pixels


def data_uri(image: bytes, side: int = SIDE) -> str:
    """A JPEG of at most `side` pixels a side as a data URI. Raises ValueError for bytes that are no image."""
    picture = decode(image)
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
