"""Outputs of networks that are remembered: pipelines give the same results bit for bit, with fewer evaluations."""

from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny_guided_pipelines import CASES, ONE_BY_ONE

from diffusers_ext import EDM2Pipeline, EDM2UNet2DModel, EDMHeunScheduler, GuidanceInterval
from diffusers_ext.guidance.memory import OutputMemory, remembering
from diffusers_ext.guidance.rows import counted_rows

# A doubled batch, rows of adapters, a list of samples, two calls, two networks, processors that are put in for the
# call, frequencies computed anew, a combined pipeline, and caches among the arguments, which nobody remembers.
FAMILIES = [
    "stable_diffusion_xl", "stable_diffusion_controlnet", "stable_diffusion_instruct_pix2pix", "stable_diffusion_pag",
    "stable_diffusion_3", "dit", "omnigen", "z_image", "flux", "wan_2_2", "skyreels_v2", "kandinsky_2_2_combined",
    "qwen_image_2_1", "dream_lite_edit",
]  # fmt: skip
CACHED = {"qwen_image_2_1"}
BUILDERS = {**CASES, **{build.__name__: build for build in ONE_BY_ONE}}
CANDIDATES = [(2, 3), (1, 3), (2, 2), None, (2, 3), (1, 1)]  # steps of four; None is every one


