"""The loss of the latent-diffusion autoencoder (Esser et al. 2021, arXiv:2012.09841, sec. 3.1; Rombach et al. 2022).

    error(x, r)    = |x - r| + l2_weight * (x - r)^2 + perceptual_weight * LPIPS(x, r)   for each pixel and channel
    nll            = sum of error / exp(logvar) + logvar                           over an image, mean over the batch
    generator      = nll + kl_weight * cost + w * adversarial_weight * adversarial.generator
    cost           = the posterior's KL; with a codebook, distances of latents to codes            mean over the batch
    discriminator  = adversarial.discriminator(images, detached reconstruction)
    w              = |d nll / d W| / (|d generator term / d W| + 1e-4), at most max_adversarial_weight
                     W: the decoder's last weight

Sums, not means: nll grows with the number of pixels and KL with the number of latent values, so their balance does
not change with the resolution for a fixed down factor. Adam is invariant to the common scale (up to its epsilon);
a clipping threshold and the bound on w are not.

The published KL training also uses sums, and bounds w at 1e4. The published VQ training takes the mean over the n
values of an image and bounds its w, n times smaller than this one, at 1e4: that is a bound of n x 1e4 here. The 1e-4 is
added to the adversarial gradient, whose scale is the same in both, so with that bound both agree up to rounding.

One pass serves both optimizers. The gradients of the error and of the adversarial term with respect to the
reconstruction are computed once each, at a detached copy; w follows from them through the last convolution alone, and
their sum is then backpropagated through the decoder once. The discriminator's own loss is part of the same scalar,
since it shares no parameter with the rest: one backward pass fills the gradients of both before either is stepped.
"""

from functools import reduce
from operator import add
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.autoencoder.posterior import Posterior
from ldm.ranges import CountOrZero, Finite, NotNegative, Positive

Terms = dict[str, tuple[float, Tensor]]
"""Of the reconstruction error, by name: weight and values."""


class Adversarial(Protocol):
    """Maps logits of real and generated patches to losses, each a scalar."""

    def generator(self, fake: Tensor) -> Tensor: ...

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...


class Hinge:
    """Geometric GAN (Lim and Ye 2017, arXiv:1705.02894), halved as in VQGAN."""

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


class Vanilla:
    """The logistic loss (Goodfellow et al. 2014) for the discriminator; the generator raises the logit itself."""

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


