"""What lies at a path: `look(path)` says which source of the recipe reads it, or asks where two readings are possible."""
