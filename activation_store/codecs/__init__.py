"""Codecs, which convert rows to bytes on disk: interface, implementations and sharding layout."""
