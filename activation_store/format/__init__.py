"""The store on disk: header, commit log, item records, Zarr metadata."""
