"""A loss whose gradient reaches few pairs: all pairs are scored without gradient, and only those few with it.

The hinges on the hardest negatives reach at most 3 B of the B x B pairs: the positives, the hardest caption of each image, the hardest
image of each caption. d loss / d scores says which, ties and masks included, so the loss is asked and no rule is repeated here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm.methods.terms import Term, mean_score, ranked
from itm.types import Encoded, Matcher, SplitScore


def score_and_loss(
    matcher: Matcher, encoded: tuple[Encoded, Encoded], term: Term, positives: Tensor, step: int, few: bool
) -> tuple[Tensor, Tensor]:
    """(scores (I,T), loss). few: score in two passes where term and matcher allow it; the scores then carry no gradient, the loss does.

    All pairs keep their gradient on a GPU, where choosing them makes the host wait and nothing was measured; under autocast, whose rounded
    products would choose other pairs than those of the loss; and of a matcher that inherits its `split_score`: it may score otherwise.
    """
    images, captions = encoded
    split = None
    here = positives.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if few and here and torch.is_grad_enabled() and term.reaches_few_pairs(step) and "split_score" in vars(type(matcher)):
        split = matcher.split_score(images, captions)
    if split is None:
        each = matcher.training_scores(images, captions)
        return mean_score(each), ranked(term, each, positives, step)
    return split.scores, loss_of_few(split, term, positives, step)


def loss_of_few(split: SplitScore, term: Term, positives: Tensor, step: int) -> Tensor:
    """The loss of all scores, with the gradient sum_p (d loss / d score_p) d score_p over the pairs p where it is not 0."""
    scores = split.scores.detach().requires_grad_()
    loss = term(scores, positives, step)
    (slopes,) = torch.autograd.grad(loss, scores)
    rows, columns = slopes.nonzero(as_tuple=True)
    if not len(rows):  # nothing to learn: one pair, so that every weight still has a gradient, which is 0
        rows = columns = torch.zeros(1, dtype=torch.int64, device=scores.device)
    pairs = split.of_pairs(rows, columns)
    return loss.detach() + (slopes[rows, columns] * (pairs - pairs.detach())).sum()
