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
from ldm.autoencoder.posterior import DiagonalGaussian, Posterior
from ldm.autoencoder.quantizer import VectorQuantizer


class Model(nn.Module):
    """A tiny autoencoder and a loss, the same weights each time."""

    def __init__(self, quantizer: VectorQuantizer | None = None, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = quantizer
        self.encoder = Encoder(3, 8, (1, 2), 1, 2, moments=quantizer is None)
        self.decoder = Decoder(3, 8, (1, 2), 1, 2)
        self.loss = AutoencoderLoss(**options)
        nn.init.constant_(self.loss.logvar, 0.3)

    def run(self, images: Tensor) -> tuple[Tensor, Posterior]:
        if self.quantizer is not None:
            posterior = self.quantizer(self.encoder(images))
            return self.decoder(posterior.sample()), posterior
        posterior = DiagonalGaussian(self.encoder(images))
        return self.decoder(posterior.sample(generator=torch.Generator().manual_seed(1))), posterior

    def ours(self, images: Tensor, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        reconstruction, posterior = self.run(images)
        return self.loss(images, reconstruction, posterior, self.decoder.last_layer, step)

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: parameter.grad for name, parameter in self.named_parameters() if parameter.requires_grad}


class Contrast(nn.Module):
    """A perceptual distance by hand: the squared difference of two images' standard deviations, (N,)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return 10 * (a.flatten(1).std(1) - b.flatten(1).std(1)) ** 2


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
@pytest.mark.parametrize("perceptual", [None, LPIPS])
def test_one_backward_gives_the_textbook_gradients(adversarial, perceptual, images):
    torch.manual_seed(0)
    ours = Model(
        perceptual=perceptual and perceptual(),
        perceptual_weight=0.7,
        l2_weight=0.3,
        kl_weight=0.1,
        discriminator=PatchDiscriminator(3, 8, 2),
        adversarial=adversarial,
        disc_start=0,
    )
    reference = copy.deepcopy(ours)
    loss, logs = ours.ours(images)
    loss.backward()
    generator, discriminator = textbook(reference, images)
    torch.testing.assert_close(loss, generator + discriminator)
    torch.testing.assert_close(logs["discriminator"], discriminator)
    expected = reference.gradients()
    for name, gradient in ours.gradients().items():
        # Softmax does not see a key's bias: its gradient is zero, and what is found is the rounding of its weight's.
        scale = expected[name.replace(".k.bias", ".k.weight")].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * scale + 1e-6, rtol=1e-4, msg=name)


def test_each_part_of_the_loss_has_weight_in_the_parity(images):
    """The adversarial term moves the decoder's gradient, so that the parity above cannot pass without it."""
    discriminator = PatchDiscriminator(3, 8, 2)
    gradients = []
    for start in (0, 1):
        model = Model(discriminator=copy.deepcopy(discriminator), disc_start=start)
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
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), disc_start=5)
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
    model = Model(perceptual=LPIPS(), discriminator=PatchDiscriminator(3, 8, 2), disc_start=0)
    with FlopCounterMode(display=False) as counter:
        model.ours(torch.rand(2, 3, 16, 16))[0].backward()
    assert counter.get_total_flops() > 0


def test_networks_run_forward_once(images):
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), disc_start=0)
    calls = []
    for network in (model.encoder, model.decoder):
        network.register_forward_hook(lambda *_: calls.append(1))
    model.ours(images)[0].backward()
    assert len(calls) == 2


class Slope(nn.Module):
    """One logit an image: `slope` times its mean."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, images: Tensor) -> Tensor:
        return self.slope * images.mean((1, 2, 3))


# Of black pictures and a reconstruction of 2 everywhere, by one last weight of 1 on features of 2: the gradient of the
# mean error at that weight is 2, that of the generator's term -2 x slope.
ADAPTIVE = [(1.0, 2 / 2.0001), (1e-4, 2 / 3e-4), (1e-6, 2 / 1.02e-4), (0.0, 2e4)]


def adaptive_weight(slope: float, side: int, **options) -> float:
    last = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(last.weight)
    reconstruction = last(torch.full((2, 1, side, side), 2.0))
    loss = AutoencoderLoss(discriminator=Slope(slope), disc_start=0, adversarial_weight=0.75, **options)
    posterior = DiagonalGaussian(torch.zeros(2, 2, 1, 1))
    return loss(torch.zeros(2, 1, side, side), reconstruction, posterior, last, 0)[1]["adversarial_weight"].item()


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize(("slope", "ratio"), ADAPTIVE)
def test_the_adaptive_weight_of_a_mean_error(slope, ratio, side):
    """Published VQ: at most 1e4 where the error is a mean over an image's n values; n times all of it for their sum."""
    n = side * side
    expected = 0.75 * n * min(ratio, 1e4)
    assert adaptive_weight(slope, side, max_adversarial_weight=1e4 * n) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", [4, 16])
