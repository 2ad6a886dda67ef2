"""What repairing costs beside sampling, and what it gives: 1, 4 and 10 Euler steps and dopri5, each batch in turn.

    python benchmarks/flow_postprocessing.py [--guidance-scale 15] [--samples 1000] [--steps 16]

Draws digits of the shipped MNIST model in batches and repairs each batch with every solver before the next is drawn,
so that whatever else the machine does meets all of them. Prints, for each solver, network evaluations of an image, the
median over the batches of its time as a share of drawing the same batch, and the Fréchet distance of all images to the
training set, in the features of the shipped classifier. The first batch is drawn and repaired once before, to warm up.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch

from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.machine.versions import best_device
from diffusers_ext.sampling import sample_images
from diffusers_ext.shipped import load_pipeline

SOLVERS = {
    "Euler, 1 step": {"num_inference_steps": 1},
    "Euler, 4 steps": {"num_inference_steps": 4},
    "Euler, 10 steps": {"num_inference_steps": 10},
    "dopri5, tolerance 1e-2": {"solver": "dopri5", "rtol": 1e-2, "atol": 1e-2},
    "dopri5, tolerance 1e-3": {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3},
}


class Counter:
    """Counts the images that a network is called with."""

    def __init__(self, model: torch.nn.Module):
        self.images = 0
        model.register_forward_pre_hook(self)

    def __call__(self, model, args):
        self.images += len(args[0])


def seconds(draw, device: str):
    """What draw returns, and how long it took."""
    started = time.perf_counter()
    drawn = draw()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return drawn, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="mnist-unet")
    parser.add_argument("--flow", default="mnist-flow")
    parser.add_argument("--guidance-scale", type=float, default=15.0)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=16, help="of the base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default=best_device())
    given = parser.parse_args()

    dtype = getattr(torch, given.dtype)
    base, flow = (load_pipeline(name, dtype=dtype).to(given.device) for name in (given.base, given.flow))
    for pipe in (base, flow):
        pipe.set_progress_bar_config(disable=True)
    counter = Counter(flow.model)
    labels, call = torch.arange(given.samples) % 10, {"num_inference_steps": given.steps}

    def draw(classes: torch.Tensor, seed: int) -> torch.Tensor:
        return sample_images(base, classes, seed, guidance_scale=given.guidance_scale, **call)

    def repair(images: torch.Tensor, classes: torch.Tensor, solver: dict) -> torch.Tensor:
        return flow(images, class_labels=classes, output_type="pt", **solver).images.float().cpu()

    first = labels[: given.batch_size]
    warm = draw(first, 0)
    for solver in SOLVERS.values():
        repair(warm, first, solver)

    images, times, evaluations = defaultdict(list), defaultdict(list), defaultdict(int)
    for start, classes in zip(range(0, given.samples, given.batch_size), labels.split(given.batch_size), strict=False):
        drawn, took = seconds(lambda: draw(classes, start), given.device)  # noqa: B023
        images["no repair"].append(drawn)
        times["no repair"].append(took)
        for name, solver in SOLVERS.items():
            counter.images = 0
            repaired, took = seconds(lambda: repair(drawn, classes, solver), given.device)  # noqa: B023
            images[name].append(repaired)
            times[name].append(took)
            evaluations[name] += counter.images

    print(f"{given.base}, guidance {given.guidance_scale:g}, {given.samples} images, {given.dtype}, {given.device},"
          f" {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':24}{'evaluations':>12}{'ms an image':>13}{'of drawing':>12}{'Fréchet':>9}")
    for name, sheets in images.items():
        each = 1000 * statistics.median(times[name]) / given.batch_size
        ratios = [mine / its for mine, its in zip(times[name], times["no repair"], strict=True)]
        distance = evaluate_digits(torch.cat(sheets), labels, ("frechet",))["frechet"]
        calls = f"{evaluations[name] / given.samples:.1f}" if name in evaluations else ""
        print(f"{name:24}{calls:>12}{each:>13.1f}{statistics.median(ratios):>12.1%}{distance:>9.3f}")


if __name__ == "__main__":
    main()
