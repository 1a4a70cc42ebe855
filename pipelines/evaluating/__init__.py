"""What `itm evaluate` stands on. Named here for those who must not import torch to know them."""

FORMAT = 1  # of evaluation.json
PROBES = ("sts", "isd", "isda")  # protocols that ask the matcher itself, and not its scores