def drawn(case, steps) -> list[torch.Tensor]:
    with nullcontext() if steps is None else GuidanceInterval(case.pipe, guided_steps=steps):
        torch.manual_seed(0)
        return tensors(case.pipe(generator=torch.Generator().manual_seed(0), **case.options))


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, dict | list | tuple):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in tensors(part)]
    return [] if value is None else [torch.as_tensor(value)]


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs) and all(
        len(one) == len(other) > 0 and all(map(torch.equal, one, other))
        for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_the_same(name):
    case = BUILDERS[name]()
    expected = [drawn(case, steps) for steps in CANDIDATES]
    with counted_rows(case.pipe) as counted:
        assert_same([drawn(case, steps) for steps in CANDIDATES], expected)  # the pipeline repeats itself
    everything = sum(counted)
    with remembering(case.pipe, 1 << 28) as memory, counted_rows(case.pipe) as counted:
        assert_same([drawn(case, steps) for steps in CANDIDATES], expected)
    assert memory.rows_run == sum(counted) and memory.rows_asked == everything
    if name in CACHED:
        assert memory.rows_run == memory.rows_asked and memory.size == 0
    else:
        assert memory.rows_run < 0.7 * memory.rows_asked
    networks = [part for part in case.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any("_compiled_call_impl" in vars(network) for network in networks)


def test_guided_steps_are_shared_as_far_as_they_go():
    """By hand, of 2 images: unguided steps take 2 rows, guided ones 4."""
    case = CASES["stable_diffusion_3"]()
    with remembering(case.pipe, 1 << 28) as memory:
        rows = []
        for steps in CANDIDATES:
            before = memory.rows_run
            drawn(case, steps)
            rows.append(memory.rows_run - before)
    assert rows == [2 + 2 + 4 + 4, 4 + 4 + 4, 2, 4 * 4, 0, 2 + 2]


def edm2() -> EDM2Pipeline:
    sizes = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "channel_mult": (1,), "channels_per_head": 8}
    torch.manual_seed(0)
    networks = [EDM2UNet2DModel(label_dim=classes, **sizes) for classes in (3, 0)]
    for network in networks:
        network.requires_grad_(False).out_conv.gain.fill_(1)
    pipe = EDM2Pipeline(networks[0], EDMHeunScheduler(), guidance_unet=networks[1])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_both_networks_of_edm2():
    pipe = edm2()
    call = {"class_labels": [0, 1], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}

    def images(steps):
        return [pipe(**call, guided_steps=steps, generator=torch.Generator().manual_seed(1)).images]

    expected = [images(steps) for steps in ((1, 1), (1, 2))]
    with remembering(pipe, 1 << 24) as memory, counted_rows(pipe) as counted:
        assert_same([images(steps) for steps in ((1, 1), (1, 2))], expected)
    # Two Heun steps and one Euler step, on 2 images: the second call shares all but the guidance of the last.
    assert memory.rows_asked == 2 * (5 + 2) + 2 * (5 + 3) and memory.rows_run == sum(counted) < 2 * 7 + 2 * 3


class Slots:
    __slots__ = ("last",)

    def __init__(self):
        self.last = 0


class Network(torch.nn.Module):
    """What a network may do in a call besides answering."""

    def __init__(self, does=lambda self, x: None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.does, self.kept, self.scale = does, {"last": None, "deep": {"er": []}}, 1.0
        self.generator, self.queue, self.table, self.slots = torch.Generator(), deque(), np.zeros(2), Slots()

    def forward(self, x, timestep, **kwargs):
        self.does(self, x)
        return (x * self.weight * self.scale * (1 + self.count),)


def asked_twice(network, args=None, kwargs=None, limit=1 << 20, between=lambda: None) -> tuple[int, list]:
    """How often a network was run for two equal calls, and what it gave."""
    memory, ran, given = OutputMemory(limit), [], []

    def call(*args, **kwargs):
        ran.append(1)
        return network._call_impl(*args, **kwargs)

    for _ in range(2):
        given.append(memory.answer(network, call, (args or (torch.ones(2, 3), 5)), kwargs or {}))
        between()
    return len(ran), given


def test_an_output_is_remembered_and_nobody_s_changes_reach_it():
    network = Network()
    ran, (first, second) = asked_twice(network)
    assert ran == 1 and torch.equal(first[0], second[0])
    memory = OutputMemory(1 << 20)
    x = torch.ones(2, 3)
    for _ in range(3):
        (out,) = memory.answer(network, network._call_impl, (x, 5), {})
        assert torch.equal(out, torch.ones(2, 3))
        out.mul_(7)


@pytest.mark.parametrize(
    "does",
    [
        lambda self, x: torch.rand(1),
        lambda self, x: torch.nn.functional.dropout(x, training=True),
        lambda self, x: self.count.add_(1),
        lambda self, x: self.weight.mul_(2),
        lambda self, x: self.kept.update(last=x.sum().item() + len(self.kept), **{str(len(self.kept)): 0}),
        lambda self, x: setattr(self, "scale", self.scale + 1),
        lambda self, x: x.add_(1),
        lambda self, x: torch.rand(1, generator=self.generator),
        lambda self, x: self.queue.append(1),
        lambda self, x: self.table.__setitem__(0, self.table[0] + 1),
        lambda self, x: setattr(self.slots, "last", self.slots.last + 1),
        lambda self, x: self.kept["deep"]["er"].append(1),
    ],
    ids=[
        "random",
        "dropout",
        "buffer",
        "weight",
        "attribute of an attribute",
        "attribute",
        "its argument",
        "its own generator",
        "queue",
        "array",
        "slots",
        "list in dicts",
    ],
)
def test_a_call_that_leaves_something_changed_is_run_again(does):
    one, other = Network(does), Network(does)
    torch.manual_seed(0)
    ran, given = asked_twice(one, (torch.ones(2, 3), 5))
    torch.manual_seed(0)
    x = torch.ones(2, 3)
    expected = [other._call_impl(x, 5) for _ in range(2)]
    assert ran == 2 and all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(given, expected, strict=True))


def test_a_network_that_was_changed_between_calls_is_run_again_and_one_that_is_as_before_is_not():
    network = Network()
    for change in (
        lambda: network.weight.mul_(2),
        lambda: setattr(network, "scale", network.scale + 1),
        lambda: setattr(network, "weight", torch.nn.Parameter(torch.full((1,), 3.0), requires_grad=False)),
        lambda: network.register_forward_hook(lambda module, args, output: (output[0] + 1,)),
        lambda: network.train(not network.training),
    ):
        assert asked_twice(network, between=change)[0] == 2
    scales = iter((2.0, 1.0, 2.0, 1.0))
    network.scale, memory, ran = 1.0, OutputMemory(1 << 20), []
    for _ in range(4):
        memory.answer(network, lambda *args: ran.append(1) or network._call_impl(*args), (torch.ones(1, 1), 5), {})
        network.scale = next(scales)
    assert len(ran) == 2


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(2, 3).double(), 5), (torch.ones(3, 2), 5), (torch.ones(3, 2).T, 5), (torch.ones(2, 3), 5.0),
        (torch.ones(2, 3), True), (torch.ones(2, 3), torch.tensor(5)), (torch.ones(2, 3), [5]),
        (torch.ones(2, 3) * (1 + 2**-23), 5),
    ],
)  # fmt: skip
def test_another_input_is_another_input(other):
    """Of another dtype, shape, layout, kind of number, or by its last bit."""
    memory, network, ran = OutputMemory(1 << 20), Network(), []
    for args in ((torch.ones(2, 3), 5), other, (torch.ones(2, 3), 5)):
        memory.answer(network, lambda *args: ran.append(1) or network._call_impl(*args), args, {})
    assert len(ran) == 2
    signed = [(torch.zeros(1, 1), 5), (-torch.zeros(1, 1), 5)]
    given = [memory.answer(network, network._call_impl, args, {})[0].signbit().item() for args in signed]
    assert given == [False, True]


