"""Every block of code in the documentation: Python runs, on tiny stand-ins for what it names; commands must parse."""

import inspect
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import diffusers
import numpy as np
import pytest
import torch
from adm_checkpoints import save_adm
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DModel,
)
from tiny_modular_pipelines import MODULAR_CASES
from tiny_pipelines import tiny_sdxl
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import diffusers_ext
from diffusers_ext import (
    BoostAndSkipPipeline,
    EDM2Pipeline,
    EDM2UNet2DModel,
    EDMHeunScheduler,
    NoiseAwareClassifier,
)
from diffusers_ext.cli import main
from diffusers_ext.hub import export_code, export_model
from diffusers_ext.shipped import load_network, load_pipeline

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
PAGES = sorted((*ROOT.glob("docs/*.md"), ROOT / "README.md"))
CUDA = {'"cuda"': '"cpu"'}


@dataclass
class Page:
    """How a page's blocks run here. replaced: text of the page and what stands for it. before: by number of the block,
    names to set before it runs, from a folder that is the current one."""

    replaced: dict[str, str]
    before: dict[int, Callable[[Path], dict]]


def tiny_unet(channels: int = 1, size: int = 8, **config) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": size}
    return UNet2DModel(in_channels=channels, out_channels=channels, **sizes, **blocks, add_attention=False, **config)


def sdxl(folder: Path) -> dict:
    tiny_sdxl().save_pretrained(folder / "sdxl")
    return {}


def sdxl_and_controlnet(folder: Path) -> dict:
    pipe = tiny_sdxl()
    pipe.save_pretrained(folder / "sdxl")
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    controlnet.save_pretrained(folder / "canny")
    return {}


def classic(folder: Path) -> dict:
    return {"pipe": tiny_sdxl()}


def modular(folder: Path) -> dict:
    return {"pipe": MODULAR_CASES["stable_diffusion_3"]().pipe}


def sedd(folder: Path) -> dict:
    characters = "TheĠwatrinsody.,!"
    folder.joinpath("vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(characters)}))
    folder.joinpath("merges.txt").write_text("#version: 0.2\n")
    return {}


def edm2(folder: Path) -> dict:
    for name, case in (("xxl", "cond"), ("xs-uncond", "uncond")):
        source = GOLDENS / f"edm2_{case}_ema_fp16_nosource.pkl"
        (folder / f"edm2-img512-{name}.pkl").write_bytes(source.read_bytes())
    AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder / "vae")
    return {}


def edm2_folder(folder: Path) -> dict:
    sizes = {"img_resolution": 8, "img_channels": 3, "model_channels": 8, "channel_mult": (1,), "channels_per_head": 8}
    networks = [EDM2UNet2DModel(label_dim=classes, **sizes) for classes in (400, 0)]
    EDM2Pipeline(networks[0], EDMHeunScheduler(), guidance_unet=networks[1]).save_pretrained(folder / "edm2-xxl")
    return {}


def index_lists(folder: Path) -> dict:
    torch.save([[0, 1024], [0, 600, 1024]], folder / "schedule.pt")
    return {}


def guided_diffusion(folder: Path) -> dict:
    save_adm(folder / "64x64_diffusion.pt", classes=400)
    save_adm(folder / "64_256_upsampler.pt", classes=400, image_channels=6)
    return {}


def training_data(folder: Path) -> dict:
    config = Dinov2WithRegistersConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=2
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder / "dinov2")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), np.uint8))
    return {"samples": images[:6], "real": images, "unet": tiny_unet()}


def classifier(folder: Path) -> dict:
    classifier = NoiseAwareClassifier(64, 3)
    return {"unet": tiny_unet(), "classifier": classifier, "scheduler": DDPMScheduler()}


def denoiser(folder: Path) -> dict:
    if not hasattr(diffusers, "DiscreteDDIMScheduler"):
        pytest.skip(f"diffusers {diffusers.__version__} has no DiscreteDDIMScheduler")
    pipe = type("Pipe", (), {"scheduler": diffusers.DiscreteDDIMScheduler()})()
    data = torch.randint(0, 5, (2, 4))
    return {"vocab_size": 5, "data": data, "denoiser": lambda tokens, t: torch.ones(*tokens.shape, 5), "pipe": pipe}


def hub_repositories(folder: Path) -> dict:
    export_code(BoostAndSkipPipeline, folder / "code")
    export_model(load_network("mnist-classifier"), folder / "classifier")
    return ddpm(folder)


def demo_folder(folder: Path) -> dict:
    (folder / "out").mkdir()
    (folder / "out/demo.json").write_text(
        json.dumps({"version": "0", "device": "cpu", "torch_threads": 1, "full": False})
    )
    return {}


def ddpm(folder: Path) -> dict:
    DDPMPipeline(tiny_unet(3), DDPMScheduler()).save_pretrained(folder / "ddpm")
    return {}


