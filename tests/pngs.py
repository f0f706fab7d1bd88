"""PNG files that Pillow does not write."""

import struct
import zlib

import numpy as np


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A PNG of gray values (H,W) of so many bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    places = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(places.reshape(len(values), -1), axis=1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
