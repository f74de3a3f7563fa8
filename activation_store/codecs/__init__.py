"""Encodings of an array on disk: the sharding layout, raw bytes, blosc, int8."""