@pytest.mark.parametrize(("slope", "ratio"), ADAPTIVE)
def test_the_adaptive_weight_of_a_summed_error(slope, ratio, side):
    """Published KL, the default: at most 1e4 where the error is summed."""
    assert adaptive_weight(slope, side) == pytest.approx(0.75 * min(side * side * ratio, 1e4), rel=1e-5)


@pytest.mark.parametrize("discriminator_scale", [1.0, 1e-3, 0.0])
def test_published_vq_training(discriminator_scale, images):
    """Means over values and codes, beta at the codebook's term, no log-variance: all gradients are ours over n."""
    n, codes = images[0].numel(), 2 * 8 * 8
    options = {"perceptual": Contrast(), "disc_start": 0, "adversarial_weight": 0.75, "learn_logvar": False}
    options |= {"kl_weight": 0.25 * n / codes, "max_adversarial_weight": 1e4 * n}
    ours = Model(discriminator=PatchDiscriminator(3, 8, 2), quantizer=VectorQuantizer(16, 2, 4.0), **options)
    nn.init.zeros_(ours.loss.logvar)
    nn.init.normal_(ours.quantizer.codebook.weight)
    ours.loss.discriminator.layers[-1].weight.data.mul_(discriminator_scale)
    reference = copy.deepcopy(ours)
    total, logs = ours.ours(images)
    total.backward()

    latents = reference.encoder(images)
    book = reference.quantizer.codebook.weight
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 2)
    chosen = book[((rows[:, None] - book) ** 2).sum(2).argmin(1)].view(3, 8, 8, 2).permute(0, 3, 1, 2)
    codebook = ((chosen.detach() - latents) ** 2).mean() + 0.25 * ((chosen - latents.detach()) ** 2).mean()
    reconstruction = reference.decoder(latents + (chosen - latents).detach())
    error = ((images - reconstruction).abs() + Contrast()(images, reconstruction).view(-1, 1, 1, 1)).mean()
    fooled = -reference.loss.discriminator(reconstruction).mean()
    last = reference.decoder.conv_out.weight
    long, short = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (error, fooled))
    weight = (long / (short + 1e-4)).clamp(0.0, 1e4) * 0.75
    assert (weight == 7500) == (discriminator_scale == 0)
    (error + weight.detach() * fooled + codebook).backward()
    assert logs["adversarial_weight"].item() == pytest.approx(n * weight.item(), rel=1e-4)
    for part in ("encoder", "decoder", "quantizer"):
        found, expected = (
            torch.cat([parameter.grad.flatten() for parameter in model.get_submodule(part).parameters()])
            for model in (ours, reference)
        )
        assert (found - n * expected).norm() < 1e-5 * (n * expected).norm(), part


def test_a_fixed_logvar_is_in_the_state_alone(images):
    fixed, learned = Model(learn_logvar=False, kl_weight=0.5), Model(kl_weight=0.5)
    assert fixed.state_dict().keys() == learned.state_dict().keys()
    (a, _), (b, _) = fixed.ours(images), learned.ours(images)
    torch.testing.assert_close(a, b)
    for total in (a, b):
        total.backward()
    assert fixed.loss.logvar.grad is None
    assert learned.loss.logvar.grad is not None
    torch.testing.assert_close(fixed.decoder.conv_out.weight.grad, learned.decoder.conv_out.weight.grad)
    assert "logvar" in dict(AutoencoderLoss(logvar=0, learn_logvar=False).state_dict())


def test_the_adversarial_weight_is_capped_and_finite(images):
    model = Model(discriminator=PatchDiscriminator(3, 8, 2), disc_start=0, adversarial_weight=1.0)
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
        "perceptual": LPIPS(),
        "discriminator": PatchDiscriminator(3, 8, 2),
        "disc_start": 0,
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


def test_a_fixed_logvar_is_the_configured_one_whatever_a_checkpoint_holds():
    saved = nn.ModuleDict({"loss": AutoencoderLoss(logvar=-0.5)}).state_dict()
    for learned, expected in ((False, 1.0), (True, -0.5)):
        model = nn.ModuleDict({"loss": AutoencoderLoss(logvar=1.0, learn_logvar=learned)})
        copy.deepcopy(model).load_state_dict(saved)
        model.load_state_dict(saved)
        assert model.loss.logvar.item() == expected
        assert saved["loss.logvar"].item() == -0.5
    with pytest.raises(RuntimeError, match="logvar"):
        model.load_state_dict({})
