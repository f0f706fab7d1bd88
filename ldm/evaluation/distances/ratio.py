"""FDr: a Fréchet distance in units of that of held-out real images, and its mean over several feature spaces.

Yang et al. 2026, "Representation Fréchet Loss for Visual Generation" (arXiv:2604.28190), as the authors' code defines
it (github.com/Jiawei-Yang/FD-loss: eval_all_fds.py, scripts/compute_valfd.py): in each feature space the distance of
the samples to the training set is divided by the distance of the validation set to the training set; FDr^k is the
arithmetic mean of these ratios over k spaces. 1 is what real images have.
"""

from collections.abc import Mapping

import numpy as np

from ldm.errors import DataError

IMAGENET_256 = {
    "inception": 1.68,
    "convnextv2_base.fcmae_ft_in22k_in1k": 56.87,
    "vit_large_patch14_dinov2.lvd142m": 14.19,
    "vit_large_patch16_224.mae": 0.04,
    "vit_so400m_patch16_siglip_256.v2_webli": 0.60,
    "vit_large_patch14_clip_224.openai": 5.60,
}
"""The feature spaces of the published FDr^6, by timm's names but for the FID's Inception, and in each the distance of
ImageNet's 50,000 validation images at 256 pixels to its training images, as published: MAE's has one digit.

The features are the class token (ConvNeXt: the last map's mean; SigLIP: its attention pool), of pictures resized by
antialiased bicubic interpolation to 224 pixels for ConvNeXt, MAE and SigLIP and kept at 256 for DINOv2 and CLIP. The
values hold for that data set and those features alone: elsewhere, measure the distance of held-out images.
"""


def ratio(distance: float, validation: float) -> float:
    """FDr: the distance of samples over that of real images that were held out, each to the same training images.

    A distance is biased by the number of images, so take as many samples as there are held-out images.

    Raises:
        DataError: the distance of the held-out images is not above 0, as that of the training images themselves.
    """
    if not validation > 0:
        raise DataError(
            f"the held-out images have the distance {validation:g} to the reference: expected more than 0. "
            "Name real images that are not in the reference."
        )
    return distance / validation


def mean_ratio(distances: Mapping[str, float], validation: Mapping[str, float]) -> float:
    """FDr^k: the arithmetic mean of `ratio` over the k feature spaces of `distances`.

    Raises:
        DataError: there is none, or a space without the distance of held-out images.
    """
    if missing := [name for name in distances if name not in validation]:
        raise DataError(f"no distance of held-out images in {', '.join(missing)}. Measure it in every feature space.")
    if not distances:
        raise DataError("a mean over feature spaces needs at least one. Name some.")
    return float(np.mean([ratio(distance, validation[name]) for name, distance in distances.items()]))
