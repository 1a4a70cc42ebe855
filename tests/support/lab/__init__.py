"""A cluster whose machines share no disk, on one machine: namespaces for network, mounts and processes, and services that can fail."""
