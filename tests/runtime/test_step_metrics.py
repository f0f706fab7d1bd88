import torch

from ldm.runtime.step_metrics import StepMean


def halves(rank: int) -> list[dict[str, float]]:
    """In a forked child: two steps of two micro-batches, numbered over both ranks."""
    mean, steps = StepMean(), []
    for step in range(2):
        for piece in range(2):
            value = torch.tensor(4.0 * step + 2 * rank + piece, dtype=torch.bfloat16, requires_grad=True)
            mean.add({"loss": value, "ten": 10 * value})
        steps.append({name: float(value) for name, value in mean.take().items()})
    return steps


def test_alone_it_is_the_mean_over_micro_batches():
    assert halves(0) == [{"loss": 0.5, "ten": 5.0}, {"loss": 4.5, "ten": 45.0}]


def test_on_two_ranks_all_see_the_mean_over_all_of_them(grouped):
    steps = [{"loss": 1.5, "ten": 15.0}, {"loss": 5.5, "ten": 55.0}]
    assert grouped(2, halves) == [steps, steps]


def test_the_step_is_a_detached_float32():
    mean = StepMean()
    mean.add({"loss": torch.ones((), dtype=torch.float16, requires_grad=True)})
    (value,) = mean.take().values()
    assert value.dtype == torch.float32
    assert not value.requires_grad
