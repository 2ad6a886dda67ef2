"""Study 1: what guidance does to trajectories between two 1-D Gaussians (arXiv 2503.10638, figures 1 to 3).

    python recipes/classifier_centric/gaussians_1d.py --output out/gaussians_1d

Two classes with means -m and +m and standard deviation 0.05, for m of 1, 0.5 and 0.1. Every score is exact, so all
that is seen is the guidance. Samples of class 1 are drawn by deterministic DDIM, conditionally, with classifier-free
guidance, and with classifier guidance by the exact classifier, by a trained network that sees sample and timestep, by
a linear one, and by a network with random weights.

Writes trajectories.png, scales.png and numbers.json. Measured: see docs/flow_postprocessing.md.
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from diffusers_ext.models import ClassifierGuidance, NoiseAwareClassifier

MEANS, STD = (1.0, 0.5, 0.1), 0.05
SCALES = (1.0, 2.0, 4.0, 8.0)
CLASSIFIERS = ("exact classifier", "trained classifier", "linear classifier", "random classifier")
METHODS = ("conditional", "classifier-free", *CLASSIFIERS)
COLOURS = {-1: "#c2410c", 1: "#1d4ed8"}


class TwoGaussians(nn.Module):
    """Exact eps of x_t, of one class or, without labels, of the even mixture; x_t is (batch, 1)."""

    def __init__(self, mean: float, alphas_cumprod: torch.Tensor, conditional: bool = False):
        super().__init__()
        self.mean, self.alphas = mean, alphas_cumprod
        self.config = {"num_class_embeds": 2 if conditional else None}

    def moments(self, timestep: torch.Tensor):
        """Means of the two classes (batch, 2) and their common variance (batch, 1) at a timestep (batch,)."""
        alpha = self.alphas[timestep][:, None]
        signs = torch.tensor([[-1.0, 1.0]], dtype=alpha.dtype)
        return alpha.sqrt() * self.mean * signs, alpha * STD**2 + 1 - alpha

    def log_posterior(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The exact classifier: log p(c | x_t), (batch, 2)."""
        means, variance = self.moments(timestep)
        return (-((x - means) ** 2) / (2 * variance)).log_softmax(dim=1)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None):
        means, variance = self.moments(timestep)
        weights = self.log_posterior(x, timestep).exp() if class_labels is None else F.one_hot(class_labels, 2)
        score = (weights * (means - x) / variance).sum(dim=1, keepdim=True)
        return SimpleNamespace(sample=-(1 - self.alphas[timestep][:, None]).sqrt() * score)


def train_classifier(classifier: nn.Module, data: TwoGaussians, steps: int, lr: float) -> nn.Module:
    """Cross-entropy on noisy samples at uniform timesteps."""
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        labels, timestep = torch.randint(2, (512,)), torch.randint(len(data.alphas), (512,))
        means, variance = data.moments(timestep)
        x = means.gather(1, labels[:, None]) + variance.sqrt() * torch.randn(512, 1, dtype=means.dtype)
        loss = F.cross_entropy(classifier(x.float(), timestep).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier


def make_classifiers(data: TwoGaussians, steps: int) -> dict:
    """The four classifiers, each called as classifier(x_t, timestep), on float64."""
    torch.manual_seed(0)
    networks = {
        "trained classifier": train_classifier(NoiseAwareClassifier(1, 2, (64, 64)), data, steps, 3e-3),
        "linear classifier": train_classifier(NoiseAwareClassifier(1, 2), data, steps, 3e-2),
        "random classifier": NoiseAwareClassifier(1, 2, (64, 64)),
    }
    return {"exact classifier": data.log_posterior, **{name: net.double() for name, net in networks.items()}}


def predictor(method: str, scale: float, mixture: TwoGaussians, classifiers: dict, scheduler):
    """eps(x_t, timestep, labels) of a method; scale 1 of classifier-free guidance is conditional sampling."""
    conditional = TwoGaussians(mixture.mean, mixture.alphas, conditional=True)
    if method == "conditional":
        return conditional
    if method == "classifier-free":

        def guided(x, timestep, labels):
            null = mixture(x, timestep).sample
            return SimpleNamespace(sample=null + scale * (conditional(x, timestep, labels).sample - null))

        return guided
    return ClassifierGuidance(mixture, classifiers[method], scheduler, scale, num_classes=2)


@torch.no_grad()
def trajectories(predict, scheduler: DDIMScheduler, count: int, steps: int) -> torch.Tensor:
    """x_t of class 1 along the whole way, (steps + 1, count), from the same noise every time."""
    x = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, path = torch.ones(count, dtype=torch.int64), [x]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.expand(count), labels).sample, t, x).prev_sample
        path.append(x)
    return torch.cat(path, dim=1).T


def measure(final: torch.Tensor, mean: float) -> dict[str, float]:
    """Of samples that should be N(mean, 0.05^2): error of their mean and their own deviation, in units of 0.05."""
    return {
        "shift": ((final.mean() - mean) / STD).item(),
        "spread": (final.std() / STD).item(),
        "right_side": (final > 0).double().mean().item(),
    }


