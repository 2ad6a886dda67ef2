"""The stand-in for an accelerator behaves as one: its tensors stay there, meet no others, and what waits is noted."""

import copy

import pytest
import torch
from stand_in_device import (
    Draws,
    coarse_draws,
    device,
    moving_data,
    needs_device,
    ours,
    waits,
    without_float64,
)

from diffusers_ext.metrics import unigram_entropy

pytestmark = needs_device


@pytest.fixture(autouse=True)
def switched_on():
    with device():
        yield


def there(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to("dx")


def test_tensors_are_on_the_device_and_stay_there():
    x = there(3, 4)
    assert str(x.device) == "dx:0" and torch.zeros(2, device="dx").device == x.device
    linear = torch.nn.Linear(4, 2)
    expected = linear(x.cpu())
    moved = copy.deepcopy(linear).to("dx")
    assert isinstance(moved.weight, torch.nn.Parameter) and moved.weight.device == x.device
    assert moved(x).device == x.device
    torch.testing.assert_close(moved(x).cpu(), expected)
    view = x[1:]
    view.zero_()
    assert not x[1:].any() and x[0].all()
    assert x.clone().unsqueeze_(0).shape == (1, 3, 4)
    torch.manual_seed(1)
    drawn = torch.randn(5, device="dx")
    torch.manual_seed(1)
    assert torch.equal(drawn.cpu(), torch.randn(5))


def test_gradients_flow_on_the_device():
    x = there(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad((x**2).sum(), x)
    assert gradient.device == x.device
    torch.testing.assert_close(gradient.cpu(), 2 * x.detach().cpu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(4),
        lambda x: torch.cat([x, torch.ones(1, 4)]),
        lambda x: x @ torch.ones(4, 2),
        lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
        lambda x: torch.ones(4)[torch.tensor([1, 2]).to("dx")],
        lambda x: torch.nn.Linear(4, 2)(x),
        lambda x: torch.rand(2, device="dx", generator=torch.Generator()),
        lambda x: torch.poisson(x, torch.Generator()),
    ],
)
def test_the_host_s_tensors_and_generators_are_refused(mix):
    with pytest.raises(RuntimeError, match=r"same device|Expected a 'dx' device type"):
        mix(there(3, 4))


def test_a_number_of_the_host_is_taken():
    x = there(3, 4)
    one = torch.tensor(1.0)
    with waits() as noted:
        found = [x + one, x.clamp(min=one), x.masked_fill(x > 2, one), x * 2.0, torch.where(x > 0.5, x, 0.0)]
    assert not noted and all(value.device == x.device for value in found)


WAITS = {
    "item": (lambda x: x[0, 0].item(), ["read"]),
    "float": (lambda x: float(x.sum()), ["read"]),
    "bool": (lambda x: bool(x.sum() > 0), ["read"]),
    "cpu": (lambda x: x.cpu(), ["read"]),
    "tolist": (lambda x: x.tolist(), ["read"]),
    "nonzero": (lambda x: (x > 0.5).nonzero(), ["read"]),
    "mask": (lambda x: x[x > 0.5], ["read"]),
    "unique": (lambda x: x.unique(), ["read"]),
    "equal": (lambda x: torch.equal(x, x), ["read"]),
    "allclose": (lambda x: torch.allclose(x, x), ["read"]),
    "eigh": (lambda x: torch.linalg.eigh(x @ x.T), ["read"]),
    "index by a number": (lambda x: x[torch.arange(3, device="dx")[1]], ["read"]),
    "list of numbers": (lambda x: torch.tensor([x[0, 0], x[0, 1]]), ["read", "read"]),
    "copy to the host": (lambda x: torch.empty(3, 4).copy_(x), ["read"]),
    "to the device": (lambda x: torch.ones(2).to("dx"), ["transfer"]),
    "made there of numbers": (lambda x: torch.tensor([1.0, 2.0], device="dx"), ["transfer"]),
    "copy to the device": (lambda x: x.copy_(torch.ones(3, 4)), ["transfer"]),
    "index of the host": (lambda x: x[torch.tensor([0, 1])], ["transfer"]),
    "where": (lambda x: torch.where(x > 0.5, x, torch.tensor(0.0)), ["transfer"]),
    "fill a mask": (lambda x: x.clone().__setitem__(x > 0.5, 0.0), []),
    "index there": (lambda x: x[torch.arange(2, device="dx")], []),
    "slices and shapes": (lambda x: x[1:, 2].reshape(2, 1).expand(2, 5).contiguous(), []),
    "factories": (lambda x: (torch.arange(3, device="dx"), torch.full((2,), 0.5, device="dx")), []),
    "draws": (lambda x: (torch.rand(2, device="dx"), torch.multinomial(x, 1), torch.poisson(x)), []),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_noted_with_its_place(what):
    call, kinds = WAITS[what]
    x = there(3, 4)
    with waits() as noted:
        call(x)
    assert [wait.kind for wait in noted] == kinds
    assert all(__file__ in wait.place and not wait.ours for wait in noted)


def test_draws_are_counted_and_places_stay():
    with waits() as noted, Draws() as draws:
        torch.rand(2, generator=torch.Generator()).to("dx")
        torch.rand(2, device="dx").cpu()
    assert draws.count == 1 and [wait.kind for wait in noted] == ["transfer", "read"]
    assert all(__file__ in wait.place for wait in noted)


def test_lines_of_this_package_are_told_apart():
    with waits() as noted:
        unigram_entropy(torch.ones(2, 3, dtype=torch.int64).to("dx"))
    assert [wait.ours for wait in noted] == [False, True, True]  # the test's transfer; a read and a transfer of ours
    assert ours(noted).total() == 2 and all("sequences.py" in wait.place for wait in ours(noted))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, dtype=torch.float64).to("dx"),
        lambda: there(2).double(),
        lambda: torch.zeros(2, dtype=torch.float64, device="dx"),
        lambda: torch.tensor([1.0], dtype=torch.float64, device="dx"),
        lambda: torch.complex(there(2), there(2)).to(torch.complex128),
    ],
)
def test_float64_can_be_refused(make):
    assert make().device.type == "dx"
    with without_float64(), pytest.raises(TypeError, match="which does not support it; use float32"):
        make()
    with without_float64():  # a number of the host may have any type, and a cast on the way is one
        assert (there(2) * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
        assert torch.ones(2, dtype=torch.float64).to("dx", torch.float32).dtype == torch.float32


def test_draws_can_be_coarse():
    torch.manual_seed(0)
    with coarse_draws(bits=6):
        uniform = torch.rand(20_000, device="dx").cpu()
    assert (uniform * 2**6 == (uniform * 2**6).floor()).all() and uniform.min() == 0 and uniform.max() == 1 - 2**-6
    with coarse_draws(bits=6):
        floored = torch.empty(20_000, device="dx").exponential_().cpu()
    with coarse_draws(bits=6, negative_zeros=True):
        zeros = torch.empty(20_000, device="dx").exponential_(2.0).cpu()
    assert floored.min() == 2**-6 and len(floored.unique()) <= 2**6
    assert 0.5 < (floored == 2**-6).float().mean() * 2**6 < 1.5 and abs(floored.mean() - 1) < 0.1
    lowest = zeros[zeros == 0]
    assert len(lowest) and torch.signbit(lowest).all() and abs(zeros.mean() - 0.5) < 0.05


def test_data_moves_as_group_offloading_moves_it():
    linear, expected = torch.nn.Linear(4, 2), torch.ones(1, 4)
    expected = linear(expected)
    weight = linear.weight
    with moving_data():
        for parameter in linear.parameters():
            parameter.data = parameter.data.to("dx")
        assert linear.weight is weight and weight.device.type == "dx"
        torch.testing.assert_close(linear(torch.ones(1, 4).to("dx")).cpu(), expected)
        for parameter in linear.parameters():
            parameter.data = parameter.data.cpu()
    assert torch.equal(linear(torch.ones(1, 4)), expected)
