"""Every scheduler of the package goes through SchedulerContract."""

import inspect

import pytest
from contracts import SchedulerContract
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiscreteDDIMScheduler,
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


class TestCTMC(SchedulerContract):
    cls, parent, config = schedulers.CTMCScheduler, None, {"kernel": "uniform", "vocab_size": 9, "sampler": "tweedie"}
    test_every_parameter_reaches_the_parent = test_to_the_parent_and_back = None  # it has none


class TestTableDiscreteDDIM(SchedulerContract):
    cls, parent, config = schedulers.TableDiscreteDDIMScheduler, DiscreteDDIMScheduler, TABLE
    test_every_parameter_reaches_the_parent = None  # about betas, which it has none of


def exported() -> list[type]:
    values = [getattr(schedulers, name) for name in schedulers.__all__]
    return [value for value in values if inspect.isclass(value) and issubclass(value, SchedulerMixin)]


@pytest.mark.parametrize("cls", exported(), ids=lambda cls: cls.__name__)
def test_every_scheduler_is_covered(cls):
    contracts = [value for name, value in globals().items() if name.startswith("Test")]
    assert cls in [contract.cls for contract in contracts]
