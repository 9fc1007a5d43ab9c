"""Reads back a `.wandb` file: LevelDB's log format (blocks of 32 KiB, records of crc, length, type), then protobuf."""

import struct
import zlib
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list:
    """All records of the file; each chunk's checksum is checked."""
    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    position, parts, found = 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # the rest of a block, too short for a header
            position += BLOCK - position % BLOCK
            continue
        crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        chunk = data[position + 7 : position + 7 + length]
        assert crc == zlib.crc32(bytes([kind]) + chunk) & 0xFFFFFFFF
        position += 7 + length
        parts += chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found
