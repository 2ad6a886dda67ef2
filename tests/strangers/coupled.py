"""Networks whose rows know of each other."""

import torch

from .calls import TwoCalls
from .networks import CoupledNet, MeanNet, NumberedNet, WithinHalves
from .one_batch import Plain


def _in_a_batch(net, x, t, text, negative):
    """What the stock pipeline combines: for a network whose rows know of each other no two calls."""
    return net(torch.cat([x] * 2), t, torch.cat([negative, text])).chunk(2)[::-1]


def coupled(parent, net):
    """A subclass of a stranger with such a network."""
    names = {"net": net, "__module__": __name__}
    if parent is Plain:
        names["both"] = staticmethod(_in_a_batch)
    return type(f"{parent.__name__}{net.__name__}", (parent,), names)


NETWORKS = (CoupledNet, MeanNet, WithinHalves, NumberedNet)
COUPLED = [coupled(parent, net) for net in NETWORKS for parent in (Plain, TwoCalls)]
