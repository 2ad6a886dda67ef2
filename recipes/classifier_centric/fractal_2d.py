"""Study 2: guidance and postprocessing on a 2-D fractal of two classes (arXiv 2503.10638).

    python recipes/classifier_centric/fractal_2d.py --output out/fractal_2d

Each class is a binary tree of seven levels whose root points to 45 or 225 degrees; along every branch lie eight narrow
Gaussians, so log densities are exact. A network of some 60,000 weights learns the diffusion, conditional and not, and
another one the classifier of noisy points. Samples at several scales of classifier-free and of classifier guidance are
then led to their 20 nearest data points by one flow for all scales of a kind.

Writes before_after.png, curves.png and numbers.json; networks stay in the output folder, and a second start goes on
from them. `--mixture` takes another mixture, a safetensors file with A.phi, A.mu, A.Sigma and the same of B, such as
tests/goldens/toy2d.safetensors. Measured: see docs/flow_postprocessing.md.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from diffusers_ext import train_postprocessing_flow
from diffusers_ext.metrics import nearest_neighbours, precision_recall
from diffusers_ext.models import NoiseAwareClassifier, classifier_gradient
from diffusers_ext.pipelines.flow_postprocessing import velocity
from diffusers_ext.runs.files import replacing, write_json
from diffusers_ext.runs.kept import check_same

CLASSES, NULL_CLASS = ("A", "B"), 2
ANGLES = (math.pi / 4, 5 * math.pi / 4)
GUIDANCE = ("classifier-free", "classifier")
SCALES = (1.0, 2.0, 4.0, 8.0)
SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 5.0
ZOOM = 20  # the flow works in units of 1/20, in which its velocities are of order one
COLOURS = ("#1d4ed8", "#c2410c")
MEASURES = ("distance", "log_density", "wasserstein", "recall")


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one class: weights phi (n,), means mu (n, 2), covariances Sigma (n, 2, 2), float64."""

    phi: torch.Tensor
    mu: torch.Tensor
    Sigma: torch.Tensor

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, 2) float32."""
        chosen = torch.multinomial(self.phi, count, replacement=True, generator=generator)
        noise = torch.randn(count, 2, 1, dtype=torch.float64, generator=generator)
        return (self.mu[chosen] + (torch.linalg.cholesky(self.Sigma)[chosen] @ noise)[..., 0]).float()

    def log_density(self, x: torch.Tensor, sigma: float = 0.0) -> torch.Tensor:
        """log p(x; sigma) of the mixture under Gaussian noise of std sigma, (n,) float64, for x (n, 2)."""
        covariance = self.Sigma + sigma**2 * torch.eye(2, dtype=torch.float64)
        inverse, log_det = torch.linalg.inv(covariance), torch.logdet(covariance)
        log_weights = (self.phi / self.phi.sum()).log() - math.log(2 * math.pi) - log_det / 2
        parts = []
        for batch in x.double().split(2048):
            away = batch[:, None] - self.mu
            parts.append((log_weights - torch.einsum("nki,kij,nkj->nk", away, inverse, away) / 2).logsumexp(1))
        return torch.cat(parts)


def fractal(angle: float, seed: int, levels: int = 7, along: int = 8) -> Mixture:
    """A binary tree from the origin: each branch ends in two that are shorter and turned to either side.

    Branch lengths shrink by 0.7 a level, give or take a tenth, and turn by 35 to 60 degrees. A Gaussian's std is half
    the spacing along the branch and 3 % of the branch's length across; its weight falls with its area.
    """
    generator = torch.Generator().manual_seed(seed)
    phi, mu, covariances = [], [], []
    branches = [(torch.zeros(2, dtype=torch.float64), angle, 0.5)]
    for _ in range(levels):
        following = []
        for start, direction, length in branches:
            axis = torch.tensor([math.cos(direction), math.sin(direction)], dtype=torch.float64)
            across, spacing = torch.stack([-axis[1], axis[0]]), length / along
            for i in range(along):
                phi.append(length**2)
                mu.append(start + axis * spacing * (i + 0.5))
                covariances.append((spacing / 2) ** 2 * axis.outer(axis) + (0.03 * length) ** 2 * across.outer(across))
            for side in (-1, 1):
                turn, shrink = torch.rand(2, generator=generator).tolist()
                turned = direction + side * math.radians(35 + 25 * turn)
                following.append((start + axis * length, turned, length * (0.63 + 0.14 * shrink)))
        branches = following
    weights = torch.tensor(phi, dtype=torch.float64)
    return Mixture(weights / weights.sum(), torch.stack(mu), torch.stack(covariances))


def load_mixtures(path: Path | None) -> list[Mixture]:
    """The two classes: the fractal of this file, or those of a safetensors file."""
    if path is None:
        return [fractal(angle, seed) for seed, angle in enumerate(ANGLES)]
    tensors = {name: tensor.double() for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    return [Mixture(tensors[f"{c}.phi"], tensors[f"{c}.mu"], tensors[f"{c}.Sigma"]) for c in CLASSES]


class PointNetwork(nn.Module):
    """An MLP of a point (batch, 2) in the given units, a time and a class; called like a UNet2DModel.

    Waves of the point, down to a length of 1/16, let it resolve the narrow branches.
    """

    def __init__(self, classes: int, units: float = 1.0, width: int = 128):
        super().__init__()
        self.config, self.units = SimpleNamespace(num_class_embeds=classes), units
        self.frequencies = nn.Buffer(2.0 ** torch.arange(7) * math.pi / 2)
        self.embedding = nn.Embedding(classes, width)
        self.first = nn.Linear(2 + 2 * 3 * len(self.frequencies), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 2)
        nn.init.zeros_(self.last.weight)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor):
        point = sample / self.units
        seen = torch.cat([point, timestep[:, None] / 1000], dim=1)
        phase = (seen[:, :, None] * self.frequencies).flatten(1)
        x = self.first(torch.cat([point, phase.sin(), phase.cos()], dim=1)) + self.embedding(class_labels)
        for layer in self.layers:
            x = x + layer(F.silu(x))
        return SimpleNamespace(sample=self.last(F.silu(x)))


def scaled(x: torch.Tensor, sigma: torch.Tensor):
    """A noisy point in units of its own std, and the time that the networks see, 250 ln sigma."""
    return x / (sigma**2 + SIGMA_DATA**2).sqrt(), 250 * sigma[:, 0].log()


def denoise(network: nn.Module, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x] with the preconditioning of EDM (arXiv 2206.00364, table 1); sigma (batch, 1)."""
    total = sigma**2 + SIGMA_DATA**2
    unit, time = scaled(x, sigma)
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * network(unit, time, labels).sample


