"""Fresh process that loads what it is asked to: a JSON line on stdin for each request, one on stdout for its answer.

hidden: diffusers_ext cannot be imported. package: it has been imported. A request names a function, its arguments, and
the call that draws from what it returns.
"""

import json
import pkgutil
import sys

import huggingface_hub
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from hidden_package import hide


def set_offline(offline: bool) -> None:
    """What HF_HUB_OFFLINE=1 does in a process that starts with it."""
    huggingface_hub.constants.HF_HUB_OFFLINE = offline


def describe(value, call: dict | None) -> dict:
    """A sample of a pipeline, the config of a scheduler, the sum of each weight of a network, or the value itself."""
    described = {"type": type(value).__name__, "module": type(value).__module__}
    if isinstance(value, DiffusionPipeline):
        described["name_or_path"] = str(value.config["_name_or_path"])
        if call is not None:
            value.set_progress_bar_config(disable=True)
            output = value(**call, generator=torch.Generator().manual_seed(7))
            described["sample"] = (output.tokens if hasattr(output, "tokens") else output.images).tolist()
    elif isinstance(value, SchedulerMixin):
        described["config"] = json.loads(json.dumps(dict(value.config), default=str))
    elif isinstance(value, torch.nn.Module):
        described["weights"] = {name: float(tensor.double().sum()) for name, tensor in value.state_dict().items()}
    else:
        described["value"] = value if value is None else str(value)
    return described


def answer(request: dict) -> dict:
    try:
        value = pkgutil.resolve_name(request["function"])(*request["args"], **request["kwargs"])
        return describe(value, request["call"])
    except Exception as error:
        bases = [cls.__name__ for cls in type(error).__mro__]
        return {"error": type(error).__name__, "bases": bases, "message": str(error)}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    if sys.argv[1] == "hidden":
        hide("diffusers_ext")
    else:
        import diffusers_ext  # noqa: F401
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
    hidden = not [name for name in sys.modules if name.split(".")[0] == "diffusers_ext"]
    assert hidden == (sys.argv[1] == "hidden")
