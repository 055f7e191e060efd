"""GGUF files by hand, as ggml's docs/gguf.md describes them."""

import struct

Q8_0 = 8
_STRING = 8


def written(path, tensors, metadata):
    """A file with `tensors`, by name (shape, ggml's type, bytes), and `metadata`, by name (type, bytes)."""
    entries = {"general.architecture": (_STRING, _text("test")), **metadata}
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries))
    for name, (kind, value) in entries.items():
        head += _text(name) + struct.pack("<I", kind) + value
    data = b""
    for name, (shape, kind, content) in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def _text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()
