"""Read and write the store, compared with a memmap, zarr-python, tensorstore and the peers."""
