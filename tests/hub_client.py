"""Fresh process that loads what it is asked to: a JSON line of a socket for each request, and one for its answer.

    hub_client.py hidden|package PORT

hidden: diffusers_ext cannot be imported. package: it has been imported. A request names a function, its arguments, and
the call that draws from what it returns.
"""

import importlib
import json
import pkgutil
import socket
import sys

import huggingface_hub
import torch
from hidden_package import hide

# What the environment says of the Hub counts, though it was imported before; diffusers copies it when it is imported.
importlib.reload(huggingface_hub.constants)
huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
DiffusionPipeline = importlib.import_module("diffusers").DiffusionPipeline
SchedulerMixin = importlib.import_module("diffusers.schedulers.scheduling_utils").SchedulerMixin


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
    channel = socket.create_connection(("127.0.0.1", int(sys.argv[2]))).makefile("rw")
    if sys.argv[1] == "hidden":
        hide("diffusers_ext")
    else:
        import diffusers_ext  # noqa: F401
    for line in channel:
        print(json.dumps(answer(json.loads(line))), file=channel, flush=True)
    hidden = not [name for name in sys.modules if name.split(".")[0] == "diffusers_ext"]
    assert hidden == (sys.argv[1] == "hidden")