RUN = {
    "demo_and_app": Page({}, {0: demo_folder}),
    "devices": Page({'native"])': 'native"], worker=["true"])'}, {}),  # test_device_check.py has the real one
    "hub": Page(
        {"push_to_hub(pipe": "inspect.signature(push_to_hub).bind(pipe", "google/ddpm-celebahq-256": "ddpm",
         '"me/mnist-boost-and-skip", trust': '"exported", trust', '"me/mnist-classifier"': '"classifier"',
         'custom_pipeline="me/boost-and-skip", custom_revision="COMMIT"': 'custom_pipeline="code"'},
        {1: lambda folder: {"inspect": inspect, "pipe": None}, 2: hub_repositories},
    ),
    "choose": Page({}, {}),
    "migration": Page({}, {0: edm2_folder, 1: index_lists}),
    "discrete_diffusion": Page(
        {'"louaaron/sedd-small"': repr(str(GOLDENS / "sedd_absorb_hub")), '"gpt2"': '"."', "=128": "=3",
         '"The weather in", suffix=" and so we stayed."': '"The weather", suffix=" was so."'},
        {0: sedd, 2: lambda folder: {"pipe": load_pipeline("jsb-sedd")}},
    ),
    "edm2": Page({**CUDA, "stabilityai/sd-vae-ft-mse": "vae", "[88, 127, 207, 360]": "[0, 1, 2, 3]"}, {0: edm2}),
    "flow_postprocessing": Page(
        {**CUDA, "100_000": "2", "facebook/dinov2-with-registers-base": "dinov2", "k=20": "k=3",
         "num_classes=10": "num_classes=3"},
        {0: training_data, 1: classifier},
    ),
    "guidance_interval": Page(
        {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "] * 50": "]", "[5.0, 7.5, 10.0]": "[5.0]",
         "steps=30": "steps=3"},
        {0: sdxl, 2: modular, 3: classic},
    ),
    "boost_and_skip": Page(
        {"recognised=0.9, num_samples=500": "recognised=0.1, num_samples=10", "steps=30": "steps=4"}, {}
    ),
    "guided_diffusion": Page(
        {**CUDA, 'preset="imagenet64"': 'image_size=16, use_new_attention_order=True, noise_schedule="cosine"',
         'preset="imagenet64_256_upsampler"': "large_size=32, small_size=16, num_heads=4", '"250"': '"4"'},
        {0: guided_diffusion},
    ),
    "jump_your_steps": Page(
        {"countdown_sequences(64,": "countdown_sequences(1,", "(4, 8, 12)": "(4, 8, 12), grid_size=24"}, {1: denoiser}
    ),
    "sampling": Page(
        {"50_000": "4", "=250": "=2", '"random"': "None"},
        {0: lambda folder: {"pipe": BoostAndSkipPipeline(tiny_unet(), DDPMScheduler())}},
    ),
    "first_hour": Page(
        {**CUDA, "stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "_steps=30": "_steps=4"}, {0: sdxl}
    ),
    "faq": Page(
        {**CUDA, "stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "diffusers/controlnet-canny-sdxl-1.0": "canny",
         "1024, 1024": "16, 16", "compile(fullgraph=True)": "compile(fullgraph=True, disable=True)"},
        {0: sdxl_and_controlnet},
    ),
    "README": Page(
        {**CUDA, "stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "google/ddpm-celebahq-256": "ddpm", "=250": "=5",
         "_steps=50": "_steps=5", "_steps=16": "_steps=2",
         '"pipelines/boost_and_skip.py"': repr(str(ROOT / "pipelines/boost_and_skip.py"))},
        {1: sdxl, 2: ddpm},
    ),
}  # fmt: skip


def blocks(path: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in PAGES if blocks(path, "python")])
def test_python_runs(name, tmp_path, monkeypatch):
    """The blocks of a page one after the other, with the names that earlier ones left."""
    monkeypatch.chdir(tmp_path)
    path = next(path for path in PAGES if path.stem == name)
    text, names = path.read_text(encoding="utf-8"), {}
    for old in RUN[name].replaced:
        assert old in text, f"{path} no longer says {old}"
    code = blocks(path, "python")
    assert set(RUN[name].before) <= set(range(len(code)))
    for i, block in enumerate(code):
        names |= RUN[name].before.get(i, lambda folder: {})(tmp_path)
        for old, new in RUN[name].replaced.items():
            block = block.replace(old, new)
        exec(compile(block, f"{path}, block {i}", "exec"), names)


def commands(path: Path) -> list[list[str]]:
    """Words of each use of diffusers-ext in the blocks of commands of a page, after the program's name."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "diffusers_ext.cli" in words:
                found.append(words[words.index("diffusers_ext.cli") + 1 :])
            elif words and words[0].endswith("diffusers-ext"):
                found.append(words[1:])
    return found


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    command, rest = main, list(words)
    while isinstance(command, click.Group):
        assert rest and rest[0] in command.commands, f"no command {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    return command, rest


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=lambda path: path.stem)
def test_commands_have_the_options_that_pages_give_them(path):
    for words in commands(path):
        command, rest = command_of(words)
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{path}: {' '.join(words)}: {unknown}"


def test_every_page_and_public_name_is_in_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r"[\w]+\.md", site[site.index("nav:") :]))
    assert nav == {path.name for path in ROOT.glob("docs/*.md")}
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    places = re.findall(r"^::: (.+)\.(\w+)$", api, re.MULTILINE)
    assert sorted(name for _, name in places) == sorted(diffusers_ext.__all__)
    for module, name in places:
        home = getattr(diffusers_ext, name).__module__
        assert module == re.sub(r"^diffusers_ext\.(?=pipelines|schedulers)", "", home), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_and_scripts_exist(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", text):
        assert (path.parent / link).exists(), f"{path} links to {link}"
    for script in re.findall(r"(?:recipes|benchmarks)/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / script).is_file(), f"{path} names {script}"
