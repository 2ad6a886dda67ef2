"""What a search for a guidance interval saves by remembering what its candidates share, and that it finds the same.

    python benchmarks/tune_interval.py [mnist-unet] [mnist-edm2] [small-sdxl] [--samples 4] [--steps 16]

Each search is run without memory and with it; network rows and CPU seconds are compared, and the files that they
write, byte for byte. The shipped models of digits are tuned by a Fréchet distance; a small Stable Diffusion XL with
random weights, whose prompts are random embeddings, by a score of one's own: how near the latents' spread is to 1.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from guidance_interval import SMALL_SDXL_UNET, TOKENS, stable_diffusion

from diffusers_ext.evaluation import load_extractor
from diffusers_ext.guidance.tuning import MEMORY, RESULT, reference_statistics, tune_interval
from diffusers_ext.sampling import cycled_labels
from diffusers_ext.shipped import load_pipeline


def near_unit_spread(latents: torch.Tensor, inputs: dict) -> torch.Tensor:
    """The score: one number an image, 0 at best."""
    return -(latents.float().std((1, 2, 3)) - 1).abs()


def search(name: str, samples: int, steps: int, folder: Path, memory: int):
    """One search; steps: of the sampler."""
    if name != "small-sdxl":
        pipe, extractor = load_pipeline(name), load_extractor("classifier", device="cpu")
        if name == "mnist-unet":
            pipe = load_pipeline(name, "boost-and-skip")
        judged = extractor, reference_statistics(None, extractor)
        labels = cycled_labels(pipe, samples)
        return tune_interval(pipe, *judged, [1.2, 1.5], labels, folder, steps, memory=memory)
    torch.manual_seed(0)
    pipe = stable_diffusion(SMALL_SDXL_UNET, "cpu")
    widths = {"prompt_embeds": (TOKENS, 64), "pooled_prompt_embeds": (64,)}
    inputs = {sign + key: torch.randn(samples, *width) for sign in ("", "negative_") for key, width in widths.items()}
    call = {"height": 256, "width": 256, "output_type": "latent"}
    return tune_interval(pipe, near_unit_spread, None, [5.0, 7.5], inputs, folder, steps, call=call, memory=memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mnist-unet", "mnist-edm2", "small-sdxl"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    for name in arguments.models:
        files, found, seconds = [], [], []
        for memory in (0, MEMORY):
            with TemporaryDirectory() as folder:
                started = time.process_time()
                found.append(search(name, arguments.samples, arguments.steps, Path(folder), memory))
                seconds.append(time.process_time() - started)
                files.append((Path(folder) / RESULT).read_bytes())
        plain, remembered = found
        print(
            f"{name}, {arguments.steps} steps, {arguments.samples} images, {len(plain.distances)} candidates: network"
            f" rows {plain.rows_run} without memory, {remembered.rows_run} with"
            f" ({remembered.rows_run / plain.rows_run:.2f}); CPU seconds {seconds[0]:.1f} and {seconds[1]:.1f};"
            f" {'the same files' if files[0] == files[1] else 'OTHER FILES'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