def test_what_holds_more_than_is_seen_is_not_remembered():
    for extra in (torch.Generator(), object(), iter([1]), torch.ones(2).to_sparse()):
        assert asked_twice(Network(), kwargs={"extra": extra})[0] == 2
    for extra in (None, "text", {"scale": 0.5, "ids": [torch.ones(2), (1, None)]}, torch.float16):
        assert asked_twice(Network(), kwargs={"extra": extra})[0] == 1
    with torch.enable_grad():
        assert asked_twice(Network(), (torch.ones(2, 3, requires_grad=True), 5))[0] == 2
    with torch.autocast("cpu", torch.bfloat16):
        ran, given = asked_twice(Network())
    assert ran == 1 and torch.equal(given[0][0], given[1][0])


def test_a_network_with_a_cache_of_diffusers_is_never_remembered():
    case = CASES["flux"]()
    case.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    expected = [drawn(case, None) for _ in range(2)]
    with remembering(case.pipe, 1 << 24) as memory:
        assert_same([drawn(case, None) for _ in range(2)], expected)
    assert memory.rows_run == memory.rows_asked > 0 and memory.size == 0


def test_the_memory_is_bounded_and_forgets_what_was_used_longest_ago():
    network, ran = Network(), []
    inputs = [torch.full((4, 256), float(i)) for i in range(3)]  # 4 KiB, and the output as much
    inputs.append(torch.ones(4, 2560))

    def ask(i):
        before = len(ran)
        out = memory.answer(network, lambda *args: ran.append(1) or network._call_impl(*args), (inputs[i], 5), {})[0]
        assert torch.equal(out, inputs[i]) and memory.size <= memory.limit
        return len(ran) > before

    memory = OutputMemory(24 << 10)  # two of them, and the beginnings of a third
    assert [ask(i) for i in (0, 1, 0, 2, 0, 1, 2)] == [True, True, False, True, False, True, True]
    assert [ask(i) for i in (3, 3, 2)] == [True, True, False]  # what is too large puts nothing out
    assert 16 << 10 <= memory.size <= 24 << 10
    memory = OutputMemory(1 << 10)  # too small for any
    assert [ask(i) for i in (0, 0)] == [True, True] and memory.size == 0
    memory = OutputMemory(0)
    assert [ask(i) for i in (0, 0)] == [True, True] and memory.size == 0 and memory.rows_asked == 8


def test_equal_parts_of_inputs_are_held_once():
    """Text embeddings, which are those of every step."""
    network, memory = Network(), OutputMemory(1 << 24)
    for i in range(8):
        memory.answer(network, network._call_impl, (torch.full((1, 4), i), 5), {"text": torch.ones(1, 100_000)})
    assert 400_000 < memory.size < 450_000
    memory.limit = 0
    memory._drop(next(iter(memory._entries)))
    assert memory.size > 400_000
    while memory._entries:
        memory._drop(next(iter(memory._entries)))
    assert memory.size == 0 and not memory._parts


def test_it_ends_with_the_block_exceptions_included():
    case = CASES["dit"]()
    with pytest.raises(ZeroDivisionError), remembering(case.pipe, 1 << 20):
        raise ZeroDivisionError
    assert "_compiled_call_impl" not in vars(case.pipe.transformer)
    with pytest.raises(ValueError, match="limit must be >= 0 bytes, got -1"), remembering(case.pipe, -1):
        pass