def noisy_batch(data: torch.Tensor, labels: torch.Tensor, size: int):
    """Clean points, labels and noise levels, whose logarithm is N(-2.3, 1.5^2)."""
    rows = torch.randint(len(data), (size,))
    return data[rows], labels[rows], (1.5 * torch.randn(size, 1) - 2.3).exp()


def train(network: nn.Module, loss_of: Callable, steps: int, lr: float = 3e-3) -> nn.Module:
    """AdamW with the learning rate falling to zero along half a cosine."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(network)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return network.eval()


def train_diffusion(data: torch.Tensor, labels: torch.Tensor, steps: int, batch: int) -> nn.Module:
    def loss_of(network):
        x, c, sigma = noisy_batch(data, labels, batch)
        c = c.masked_fill(torch.rand(batch) < 0.25, NULL_CLASS)
        weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
        return (weight * (denoise(network, x + sigma * torch.randn_like(x), sigma, c) - x) ** 2).mean()

    return train(PointNetwork(NULL_CLASS + 1), loss_of, steps)


def train_classifier(data: torch.Tensor, labels: torch.Tensor, steps: int, batch: int) -> nn.Module:
    def loss_of(network):
        x, c, sigma = noisy_batch(data, labels, batch)
        return F.cross_entropy(network(*scaled(x + sigma * torch.randn_like(x), sigma)).logits, c)

    return train(NoiseAwareClassifier(2, len(CLASSES), (128, 128)), loss_of, steps)


@torch.no_grad()
def sample(networks, kind: str, scale: float, labels: torch.Tensor, seed: int, steps: int = 32) -> torch.Tensor:
    """Guided points (n, 2): Heun's method along the noise levels of EDM, rho 7."""
    diffusion, classifier = networks
    ramp = torch.linspace(0, 1, steps)
    sigmas = (SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7
    sigmas = [*sigmas.tolist(), 0.0]
    null = torch.full_like(labels, NULL_CLASS)

    def slope(x, sigma):
        sigma = torch.full((len(x), 1), sigma)
        clean = denoise(diffusion, x, sigma, null)
        if kind == "classifier-free":
            clean = clean + scale * (denoise(diffusion, x, sigma, labels) - clean)
        else:
            gradient = classifier_gradient(lambda x, _: classifier(*scaled(x, sigma)), x, sigma[:, 0], labels)
            clean = clean + scale * sigma**2 * gradient
        return (x - clean) / sigma

    x = SIGMA_MAX * torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    for now, then in pairwise(sigmas):
        first = slope(x, now)
        ahead = x + (then - now) * first
        x = ahead if then == 0 else x + (then - now) * (first + slope(ahead, then)) / 2
    return x


@torch.no_grad()
def postprocess(flow: nn.Module, x: torch.Tensor, labels: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """Euler's method along the flow, from t = 0 to 1."""
    x = x * ZOOM
    for i in range(steps):
        x = x + velocity(flow, x, i / steps, labels) / steps
    return x / ZOOM


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, directions: int = 128) -> float:
    """Root of the mean over directions of the squared 2-Wasserstein distance of the projections; equal numbers."""
    angles = torch.arange(directions) * math.pi / directions
    lines = torch.stack([angles.cos(), angles.sin()])
    return ((x @ lines).sort(dim=0).values - (y @ lines).sort(dim=0).values).square().mean().sqrt().item()


def measure(x: torch.Tensor, data: torch.Tensor, held_out: torch.Tensor, mixture: Mixture) -> dict[str, float]:
    """Points of one class: distance to the nearest data point, log density, sliced Wasserstein distance to as many
    fresh points, and recall, the share of fresh points in the neighbourhoods (k 5) of the samples."""
    return {
        "distance": float(nearest_neighbours(x, data, 1)[0].mean()),
        "log_density": mixture.log_density(x).mean().item(),
        "wasserstein": sliced_wasserstein(x, held_out),
        "recall": precision_recall(x[:2000], held_out[:2000], 5).recall,
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as file:
        file.write(save(tensors))


def cached(path: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor from its file, or made and written to it."""
    if not path.exists():
        write(path, {"x": make().contiguous()})
    return load_file(path)["x"]


def network_from(path: Path, network: nn.Module, train_it: Callable[[], nn.Module]) -> nn.Module:
    """A network from its file, or trained and written to it."""
    if not path.exists():
        write(path, train_it().state_dict())
    network.load_state_dict(load_file(path))
    return network.eval()


def begin(output: Path, settings: dict) -> None:
    """Make the folder and note the settings; says where it holds networks of other ones."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    if path.exists():
        try:
            check_same(path, json.loads(path.read_text()), json.loads(json.dumps(settings)))
        except ValueError as error:
            raise click.ClickException(str(error)) from error
    write_json(path, settings)


def plot_points(clouds: dict, data: torch.Tensor, path: Path) -> None:
    """Samples before and after, one row a guidance and a moment, one column a scale."""
    from matplotlib.figure import Figure

    rows = [(kind, moment) for kind in GUIDANCE for moment in ("before", "after")]
    figure = Figure(figsize=(2.6 * len(SCALES), 2.5 * len(rows)), layout="constrained")
    for line, (kind, moment) in zip(figure.subplots(len(rows), len(SCALES)), rows, strict=True):
        for axis, scale in zip(line, SCALES, strict=True):
            axis.scatter(*data[:6000].T, s=0.3, color="#cbd5e1", linewidths=0)
            x, labels = clouds[kind, scale, moment]
            for c, colour in enumerate(COLOURS):
                axis.scatter(*x[labels == c][:1500].T, s=0.7, color=colour, linewidths=0)
            axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), xticks=[], yticks=[], aspect="equal")
            axis.spines[:].set_color("#94a3b8")
            if (kind, moment) == rows[0]:
                axis.set_title(f"scale {scale:g}", fontsize=10)
        line[0].set_ylabel(f"{kind}\n{moment}", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_curves(rows: list[dict], floor: dict, path: Path) -> None:
    """Each measure over the scale, mean of the two classes."""
    from matplotlib.figure import Figure

    titles = ("distance to the nearest data ↓", "mean log density ↑", "sliced Wasserstein ↓", "recall ↑")
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axis, name, title in zip(figure.subplots(1, len(MEASURES)), MEASURES, titles, strict=True):
        for kind, colour in zip(GUIDANCE, ("#1d4ed8", "#15803d"), strict=True):
            for moment, style in (("before", "--"), ("after", "-")):
                values = [mean_of(rows, kind, scale, moment, name) for scale in SCALES]
                axis.plot(SCALES, values, style, color=colour, marker="o", markersize=3, label=f"{kind}, {moment}")
        axis.axhline(floor[name], color="#94a3b8", linewidth=1, label="fresh data")
        axis.set(title=title, xlabel="guidance scale", xticks=SCALES)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def mean_of(rows: list[dict], kind: str, scale: float, moment: str, name: str) -> float:
    values = [row[name] for row in rows if (row["kind"], row["scale"], row["moment"]) == (kind, scale, moment)]
    return sum(values) / len(values)


@click.command(help=__doc__.split("\n")[0])
@click.option("--output", type=click.Path(path_type=Path), default=Path("out/fractal_2d"), show_default=True)
@click.option("--mixture", type=click.Path(path_type=Path, exists=True), help="Another mixture; see above.")
@click.option("--points", type=click.IntRange(100), default=20_000, show_default=True, help="Data of a class.")
@click.option("--steps", type=click.IntRange(1), default=8000, show_default=True, help="Of the diffusion and a flow.")
@click.option("--batch-size", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--samples", type=click.IntRange(40), default=4000, show_default=True, help="To measure, a scale.")
@click.option("--k", type=click.IntRange(1), default=20, show_default=True)
def main(output, mixture, points, steps, batch_size, samples, k):
    started = time.perf_counter()
    settings = {"mixture": mixture and str(mixture), "points": points, "steps": steps, "batch_size": batch_size}
    begin(output, {**settings, "k": k})
    mixtures = load_mixtures(mixture)
    generator = torch.Generator().manual_seed(0)
    data = torch.cat([part.sample(points, generator) for part in mixtures])
    labels = torch.arange(len(CLASSES)).repeat_interleave(points)
    fresh = [part.sample(samples // 2, generator) for part in mixtures]
    torch.manual_seed(0)
    diffusion = network_from(
        output / "diffusion.safetensors",
        PointNetwork(NULL_CLASS + 1),
        lambda: train_diffusion(data, labels, steps, batch_size),
    )
    classifier = network_from(
        output / "classifier.safetensors",
        NoiseAwareClassifier(2, len(CLASSES), (128, 128)),
        lambda: train_classifier(data, labels, max(1, steps // 4), batch_size),
    )
    networks = diffusion, classifier

    rows, clouds = [], {}
    asked, share = torch.arange(samples) % 2, points // len(SCALES)
    for kind in GUIDANCE:
        wanted = torch.arange(share * len(SCALES)) % 2
        drawn = cached(
            output / f"points-{kind}.safetensors",
            lambda kind=kind, wanted=wanted: torch.cat(
                [sample(networks, kind, s, wanted[:share], 100 + i) for i, s in enumerate(SCALES)]
            ),
        )
        torch.manual_seed(1)
        flow = train_postprocessing_flow(
            drawn * ZOOM, data * ZOOM, k, model=PointNetwork(len(CLASSES), ZOOM), steps=steps,
            output=output / f"flow-{kind}", sample_labels=wanted[:share].repeat(len(SCALES)),
            batch_size=batch_size, learning_rate=1e-3, ema_decay=0.999,
            checkpoint_every=max(1, steps // 4), log_every=max(1, steps // 8),
        ).model.cpu()  # fmt: skip
        for scale in SCALES:
            before = sample(networks, kind, scale, asked, 7)
            for moment, x in (("before", before), ("after", postprocess(flow, before, asked))):
                clouds[kind, scale, moment] = x, asked
                for c, name in enumerate(CLASSES):
                    numbers = measure(x[asked == c], data[labels == c], fresh[c], mixtures[c])
                    rows.append({"kind": kind, "scale": scale, "moment": moment, "class": name, **numbers})

    real = [part.sample(samples // 2, generator) for part in mixtures]
    floors = [measure(real[c], data[labels == c], fresh[c], mixtures[c]) for c in range(len(CLASSES))]
    floor = {name: sum(one[name] for one in floors) / len(floors) for name in MEASURES}
    plot_points(clouds, data[torch.randperm(len(data), generator=generator)], output / "before_after.png")
    plot_curves(rows, floor, output / "curves.png")
    seconds = time.perf_counter() - started
    result = {
        "settings": {**settings, "k": k, "samples": samples},
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    (output / "numbers.json").write_text(json.dumps({**result, "fresh data": floor, "rows": rows}, indent=2) + "\n")

    table = Table("guidance", "scale", "class", "moment", *MEASURES)
    for row in rows:
        values = [f"{row[name]:.4f}" if name == "distance" else f"{row[name]:.3f}" for name in MEASURES]
        table.add_row(row["kind"], f"{row['scale']:g}", row["class"], row["moment"], *values)
    table.add_row("fresh data", "", "", "", *(f"{floor[name]:.4f}" for name in MEASURES))
    Console(width=110).print(table)
    click.echo(f"{seconds:.0f} s on {torch.get_num_threads()} threads; figures in {output}")


if __name__ == "__main__":
    main()
