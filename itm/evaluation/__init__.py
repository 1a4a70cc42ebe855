"""Judging a matcher. The choices that a command line offers are named here: it must not import torch to show them."""

TIES = ("pessimistic", "optimistic", "official", "official_iais", "lower_index")  # how equal scores are ordered
PRECISIONS = ("fp32", "tf32", "bf16")  # of scoring
