"""Codecs: how rows become bytes on disk. The interface, its members, and the sharding layout."""
