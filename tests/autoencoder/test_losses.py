"""The one-backward loss against the textbook: two losses, two backwards, the usual adaptive weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.autoencoder.discriminator import PatchDiscriminator
from ldm.autoencoder.losses import AutoencoderLoss, Hinge, Vanilla
from ldm.autoencoder.lpips import LPIPS
from ldm.autoencoder.networks import Decoder, Encoder
from ldm.autoencoder.posterior import DiagonalGaussian


class Model(nn.Module):
    """A tiny autoencoder and a loss, the same weights each time."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(3, 8, (1, 2), 1, 2)
        self.decoder = Decoder(3, 8, (1, 2), 1, 2)
        self.loss = AutoencoderLoss(**options)
        nn.init.constant_(self.loss.logvar, 0.3)

    def run(self, images: Tensor) -> tuple[Tensor, DiagonalGaussian]:
        posterior = DiagonalGaussian(self.encoder(images))
        return self.decoder(posterior.sample(generator=torch.Generator().manual_seed(1))), posterior

    def ours(self, images: Tensor, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, posterior = self.run(images)
        return self.loss(images, reconstruction, posterior, self.decoder.last_layer, step)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.named_parameters() if parameter.requires_grad}


def textbook(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """Generator pass and discriminator pass, each with its own forward and backward, as the lineage writes them."""
    loss = model.loss
    reconstruction, posterior = model.run(images)
    error = (images - reconstruction).abs() + loss.l2_weight * (images - reconstruction) ** 2
    if loss.perceptual is not None:
        error = error + loss.perceptual_weight * loss.perceptual(images, reconstruction).view(-1, 1, 1, 1)
    nll = (error / loss.logvar.exp() + loss.logvar).sum() / images.shape[0]
    kl = posterior.kl().sum() / images.shape[0]
    adversarial = -loss.discriminator(reconstruction).mean()
    last = model.decoder.conv_out.weight
    nll_gradient = torch.autograd.grad(nll, last, retain_graph=True)[0]
    adversarial_gradient = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    weight = (nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0.0, 1e4).detach()
    weight = weight * loss.adversarial_weight
    generator = nll + loss.kl_weight * kl + weight * adversarial
    inputs = [*model.encoder.parameters(), *model.decoder.parameters(), loss.logvar]
    for parameter, gradient in zip(inputs, torch.autograd.grad(generator, inputs), strict=True):
        parameter.grad = gradient

    reconstruction, _ = model.run(images)
    real, fake = loss.discriminator(images), loss.discriminator(reconstruction.detach())
    if isinstance(loss.adversarial, Hinge):
        discriminator = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    else:
        ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
        scores = F.binary_cross_entropy_with_logits(real, ones), F.binary_cross_entropy_with_logits(fake, zeros)
        discriminator = 0.5 * (scores[0] + scores[1])
    inputs = list(loss.discriminator.parameters())
    for parameter, gradient in zip(inputs, torch.autograd.grad(discriminator, inputs), strict=True):
        parameter.grad = gradient
    return generator, discriminator


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("adversarial", [Hinge(), Vanilla()])
@pytest.mark.parametrize("perceptual", [None, LPIPS(pretrained=False)])
def test_one_backward_gives_the_textbook_gradients(adversarial, perceptual, images):
    ours = Model(
        perceptual=perceptual,
        perceptual_weight=0.7,
        l2_weight=0.3,
        kl_weight=0.1,
        discriminator=PatchDiscriminator(3, 8, 2),
        adversarial=adversarial,
        adversarial_start=0,
    )
    reference = copy.deepcopy(ours)
    loss, logs = ours.ours(images)
    loss.backward()
    generator, discriminator = textbook(reference, images)
    torch.testing.assert_close(loss, generator + discriminator)
    torch.testing.assert_close(logs["discriminator"], discriminator)
    expected = reference.gradients()
    for name, gradient in ours.gradients().items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * scale + 1e-6, rtol=1e-4, msg=name)


def test_each_part_of_the_loss_has_weight_in_the_parity(images):
    """The adversarial term moves the decoder's gradient, so that the parity above cannot pass without it."""
    discriminator = PatchDiscriminator(3, 8, 2)
    gradients = []
    for start in (0, 1):
        model = Model(discriminator=copy.deepcopy(discriminator), adversarial_start=start)
        model.ours(images)[0].backward()
        gradients.append(model.decoder.conv_out.weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()


def test_logvar_balances_the_error(images):
    """d nll / d logvar = n - error / exp(logvar): zero where exp(logvar) is the mean error."""
    model = Model(kl_weight=0.0)
    error = (images - model.run(images)[0]).abs().mean()
    nn.init.constant_(model.loss.logvar, error.log().item())
    model.ours(images)[0].backward()
    assert model.loss.logvar.grad.item() == pytest.approx(0.0, abs=1e-2)


def test_the_discriminator_sleeps_until_its_start(images):
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), adversarial_start=5)
    calls = []
    model.loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    loss, logs = model.ours(images, step=4)
    loss.backward()
    assert not calls
    assert "discriminator" not in logs
    assert all(parameter.grad is None for parameter in model.loss.discriminator.parameters())
    model.ours(images, step=5)[0].backward()
    assert len(calls) == 2
    assert all(parameter.grad is not None for parameter in model.loss.discriminator.parameters())


def test_flops_can_be_counted_through_the_inner_gradients():
    model = Model(perceptual=LPIPS(pretrained=False), discriminator=PatchDiscriminator(3, 8, 2), adversarial_start=0)
    with FlopCounterMode(display=False) as counter:
        model.ours(torch.rand(2, 3, 16, 16))[0].backward()
    assert counter.get_total_flops() > 0


def test_networks_run_forward_once(images):
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), adversarial_start=0)
    calls = []
    for network in (model.encoder, model.decoder):
        network.register_forward_hook(lambda *_: calls.append(1))
    model.ours(images)[0].backward()
    assert len(calls) == 2


def test_the_adversarial_weight_is_capped_and_finite(images):
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), adversarial_start=0, adversarial_weight=1.0)
    for parameter in model.loss.discriminator.parameters():
        nn.init.zeros_(parameter)
    _, logs = model.ours(images)
    assert 0 < logs["adversarial_weight"].item() <= 1e4


def test_without_a_discriminator_and_perceptual_loss(images):
    model = Model(kl_weight=0.5)
    loss, logs = model.ours(images)
    reconstruction, posterior = model.run(images)
    nll = (images - reconstruction).abs().sum() / 3 / torch.tensor(0.3).exp() + 0.3 * images[0].numel()
    torch.testing.assert_close(loss, nll + 0.5 * posterior.kl().mean())
    torch.testing.assert_close(logs["l1"], (images - reconstruction).abs().mean())
    assert not any(value.requires_grad for value in logs.values())


def test_the_loss_is_float32_under_autocast_and_close(images):
    options = {
        "perceptual": LPIPS(pretrained=False),
        "discriminator": PatchDiscriminator(3, 8, 2),
        "adversarial_start": 0,
    }
    exact, mixed = Model(**options), Model(**options)
    exact.ours(images)[0].backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs = mixed.ours(images)
    loss.backward()
    assert loss.dtype == logs["adversarial_weight"].dtype == torch.float32
    a, b = exact.decoder.conv_out.weight.grad, mixed.decoder.conv_out.weight.grad
    assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("objective", [Hinge(), Vanilla()])
def test_adversarial_objectives_push_the_right_way(objective):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    objective.discriminator(real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake.grad = None
    objective.generator(fake).backward()
    assert (fake.grad < 0).all()
