"""What the first minute shows: help without a wait, the public names, classes that diffusers knows."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from diffusers import DDPMPipeline, UNet2DModel
from fresh_process import ended, start_fresh

import diffusers_ext
from diffusers_ext import EDM2Pipeline, IntervalGuidance, cli, limit_to_interval
from diffusers_ext.pipelines import DiTGuidanceIntervalPipeline
from diffusers_ext.pipelines.interval import Interval
from diffusers_ext.runs.lists import INTERVAL, ListsCommand
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
        (["sample", "mnist-unett", "--output", "out"], "did you mean mnist-unet?"),
        (["sample", "mnist-unet", "--output", "out", "--dtype", "float61"], "'float16'"),
        (["demo", "--full", "now"], "unexpected extra argument"),
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


def options(command: click.Command = cli.main) -> Iterator[click.Option]:
    """Of a command and its subcommands."""
    for name in getattr(command, "commands", {}):
        yield from options(command.commands[name])
    yield from (option for option in command.params if isinstance(option, click.Option))


@pytest.mark.parametrize(("name", "off"), [("dtype", []), ("mixed_precision", ["no"])])
def test_dtypes_have_one_spelling_and_the_short_names_mean_the_same(name, off):
    found = [option for option in options() if option.name == name]
    assert len(found) >= {"dtype": 7, "mixed_precision": 1}[name]
    for option in found:
        assert {*option.type.choices} - {"no"} <= {"float32", "float16", "bfloat16"}
        for short, long in (("fp16", "float16"), ("bf16", "bfloat16")):
            values = [option.process_value(click.Context(cli.main), spelling) for spelling in (short, long)]
            assert values == [long if name == "dtype" else short] * 2  # accelerate has the short ones


def test_options_of_one_name_are_one_option():
    found: dict[str, set] = {}
    for option in options():
        if option.name in ("dtype", "device", "pipeline", "trust_remote_code", "cpu_threads"):
            found.setdefault(option.name, set()).add((option.help, option.default, tuple(option.opts)))
    assert {name: len(kinds) for name, kinds in found.items()} == dict.fromkeys(found, 1) and len(found) == 5


@pytest.mark.parametrize(
    "words", [["--metrics", "lof,frechet", "--k", "lof=7,rarity=4"], ["--metric", "lof", "--metric", "frechet"]]
)
def test_lists_of_words_have_commas_or_are_repeated(words, monkeypatch):
    asked = {}
    monkeypatch.setattr("diffusers_ext.evaluation.evaluate_images", lambda *given: asked.update(given=given))
    monkeypatch.setattr("diffusers_ext.evaluation.print_evaluation", lambda *given: None)
    assert CliRunner().invoke(cli.main, ["evaluate", "a", "--reference", "b", *words]).exit_code == 0
    assert asked["given"][3] == ["lof", "frechet"]
    assert asked["given"][4] == ({"lof": 7, "rarity": 4} if "--k" in words else {})


@pytest.mark.parametrize("words", [["0.28:5.42"], ["0.28,5.42"], ["0.28", "5.42"]])
def test_an_interval_on_a_command_line(words):
    @click.command(cls=ListsCommand)
    @click.option("--guidance-interval", type=INTERVAL)
    def command(guidance_interval):
        click.echo(guidance_interval)

    assert CliRunner().invoke(command, ["--guidance-interval", *words]).output == "[0.28, 5.42]\n"
    for wrong in (["0.28"], ["5:1"], ["1:nan"], ["1:2:3"], ["low:high"]):
        assert CliRunner().invoke(command, ["--guidance-interval", *wrong]).exit_code


def test_every_call_takes_an_interval_in_one_form():
    calls = [value for value in map(partial(getattr, diffusers_ext), diffusers_ext.__all__) if callable(value)]
    calls += [cls.__call__ for cls in (EDM2Pipeline, DiTGuidanceIntervalPipeline)]
    parameters = [inspect.signature(call).parameters for call in calls]
    assert sum("guidance_interval" in names for names in parameters) >= 7
    assert all("guidance_interval" in names for names in parameters if "sigma_lo" in names or "guided_steps" in names)

    guider = IntervalGuidance(guidance_interval=(0.28, 5.42))
    for limited in (guider, IntervalGuidance.from_config(guider.config)):
        assert (limited.interval.sigma_lo, limited.interval.sigma_hi) == (0.28, 5.42)
    assert limit_to_interval(guider, guidance_interval=(0, 3)).interval.sigma_hi == 3
    with pytest.raises(ValueError, match=r"got sigma_lo=1, .*guidance_interval="):
        Interval(1, guidance_interval=(1, 2))


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
        code = f"import sys\n{start}print('silent')\nimport diffusers\n{load}"
        said = tmp_path / "said"
        assert ended(start_fresh(code, tmp_path, said=said), said).startswith("silent")
