"""Late interaction. The choice of pruning is named here: a command line must not import torch to offer it."""

from typing import Literal

Prune = Literal["off", "on", "auto"]