def plot_trajectories(paths: dict, scale: float, path: Path) -> None:
    """One row a distance of the classes, one column a method, at one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.3 * len(METHODS), 6.2), layout="constrained")
    axes = figure.subplots(len(MEANS), len(METHODS), sharex=True, sharey=True)
    for row, mean in zip(axes, MEANS, strict=True):
        for axis, method in zip(row, METHODS, strict=True):
            lines = paths[mean, method, 1.0 if method == "conditional" else scale][:, :60]
            axis.plot(torch.linspace(1, 0, len(lines)), lines.numpy(), color="#64748b", alpha=0.25, linewidth=0.6)
            for sign, colour in COLOURS.items():
                axis.axhspan(sign * mean - 2 * STD, sign * mean + 2 * STD, color=colour, alpha=0.25, linewidth=0)
            axis.scatter(torch.zeros(60), lines[-1], s=5, color="black", zorder=3, clip_on=False)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set(xlim=(1, 0), ylim=(-3.2, 3.2), xticks=[1, 0], xticklabels=["noise", "data"])
        row[0].set_ylabel(f"classes at ±{mean:g}")
    for method, top, bottom in zip(METHODS, axes[0], axes[-1], strict=True):
        top.set_title(method, fontsize=10)
        for label, side in zip(bottom.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
    figure.suptitle(f"Ways of 60 samples of the upper class (blue), guidance scale {scale:g}", fontsize=11)
    figure.savefig(path, dpi=150)


def plot_scales(paths: dict, path: Path) -> None:
    """Where samples end, by scale: mean and two standard deviations; without the random weights, which scatter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    styles = dict(zip(METHODS[1:-1], ("#0f172a", "#1d4ed8", "#15803d", "#c2410c"), strict=True))
    for axis, mean in zip(figure.subplots(1, len(MEANS)), MEANS, strict=True):
        axis.axhspan(mean - 2 * STD, mean + 2 * STD, color="#1d4ed8", alpha=0.2, linewidth=0, label="the class")
        for i, (method, colour) in enumerate(styles.items()):
            ends = [paths[mean, method, scale][-1] for scale in SCALES]
            places = [math.log2(scale) + 0.11 * (i - 1.5) for scale in SCALES]
            spread = [2 * end.std().item() for end in ends]
            axis.errorbar(
                places, [end.mean().item() for end in ends], spread, color=colour, fmt="o", markersize=3, label=method
            )
        axis.set(
            title=f"classes at ±{mean:g}",
            xlabel="guidance scale",
            xticks=range(len(SCALES)),
            ylim=(mean - 0.35, mean + 0.35),
        )
        axis.set_xticklabels([f"{scale:g}" for scale in SCALES])
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("samples, mean ± 2 std")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


@click.command(help=__doc__.split("\n")[0])
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/gaussians_1d"), show_default=True)
@click.option("--samples", type=click.IntRange(60), default=2000, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=500, show_default=True, help="Of DDIM.")
@click.option("--classifier-steps", type=click.IntRange(1), default=3000, show_default=True)
@click.option("--scale", type=click.Choice([f"{scale:g}" for scale in SCALES]), default="4", show_default=True)
def main(output, samples, steps, classifier_steps, scale):
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    scheduler = DDIMScheduler(clip_sample=False)
    alphas = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    scheduler.alphas_cumprod = alphas
    paths, rows = {}, []
    table = Table("classes", "method", "scale", "shift / 0.05", "spread / 0.05", "right side", title="1-D Gaussians")
    for mean in MEANS:
        mixture = TwoGaussians(mean, alphas)
        sample = partial(trajectories, scheduler=scheduler, count=samples, steps=steps)
        classifiers = make_classifiers(mixture, classifier_steps)
        for method in METHODS:
            for s in SCALES[:1] if method == "conditional" else SCALES:
                paths[mean, method, s] = sample(predictor(method, s, mixture, classifiers, scheduler))
                numbers = measure(paths[mean, method, s][-1], mean)
                rows.append({"mean": mean, "method": method, "scale": s, **numbers})
                table.add_row(f"±{mean:g}", method, f"{s:g}", *(f"{value:.2f}" for value in numbers.values()))
    plot_trajectories(paths, float(scale), output / "trajectories.png")
    plot_scales(paths, output / "scales.png")
    settings = {"samples": samples, "steps": steps, "classifier_steps": classifier_steps}
    seconds = time.perf_counter() - started
    result = {"settings": settings, "seconds": seconds, "threads": torch.get_num_threads(), "rows": rows}
    (output / "numbers.json").write_text(json.dumps(result, indent=2) + "\n")
    Console(width=100).print(table)
    click.echo(f"{seconds:.0f} s on {torch.get_num_threads()} threads; figures in {output}")


if __name__ == "__main__":
    main()
