"""The on-disk format of a store: header, commit log, item records, Zarr metadata."""
