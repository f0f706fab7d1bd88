"""A codebook instead of the Gaussian (van den Oord et al. 2017, arXiv:1711.00937, "VQ-VAE"; Esser et al. 2021).

The encoder's vectors are replaced by their nearest codes before they are decoded. Stage 2 is trained on the encoder's
vectors before quantization, and the codec quantizes them when decoding, as in Rombach et al. 2022 (appendix G).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.ranges import Count, NotNegative
from ldm.runtime.float64 import double


class Quantized:
    """The latents of a batch and their nearest codes; has the interface of `DiagonalGaussian`.

    Args:
        latents: (N, C, h, w) float32, from the encoder.
        indices: (N, h, w), index of each latent's nearest code.
        codes: (N, C, h, w), those codes.
        commitment: see VectorQuantizer.
        size: of the codebook.
    """

    def __init__(self, latents: Tensor, indices: Tensor, codes: Tensor, commitment: NotNegative, size: Count) -> None:
        self.mean = latents
        self.indices = indices
        self._codes, self._commitment, self._size = codes, commitment, size

    @property
    def std(self) -> Tensor:
        """Zero: nothing is drawn."""
        return torch.zeros_like(self.mean)

    @property
    def var(self) -> Tensor:
        """Zero: nothing is drawn."""
        return torch.zeros_like(self.mean)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """The codes (N, C, h, w), with the straight-through gradient to the latents."""
        return self.mean + (self._codes - self.mean).detach()

    def mode(self) -> Tensor:
        """The codes: (N, C, h, w)."""
        return self._codes

    def regularization_loss(self) -> Tensor:
        """|sg(z) - code|^2 + commitment |z - sg(code)|^2, summed over the latent (VQ-VAE, eq. 3): (N,)."""
        to_latents = (self._codes - self.mean.detach()).square().flatten(1).sum(1)
        to_codes = (self.mean - self._codes.detach()).square().flatten(1).sum(1)
        return to_latents + self._commitment * to_codes

    def logs(self) -> dict[str, Tensor]:
        return {"codebook": self.regularization_loss().detach()}

    def counts(self) -> Tensor:
        """How often each code was chosen: (size,) int64, additive over batches."""
        return torch.bincount(self.indices.flatten(), minlength=self._size)


def usage(counts: Tensor) -> dict[str, Tensor]:
    """From the counts (size,) over a data set: the codes' perplexity, 1 ... size, and the fraction of codes in use.

    The data set should have many more latents than there are codes: 14 images of 256 latents each can show no more than
    a fifth of a uniformly used codebook of 16,384.
    """
    share = double(counts) / double(counts).sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"perplexity": entropy.exp(), "codes_used": double(counts > 0).mean()}


class VectorQuantizer(nn.Module):
    """Latents (N, C, h, w) -> Quantized.

    Args:
        size: number of codes.
        channels: of a code and of the latent, C.
        commitment: weight of pulling the encoder toward its codes, relative to pulling the codes toward the encoder.
    """

    def __init__(self, size: Count, channels: Count, commitment: NotNegative = 0.25) -> None:
        super().__init__()
        self.size, self.channels, self.commitment = size, channels, commitment
        self.codebook = nn.Embedding(size, channels)
        nn.init.uniform_(self.codebook.weight, -1 / size, 1 / size)

    def forward(self, latents: Tensor) -> Quantized:
        latents = latents.float()
        indices = self.nearest(latents)  # (N, h, w)
        # F.embedding: its gradient reaches only the chosen codes.
        codes = F.embedding(indices, self.codebook.weight).movedim(-1, 1)  # (N, C, h, w)
        return Quantized(latents, indices, codes, self.commitment, self.size)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> the index of each vector's nearest code, (N, h, w)."""
        book = self.codebook.weight.float()  # (size, C)
        if torch.compiler.is_exporting():  # a program for any number of images
            vectors = latents.float().movedim(1, -1)  # (N, h, w, C)
            return torch.cdist(vectors.flatten(0, 2), book).argmin(1).reshape(vectors.shape[:-1])
        # One image at a time, since all distances at once would take N h w x size values; cdist stays in float32.
        rows = [torch.cdist(latent.flatten(1).t(), book).argmin(1) for latent in latents.float()]  # each (h w,)
        return torch.stack(rows).unflatten(1, latents.shape[2:])
