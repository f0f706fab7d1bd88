"""The Inception Score, of a classifier's logits (Salimans et al. 2016, "Improved Techniques for Training GANs")."""

from typing import NamedTuple

import numpy as np

from ldm.evaluation.rows import Rows, check, codes, dealt, float64


class InceptionScore(NamedTuple):
    """Mean over the splits, and the deviation of one split's value."""

    mean: float
    deviation: float


def inception_score(logits: Rows, splits: int = 10, seed: int = 0) -> InceptionScore:
    """exp of the mean KL divergence of p(class | image) from p(class), in fp64; between 1 and the number of classes.

    The marginal p(class) is that of a split. Files that are sorted by class would leave splits of one class each and
    a score of 1, so images are dealt to the splits at random, and, unlike in torch-fidelity and ADM's evaluator, in a
    way that does not depend on the order of the files. The score falls with the size of a split: only scores of
    equally many images in equally many splits can be compared.

    Args:
        logits: (N, K).
        splits: how many; 10 in nearly every paper.
        seed: which images are in which split.

    Raises:
        DataError, NumericError: fewer images than splits, or logits that are not finite.
    """
    check(logits, least=splits)
    order = dealt(codes(logits), seed)
    scores = []
    for split in range(splits):
        rows = order[split * len(order) // splits : (split + 1) * len(order) // splits]
        log_p = float64(logits[rows]).log_softmax(dim=1)
        p = log_p.exp()
        marginal = p.mean(dim=0).clamp(min=1e-300)  # a class whose p are all rounded to 0 adds 0, not NaN
        divergence = (p * (log_p - marginal.log())).sum(dim=1).mean()
        scores.append(divergence.exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))
