"""Every scheduler of the package goes through SchedulerContract."""

import inspect
import sys
from contextlib import suppress

import diffusers
import pytest
import torch
from contracts import SchedulerContract
from diffusers import (
    AmusedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
)

from diffusers_ext import schedulers

BOOST = {"gamma": 4.0, "skip_steps": 3}
TABLE = {"timestep_tables": {"2": [1.0, 0.4, 0.1]}, "timestep_spacing": "table"}


class TestBoostAndSkipDDPM(SchedulerContract):
    cls, parent, config = schedulers.BoostAndSkipDDPMScheduler, DDPMScheduler, BOOST


class TestBoostAndSkipDDIM(SchedulerContract):
    cls, parent, config = schedulers.BoostAndSkipDDIMScheduler, DDIMScheduler, BOOST


class TestBoostAndSkipEulerDiscrete(SchedulerContract):
    cls, parent, config = schedulers.BoostAndSkipEulerDiscreteScheduler, EulerDiscreteScheduler, BOOST


class TestBoostAndSkipDPMSolverMultistep(SchedulerContract):
    cls, parent, config = schedulers.BoostAndSkipDPMSolverMultistepScheduler, DPMSolverMultistepScheduler, BOOST


class TestEDMHeun(SchedulerContract):
    cls, parent, config = schedulers.EDMHeunScheduler, None, {"sigma_max": 14.6, "rho": 3.0, "S_churn": 40.0}
    test_every_parameter_reaches_the_parent = test_to_the_parent_and_back = None  # it has none
    test_numbers_of_training_steps = test_trained_betas_are_kept = None  # its times are noise levels

    def step(self, scheduler, sample, timestep, **options):
        """The start of a step comes after churn, which is refused in the middle of one."""
        with suppress(ValueError):
            sample, timestep = scheduler.churn(sample, generator=torch.Generator().manual_seed(1))
        return super().step(scheduler, sample, timestep, **options)

    def test_noise_is_as_much_as_the_level_says(self):
        x, noise = self.sample(), self.sample().flip(0)
        noisy = self.cls().add_noise(x, noise, torch.tensor([0.0, 1.0, 2.0, 80.0]))
        torch.testing.assert_close(noisy, x + torch.tensor([0.0, 1.0, 2.0, 80.0]).view(4, 1, 1, 1) * noise)
        assert self.cls().add_noise(x.half(), noise, 2.0).dtype == torch.float16


def in_diffusers(name: str):
    return pytest.mark.skipif(not hasattr(diffusers, name), reason=f"diffusers {diffusers.__version__} has no {name}")


class _Tokens(SchedulerContract):
    """Schedulers of tokens: no betas."""

    test_every_parameter_reaches_the_parent = test_to_the_parent_and_back = None
    test_numbers_of_training_steps = test_trained_betas_are_kept = None

    def sample(self):
        return torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))

    def output(self, sample):
        return torch.randn(*sample.shape, 9, generator=torch.Generator().manual_seed(3))


class TestCTMC(_Tokens):
    cls, parent, config = schedulers.CTMCScheduler, None, {"kernel": "uniform", "vocab_size": 9, "sampler": "tweedie"}

    def noise(self, uniforms):
        return uniforms, self.sample().flip(1)


class TestTableAmused(_Tokens):
    cls, parent, config = schedulers.TableAmusedScheduler, AmusedScheduler, {"mask_token_id": 9, **TABLE}
    test_to_the_parent_and_back = SchedulerContract.test_to_the_parent_and_back
    test_noise_is_added_at_one_time_or_one_a_sample = None  # masks are no noise that is passed in

    def sample(self):
        return torch.full((4, 6), 9)


@in_diffusers("BlockRefinementScheduler")
class TestTableBlockRefinement(_Tokens):
    cls = getattr(schedulers, "TableBlockRefinementScheduler", None)
    parent, config = getattr(diffusers, "BlockRefinementScheduler", None), TABLE
    test_to_the_parent_and_back = SchedulerContract.test_to_the_parent_and_back
    test_noise_is_added_at_one_time_or_one_a_sample = None  # as its parent's, of blocks after a prompt

    def step(self, scheduler, sample, timestep, **options):
        return super().step(scheduler, sample, timestep, mask_token_id=8, **options)


@in_diffusers("DiscreteDDIMScheduler")
class TestTableDiscreteDDIM(_Tokens):
    cls = getattr(schedulers, "TableDiscreteDDIMScheduler", None)
    parent, config = getattr(diffusers, "DiscreteDDIMScheduler", None), TABLE
    test_to_the_parent_and_back = SchedulerContract.test_to_the_parent_and_back


def exported() -> list[type]:
    values = [getattr(schedulers, name) for name in schedulers.__all__]
    return [value for value in values if inspect.isclass(value) and issubclass(value, SchedulerMixin)]


@pytest.mark.parametrize("cls", exported(), ids=lambda cls: cls.__name__)
def test_every_scheduler_is_covered(cls):
    contracts = [value for name, value in globals().items() if name.startswith("Test")]
    assert cls in [contract.cls for contract in contracts]


@pytest.mark.parametrize("cls", exported(), ids=lambda cls: cls.__name__)
def test_diffusers_loads_it_as_a_component(cls):
    """By a base class that it looks for in the module which the pipeline's index names."""
    assert issubclass(cls, sys.modules[cls.__module__].SchedulerMixin)
