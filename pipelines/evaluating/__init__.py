"""What `itm evaluate` stands on. Named here for those who must not import torch to know them."""

FORMAT = 1  # of evaluation.json
