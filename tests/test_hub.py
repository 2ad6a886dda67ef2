"""Exported folders: what they hold, and what is refused. That they load elsewhere is in contracts.py."""

import hashlib
import importlib
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import BoostAndSkipPipeline, FlowPostprocessingPipeline, __version__, pipelines
from diffusers_ext.hub import check_download, export_code, export_pipeline
from diffusers_ext.hub.cards import license_of
from diffusers_ext.hub.sources import with_siblings
from diffusers_ext.schedulers import BoostAndSkipDDIMScheduler


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip


def test_an_export_holds_code_and_file_stems(tmp_path):
    folder = export_pipeline(BoostAndSkipPipeline(tiny_unet(), BoostAndSkipDDIMScheduler()), tmp_path / "out", "mit")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["boost_and_skip", "BoostAndSkipPipeline"]
    assert index["scheduler"] == ["scheduling_boost_and_skip", "BoostAndSkipDDIMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "boost_and_skip.py",
        "call_arguments.py",
        "pixel_space.py",
        "respacing.py",
        "model_index.json",
        "scheduler/scheduler_arguments.py",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_boost_and_skip.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    assert "license: mit" in card and "trust_remote_code=True" in card and "BoostAndSkipDDIMScheduler" in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing staged is left over


def test_an_export_of_a_stock_pipeline_needs_no_code(tmp_path):
    folder = export_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path / "out")
    assert not list(folder.rglob("*.py"))
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline
    card = (folder / "README.md").read_text()
    assert "licence of the weights is that of their source" in card and "trust_remote_code" not in card


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_pipeline(DDPMPipeline(tiny_unet(), DDPMScheduler()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("main", ["script", "notebook"])
def test_a_class_without_a_file_is_refused_and_nothing_is_written(main, tmp_path, monkeypatch):
    module = ModuleType("__main__")
    if main == "script":
        module.__file__ = __file__
    monkeypatch.setitem(sys.modules, "__main__", module)
    scheduler = type("Homeless", (DDPMScheduler,), {"__module__": "__main__"})()
    with pytest.raises(ValueError, match="Homeless was defined in no file"):
        export_pipeline(BoostAndSkipPipeline(tiny_unet(), scheduler), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_siblings_travel(tmp_path):
    (tmp_path / "top.py").write_text("import json, torch\nfrom .near import x\n")
    (tmp_path / "near.py").write_text("from diffusers import DDPMScheduler\nx = 1\n")
    assert [path.name for path in with_siblings(tmp_path / "top.py")] == ["top.py", "near.py"]
    (tmp_path / "top.py").write_text("def f():\n    import torchdiffeq\n")  # an optional library
    assert [path.name for path in with_siblings(tmp_path / "top.py")] == ["top.py"]


@pytest.mark.parametrize("where", ["top", "near"])
@pytest.mark.parametrize(
    "line",
    ["from ..up import x", "from .gone import x", "import timm", "from mypkg.utils import f", "import diffusers_ext",
     "from diffusers_ext.hub import x", "def f():\n    from diffusers_ext import x", "from . import near"],
)  # fmt: skip
def test_imports_that_a_repository_cannot_satisfy_are_refused(tmp_path, line, where):
    sources = {"top": "from .near import x\n", "near": "x = 1\n"}
    sources[where] += line + "\n"
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ValueError, match="which a Hub repository does not hold"):
        with_siblings(tmp_path / "top.py")


def test_a_sibling_of_a_sibling_is_refused_unless_the_file_imports_it_too(tmp_path):
    (tmp_path / "near.py").write_text("from .far import y\n")
    (tmp_path / "far.py").write_text("y = 1\n")
    (tmp_path / "top.py").write_text("from .near import x\n")
    with pytest.raises(ValueError, match="far"):
        with_siblings(tmp_path / "top.py")
    (tmp_path / "top.py").write_text("from .near import x\nfrom .far import y\n")
    assert len(with_siblings(tmp_path / "top.py")) == 3


def test_no_path_of_this_machine_is_exported(tmp_path):
    BoostAndSkipPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "secret-client")
    loaded = BoostAndSkipPipeline.from_pretrained(tmp_path / "secret-client")
    folder = export_pipeline(loaded, tmp_path / "out")
    for path in [*folder.rglob("*.json"), *folder.rglob("*.md")]:
        assert str(tmp_path) not in path.read_text(), path


def test_links_and_the_current_folder(tmp_path, monkeypatch):
    pipe = DDPMPipeline(tiny_unet(), DDPMScheduler())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_pipeline(pipe, tmp_path / "link")
    assert (tmp_path / "real/model_index.json").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="current"):
        export_pipeline(pipe, ".")


def test_half_precision_weights_stay_half(tmp_path):
    pipe = BoostAndSkipPipeline(tiny_unet().half(), DDPMScheduler())
    folder = export_pipeline(pipe, tmp_path / "out")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


