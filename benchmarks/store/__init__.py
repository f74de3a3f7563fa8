"""Read and write the store beside a memmap, zarr-python, tensorstore and the peers."""
