"""SAE architectures: the interface, the registry, and a folder for each built-in one."""
