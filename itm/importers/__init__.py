"""Authors' checkpoints by the keys they hold: `load_official(path)`. A new family costs one file and one line in `itm.importers.load`."""

from itm.importers.load import load_official

__all__ = ["load_official"]
