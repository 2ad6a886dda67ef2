"""What the first minute shows: help without a wait, the public names, classes that diffusers knows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, UNet2DModel

import diffusers_ext
from diffusers_ext.schedulers import BoostAndSkipDDPMScheduler

ROOT = Path(__file__).parent.parent
SLOW = "torch", "diffusers", "transformers", "huggingface_hub", "numpy"
START = f"""
import atexit, sys
atexit.register(lambda: print("imported", sorted(sys.modules.keys() & {set(SLOW)})))
from diffusers_ext.cli import main
main(sys.argv[1:])
"""
IMPORT = re.compile(r"^from diffusers_ext\.[\w.]+ import (\([^)]*\)|.*)", re.MULTILINE)


def fresh(code: str, *arguments) -> subprocess.CompletedProcess:
    paths = {"PYTHONPATH": f"{ROOT}", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=paths, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "Research methods"),
        (["--version"], diffusers_ext.__version__),
        (["smaple"], "Did you mean"),
        (["sample", "--help"], "--guidance-interval"),
        (["convert", "edm2", "-h"], "--uncond"),
        (["sample", "mnist-unet", "--sede", "1"], "No such option"),
        (["demo", "--quick", "now"], "unexpected extra argument"),
    ],
    ids=" ".join,
)
def test_help_and_typos_import_no_library(arguments, said):
    done = fresh(START, *arguments)
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"


def test_the_public_names():
    names = diffusers_ext.__all__
    assert 20 <= len(names) <= 28
    assert {"load_pipeline", "optimize_timesteps", "IntervalGuidance", "apply_guider", "boost_and_skip"} <= {*names}
    assert {*names} == {*dir(diffusers_ext)} - {"__version__"}
    for name in names:
        value = getattr(diffusers_ext, name)
        assert value.__name__ == name and value.__module__.startswith("diffusers_ext.") and value.__doc__


@pytest.mark.parametrize(
    "name", ["GuidanceReport", "CTMCSchedulerOutput", "EDM2_PRESETS", "respaced_timesteps", "Nope"]
)
def test_outputs_and_helpers_are_imported_from_their_rooms(name):
    with pytest.raises(AttributeError, match=name):
        getattr(diffusers_ext, name)


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("docs/*.md")], ids=lambda path: path.stem)
def test_examples_import_from_the_top(path):
    imported = " ".join(IMPORT.findall(path.read_text(encoding="utf-8")))
    assert not set(re.findall(r"\w+", imported)) & {*diffusers_ext.__all__}


def test_a_saved_pipeline_loads_in_any_order_of_imports_and_nothing_is_said(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, BoostAndSkipDDPMScheduler(gamma=1.5)).save_pretrained(tmp_path)
    load = (
        "pipe = DDPMPipeline.from_pretrained(sys.argv[1]); assert pipe.scheduler.config.gamma == 1.5\n"
        "assert type(pipe.scheduler) is diffusers.BoostAndSkipDDPMScheduler is diffusers_ext.BoostAndSkipDDPMScheduler"
    )
    stock = "from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline\n"  # not by a name of diffusers itself
    for start in ("import diffusers_ext\n" + stock, stock + "import diffusers_ext\n"):
        done = fresh(f"import sys\n{start}print('silent', file=sys.stderr)\nimport diffusers\n{load}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("silent") and not done.stdout