def test_a_network_with_a_sibling_is_refused(tmp_path, monkeypatch):
    """diffusers downloads one file of code from a folder with weights; schedulers and pipelines may have siblings."""
    (tmp_path / "near_network.py").write_text("x = 1\n")
    (tmp_path / "far_network.py").write_text(
        "from diffusers import UNet2DModel\nfrom .near_network import x\n\n\nclass Far(UNet2DModel):\n    pass\n"
    )
    (tmp_path / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path.parent))
    cls = importlib.import_module(f"{tmp_path.name}.far_network").Far
    pipe = BoostAndSkipPipeline(cls.from_config(tiny_unet().config), DDPMScheduler())
    with pytest.raises(ValueError, match=r"far_network\.py imports near_network beside it"):
        export_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_card_says_of_licence_and_origin(tmp_path):
    pipe = BoostAndSkipPipeline(tiny_unet(), DDPMScheduler())
    pipe.save_pretrained(tmp_path / "source")
    (tmp_path / "source/README.md").write_text("---\nlibrary_name: diffusers\nlicense: cc0-1.0\n---\n# source\n")
    loaded = BoostAndSkipPipeline.from_pretrained(tmp_path / "source")
    card = (export_pipeline(loaded, tmp_path / "kept") / "README.md").read_text()
    assert "license: cc0-1.0" in card and "Exported from `source`" in card and "base_model" not in card
    card = (export_pipeline(loaded, tmp_path / "given", "mit", "me/repo") / "README.md").read_text()
    assert "license: mit" in card and 'from_pretrained("me/repo", trust_remote_code=True)' in card
    loaded.register_to_config(_name_or_path="google/ddpm-celebahq-256")
    card = (export_pipeline(loaded, tmp_path / "hub") / "README.md").read_text()
    assert "base_model: google/ddpm-celebahq-256" in card and "license:" not in card
    loaded.register_to_config(_name_or_path="/home/someone/gone")
    card = (export_pipeline(loaded, tmp_path / "gone") / "README.md").read_text()
    assert "Exported from `gone`" in card and "someone" not in card and "base_model" not in card
    assert f"diffusers_ext {__version__}" in card and "The code of BoostAndSkipPipeline is Apache-2.0." in card


@pytest.mark.parametrize(
    "text", ["# no metadata\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense: mit\n"]
)
def test_cards_without_a_licence(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert license_of(str(tmp_path)) is None


def test_the_code_of_a_pipeline(tmp_path):
    folder = export_code(FlowPostprocessingPipeline, tmp_path / "out", "me/flow")
    assert 'custom_pipeline="me/flow", trust_remote_code=True' in (folder / "README.md").read_text()
    source = Path(inspect.getsourcefile(FlowPostprocessingPipeline))
    assert (folder / "pipeline.py").read_text() == source.read_text()
    assert {path.name for path in folder.glob("*.py")} == {
        "pipeline.py", *(path.name for path in with_siblings(source)[1:])
    }  # fmt: skip


def test_files_are_compared_with_the_hashes_in_the_cache(tmp_path):
    """The layout of the Hub's cache: a snapshot of links to files that are named by their hash."""
    contents = {"weights.safetensors": b"w" * 5000, "config.json": b"{}", "odd.bin": b"o"}
    hashes = {
        "weights.safetensors": hashlib.sha256(contents["weights.safetensors"]).hexdigest(),
        "config.json": "9e26dfeeb6e641a33dae4961196235bdb965b21b",  # git hash-object
        "odd.bin": "an-etag-of-another-kind",
    }
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot/unet").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "blobs" / hashes[name]).write_bytes(content)
        (tmp_path / "snapshot/unet" / name).symlink_to(tmp_path / "blobs" / hashes[name])
    (tmp_path / "snapshot/notes.txt").write_text("no link")
    check_download(tmp_path / "snapshot")
    (tmp_path / "blobs" / hashes["odd.bin"]).write_bytes(b"changed")
    check_download(tmp_path / "snapshot")  # of which nothing is known
    for name in ("weights.safetensors", "config.json"):
        (tmp_path / "blobs" / hashes[name]).write_bytes(contents[name].swapcase() + b" ")
        with pytest.raises(ValueError, match=f"unet/{name} in .* differ"):
            check_download(tmp_path / "snapshot")
        (tmp_path / "blobs" / hashes[name]).write_bytes(contents[name])


def test_our_pipelines_are_set_on_diffusers_and_overwrite_nothing(monkeypatch):
    """DiffusionPipeline.from_pretrained looks the name in model_index.json up there."""
    names = [name for name in pipelines.__all__ if name.endswith("Pipeline")]
    assert names and all(getattr(diffusers, name) is getattr(pipelines, name) for name in names)
    monkeypatch.setattr(diffusers, "EDM2Pipeline", DDPMPipeline)  # as if diffusers had one of its own
    monkeypatch.setattr(diffusers_ext, "__path__", list(diffusers_ext.__path__))
    importlib.reload(diffusers_ext)
    assert diffusers.EDM2Pipeline is DDPMPipeline
