"""The squashfs 4.0 on-disk format: bytes in, values out, no I/O."""