class AutoencoderLoss(nn.Module):
    """See the top of the file. Everything after the networks' outputs is computed in float32.

    Args:
        perceptual: two (N, C, H, W) -> (N,), such as LPIPS; None trains on L1 alone.
        perceptual_weight: of the perceptual term, relative to the absolute difference per value of the image.
        l2_weight: of the squared difference, 0 in the published models. Without a perceptual term, rare colors are
            learned sooner with it: for the absolute difference a red that comes out brown is hardly worse than a pale
            red.
        kl_weight: of the posterior's cost: the KL to the standard normal, in nats; for a codebook, squared distances
            summed over the latent.
        logvar: initial value of the log-variance, which belongs to the generator's optimizer.
        learn_logvar: False keeps it at that value, as in the published training, whose optimizers do not include it.
            A checkpoint's value replaces `logvar` only if it is learned.
        discriminator: images -> logits; None trains without one.
        adversarial: Hinge() or Vanilla().
        adversarial_weight: factor on the adaptive weight w.
        disc_start: first optimizer step with the adversarial term and the discriminator; neither runs before it.
        max_adversarial_weight: bound on w before that factor, in units of an error summed over an image (top of file).
    """

    def __init__(
        self,
        perceptual: nn.Module | None = None,
        perceptual_weight: NotNegative = 1.0,
        l2_weight: NotNegative = 0.0,
        kl_weight: NotNegative = 1e-6,
        logvar: Finite = 0.0,
        learn_logvar: bool = True,
        discriminator: nn.Module | None = None,
        adversarial: Adversarial | None = None,
        adversarial_weight: NotNegative = 0.5,
        disc_start: CountOrZero = 50_001,
        max_adversarial_weight: Positive = 1e4,
    ) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.l2_weight = l2_weight
        self.kl_weight = kl_weight
        # A parameter either way: every checkpoint has it, and a fixed one is left out of gradient reduction.
        self.logvar = nn.Parameter(torch.tensor(float(logvar)), requires_grad=learn_logvar)
        if not learn_logvar:
            self.register_load_state_dict_pre_hook(_keep_logvar)
        self.discriminator = discriminator
        self.adversarial = Hinge() if adversarial is None else adversarial
        self.adversarial_weight = adversarial_weight
        self.disc_start = disc_start
        self.max_adversarial_weight = max_adversarial_weight

    def adversarial_at(self, step: int) -> bool:
        """Whether optimizer step `step` uses the discriminator."""
        return self.discriminator is not None and step >= self.disc_start

    def forward(
        self, images: Tensor, reconstruction: Tensor, posterior: Posterior | None, last_layer: nn.Conv2d, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar whose single backward pass fills every gradient, and what to log.

        Args:
            images: (N, C, H, W) in [-1, 1].
            reconstruction: (N, C, H, W), the output of `last_layer` (up to a reshape).
            posterior: of the images; None: the encoder is not trained, and its cost is left out.
            last_layer: the decoder's.
            step: number of the optimizer step, counted from 0.

        Returns:
            the total, whose value is generator plus discriminator loss; detached scalars by name.
        """
        target = images.float()
        # A view, because hooks such as those of FLOP counters cannot follow autograd.grad to a leaf.
        copy = reconstruction.detach().float().requires_grad_().view_as(reconstruction)  # (N, C, H, W)
        error, parts = self.reconstruction_loss(target, copy)  # mean over the batch of the sum over an image
        (gradient,) = torch.autograd.grad(error, copy)  # (N, C, H, W)
        error = error.detach()
        precision = (-self.logvar).exp()
        nll = error * precision + self.logvar * copy[0].numel()
        gradient = gradient * precision.detach()
        of_posterior: dict[str, Tensor] = {}
        total = nll
        if posterior is not None:
            of_posterior = {name: values.mean() for name, values in posterior.logs().items()}
            total = nll + self.kl_weight * posterior.regularization_loss().mean()
        logs = {"nll": nll.detach(), **of_posterior, "logvar": self.logvar.detach(), **parts}
        if self.adversarial_at(step):
            assert self.discriminator is not None
            fake = self.discriminator(copy).float()
            generator = self.adversarial.generator(fake)
            (adversarial_grad,) = torch.autograd.grad(generator, copy, retain_graph=True)  # (N, C, H, W)
            balance = _balance(reconstruction, last_layer.weight, gradient, adversarial_grad)
            weight = self.adversarial_weight * balance.clamp(0.0, self.max_adversarial_weight)
            gradient = gradient + weight * adversarial_grad
            real = self.discriminator(target).float()
            discriminator = self.adversarial.discriminator(real, fake)
            total = total + weight * generator.detach() + discriminator
            logs |= {
                "adversarial_weight": weight,
                "generator": generator.detach(),
                "discriminator": discriminator.detach(),
                "logits_real": real.detach().mean(),
                "logits_fake": fake.detach().mean(),
            }
        total = total + _with_gradient(reconstruction, gradient)
        return total, {"loss": total.detach(), **logs}

    def reconstruction_loss(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 + weighted L2 and LPIPS, summed over an image, mean over the batch: a scalar; and its parts per value."""
        terms = self._terms(images, reconstruction)
        means = {name: values.mean() for name, (_, values) in terms.items()}
        return _error(terms, means) * images[0].numel(), {name: mean.detach() for name, mean in means.items()}

    @torch.no_grad()
    def per_image(self, images: Tensor, reconstruction: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """What validation measures, each (N,): the parts per value, `rec_loss` summed over an image, the posterior's.

        Args:
            images: (N, C, H, W) in [-1, 1].
            reconstruction: (N, C, H, W).
            posterior: of the images.
        """
        terms = self._terms(images, reconstruction)
        means = {name: values.reshape(len(images), -1).mean(1) for name, (_, values) in terms.items()}
        return {**means, "rec_loss": _error(terms, means) * images[0].numel(), **posterior.logs()}

    def _terms(self, images: Tensor, reconstruction: Tensor) -> Terms:
        """Values (N, C, H, W) or (N,)."""
        terms = {"l1": (1.0, (images - reconstruction).abs())}
        if self.l2_weight > 0:
            terms["l2"] = (self.l2_weight, (images - reconstruction).square())
        if self.perceptual is not None:
            terms["lpips"] = (self.perceptual_weight, self.perceptual(reconstruction, images))
        return terms


def _error(terms: Terms, means: dict[str, Tensor]) -> Tensor:
    """The weighted sum of the terms' means, which have one shape."""
    return reduce(add, [weight * means[name] for name, (weight, _) in terms.items()])


def _keep_logvar(loss: AutoencoderLoss, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A fixed log-variance is a hyperparameter: the configured value applies, whatever the checkpoint's."""
    if (key := f"{prefix}logvar") in state_dict:
        state_dict[key] = loss.logvar.detach()


def _balance(reconstruction: Tensor, last_weight: Tensor, nll: Tensor, adversarial_grad: Tensor) -> Tensor:
    """The ratio of the norms of the nll's and the adversarial gradient at the last weight: a scalar, 0 or more."""
    norms = [
        torch.autograd.grad(reconstruction, last_weight, gradient.to(reconstruction.dtype), retain_graph=True)[0]
        .float()
        .norm()
        for gradient in (nll, adversarial_grad)
    ]
    return norms[0] / (norms[1] + 1e-4)


class _KnownGradient(torch.autograd.Function):
    """Zero, with a given gradient with respect to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None


def _with_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar zero whose gradient with respect to x is `gradient`."""
    return _KnownGradient.apply(x, gradient.to(x.dtype))
