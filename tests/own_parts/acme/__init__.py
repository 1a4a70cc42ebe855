"""A user's package: nothing of the project imports it, recipes name its parts by import path. Tests put its folder on the module path."""
