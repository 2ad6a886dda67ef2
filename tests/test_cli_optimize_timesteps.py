"""diffusers-ext optimize-timesteps, from a model's folder to one with tables."""

import json
import sys

import numpy as np
import pytest
import torch
from cli_on_processes import run_on_two
from click.testing import CliRunner
from test_timestep_search import Stopped, same_info
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from diffusers_ext import CTMCScheduler, DiscreteDiffusionPipeline, SEDDTransformer, cli
from diffusers_ext.jump_your_steps import TimestepTables, model_folder
from diffusers_ext.jump_your_steps.model_folder import read_sequences


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["optimize-timesteps", *map(str, arguments)])


@pytest.fixture
def model(tmp_path):
    """A tiny random model in a folder, with a card beside the components."""
    torch.manual_seed(0)
    network = SEDDTransformer(
        vocab_size=6, hidden_size=8, cond_dim=8, num_blocks=1, num_heads=2, sequence_length=10, mlp_ratio=1
    )
    torch.nn.init.normal_(network.output.linear.weight)
    pipe = DiscreteDiffusionPipeline(network, CTMCScheduler(vocab_size=6, min_timestep=1e-4))
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("its card")
    return tmp_path / "model"


SMALL = ("--num-samples", 6, "--grid-size", 16, "--batch-size", 2, "--device", "cpu")


def test_a_copy_of_the_model_has_the_tables(model, tmp_path):
    result = invoke(
        model, "--data", "countdown", "--num-inference-steps", 2, 4, 5, "--output", tmp_path / "out", *SMALL
    )
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "model", "model_index.json", "scheduler", "timestep_tables.json", "timestep_tables.png",
    ]  # fmt: skip
    tables = TimestepTables.load(tmp_path / "out" / "timestep_tables.json")
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert TimestepTables.of(pipe.scheduler) == tables and list(tables.tables) == [2, 4, 5]
    assert pipe.scheduler.config.min_timestep == 1e-4 and tables.info[5]["num_samples"] == 6
    pipe(batch_size=2, num_inference_steps=5)
    assert pipe.scheduler.edges.tolist() == list(tables[5])
    assert DiscreteDiffusionPipeline.from_pretrained(model).scheduler.config.timestep_tables is None
    assert not list(tmp_path.glob("*.unfinished")) and "nats a sequence" in result.output

    command = (model, "--data", "countdown", "--num-inference-steps", 2, 4, 5, "--output", tmp_path / "out", *SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = invoke(*command)
    assert again.exit_code == 0 and "out was finished before, nothing to do" in again.output.replace("\n", "")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    other = invoke(*command, "--seed", 3)
    assert other.exit_code == 1 and "seed: 0 before, 3 now" in other.output
    weights = tmp_path / "out/model/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = invoke(*command)
    assert damaged.exit_code == 1 and "model.safetensors is gone or damaged" in damaged.output.replace("\n", " ")


def test_only_what_belongs_to_a_model_is_copied(model, tmp_path):
    """The weights as they are, card, licence and code that the index names; no secrets, notes and history."""
    pipe = DiscreteDiffusionPipeline.from_pretrained(model)
    pipe.model.half().save_pretrained(model / "model")
    for name in (".env", ".git/config", "notes.txt", "model/.secret", "model/notes.txt", "helper.py", "LICENSE"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("mine")
    result = invoke(
        model,
        "--data",
        "countdown",
        "--num-inference-steps",
        2,
        "--output",
        tmp_path / "out",
        *SMALL,
        "--trust-remote-code",
    )
    assert result.exit_code == 0, result.output
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert written == {
        "LICENSE", "README.md", "model", "model/config.json", "model/diffusion_pytorch_model.safetensors",
        "model_index.json", "scheduler", "scheduler/scheduler_config.json", "timestep_tables.json",
        "timestep_tables.png",
    }  # fmt: skip
    name = "model/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_code_of_a_model_is_copied(model, tmp_path):
    """The pipeline's file and its sibling, which model_index.json and the file name."""
    index = json.loads((model / "model_index.json").read_text())
    index["_class_name"] = ["own", "Own"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "own.py").write_text(
        "from diffusers_ext.pipelines import DiscreteDiffusionPipeline\nfrom .part import NAME\n\n\n"
        "class Own(DiscreteDiffusionPipeline):\n    name = NAME\n"
    )
    (model / "part.py").write_text("NAME = 1\n")
    (model / "other.py").write_text("mine")
    result = invoke(
        model, "--data", "countdown", "--num-inference-steps", 2, "--output", tmp_path / "out", *SMALL,
        "--trust-remote-code",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"own.py", "part.py"}
    assert json.loads((tmp_path / "out/model_index.json").read_text())["_class_name"] == ["own", "Own"]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(model, tmp_path):
    command = (model, "--data", "countdown", "--num-inference-steps", 2, 4, *SMALL, "--output")
    assert invoke(*command, tmp_path / "one").exit_code == 0
    said = run_on_two(tmp_path / "notes", "optimize-timesteps", *command, tmp_path / "two")
    assert said.count(f"wrote {tmp_path / 'two'}") == 1 and not list(tmp_path.glob("two.*"))
    one, two = (TimestepTables.load(tmp_path / name / "timestep_tables.json") for name in ("one", "two"))
    assert one.tables == two.tables
    assert all(same_info(one.info[n], two.info[n]) for n in (2, 4))


def test_it_needs_no_matplotlib(model, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)
    result = invoke(model, "--data", "countdown", "--num-inference-steps", 2, "--output", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out/timestep_tables.json").exists() and not (tmp_path / "out/timestep_tables.png").exists()


def test_it_says_what_it_was_given(model, tmp_path):
    options = ("--method", "golden", "--sampler", "gillespie", "--given-prefix", 3, "--seed", 4)
    np.savez(tmp_path / "data.npz", tokens=np.arange(50).reshape(5, 10) % 5)
    arguments = ("--data", tmp_path / "data.npz", "--num-inference-steps", "2,4", *options)
    small = ("--num-samples", 9, "--device", "cpu")
    result = invoke(model, *arguments, "--output", tmp_path / "out", *small)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    info = config["timestep_table_info"]["4"]
    assert info["model"]["name"] == "model/model"  # no path of this machine
    assert config["sampler"] == "gillespie" and info["method"] == "golden" and info["seed"] == 4
    assert info["num_samples"] == 5 and info["token_counts"][-1] == 10


def test_interrupted_and_gone_on(model, tmp_path, monkeypatch):
    from diffusers_ext.jump_your_steps import statistics

    arguments = (model, "--data", "countdown", "--num-inference-steps", 3, *SMALL)
    assert invoke(*arguments, "--output", tmp_path / "whole").exit_code == 0
    of, calls = statistics.RateStatistics.of, []

    def stopping(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise Stopped
        return of(self, rows)

    monkeypatch.setattr(statistics.RateStatistics, "of", stopping)
    assert isinstance(invoke(*arguments, "--output", tmp_path / "out").exception, Stopped)
    assert (tmp_path / "out.unfinished").is_file() and not (tmp_path / "out").exists()
    assert invoke(*arguments, "--output", tmp_path / "out").exit_code == 0
    assert len(calls) == 4  # two batches, the one that failed, and that one again
    whole, resumed = (TimestepTables.load(tmp_path / name / "timestep_tables.json") for name in ("whole", "out"))
    assert whole.tables == resumed.tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-inference-steps", "17"), "17 steps do not fit on a grid of 16 intervals"),
        (("--method", "golden", "--num-inference-steps", "3"), "makes tables for 2, 4, 8"),
        (("--data", "text.txt"), "has no tokenizer"),
        (("--data", "other.csv"), "data must be an .npz, .npy or .txt file"),
        (("--data", "empty.npz"), "has no array `tokens`, only ['other']"),
        (("--data", "floats.npy"), "must hold integers (count, length), got float64"),
        (("--data", "large.npy"), "data must hold tokens in [0, 5)"),
        (("--data", "missing.npy"), "No such file"),
        (("--data", "long.npy"), "holds sequences of 11 tokens, this model's have 10"),
        (("--data", "negative.npy"), "data must hold tokens in [0, 5), the scheduler's vocabulary without its mask"),
    ],
)
def test_refusals_in_one_line(model, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    np.savez("empty.npz", other=np.zeros(3))
    np.save("floats.npy", np.zeros((2, 10)))
    np.save("large.npy", np.full((2, 10), 5))
    np.save("long.npy", np.full((2, 11), 4))
    np.save("negative.npy", np.full((2, 10), -1))
    (tmp_path / "text.txt").write_text("words")
    given = () if "--data" in options else ("--data", "countdown")
    result = invoke(model, *given, "--output", "out", *SMALL, *options)
    assert result.exit_code == 1 and message in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "out").exists()


def test_other_pipelines_are_refused(tmp_path):
    result = invoke("mnist-unet", "--data", "countdown", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "timestep tables are for a DiscreteDiffusionPipeline" in result.output


def test_a_folder_that_is_not_empty(model, tmp_path):
    result = invoke(model, "--data", "countdown", "--output", model)
    assert result.exit_code == 1 and "is not empty" in result.output


@pytest.mark.parametrize(("tokens", "warned"), [(3, True), (4, False)])
def test_data_with_few_of_the_tokens_is_pointed_out(model, tmp_path, monkeypatch, tokens, warned):
    pipe, said = DiscreteDiffusionPipeline.from_pretrained(model), []
    monkeypatch.setattr(model_folder.logger, "warning", said.append)
    np.save(tmp_path / "few.npy", np.arange(20).reshape(2, 10) % tokens)
    read_sequences(str(tmp_path / "few.npy"), pipe, 2)
    assert ("no token above 2, and the model's vocabulary has 5" in "".join(said)) == warned


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a letter, and [CLS] and [SEP] around every text."""
    words = Tokenizer(
        WordLevel({letter: i for i, letter in enumerate([*alphabet, "[CLS]", "[SEP]", "[UNK]"])}, "[UNK]")
    )
    words.pre_tokenizer = Split("", "isolated")
    ids = [(name, words.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def test_text_is_cut_into_sequences(model, tmp_path):
    pipe = DiscreteDiffusionPipeline.from_pretrained(model)
    pipe.tokenizer = letters("abcde")
    (tmp_path / "text.txt").write_text("abcdeedcba" * 3 + "abc")
    sequences = read_sequences(str(tmp_path / "text.txt"), pipe, 2)
    assert sequences.tolist() == [[0, 1, 2, 3, 4, 4, 3, 2, 1, 0]] * 2
    (tmp_path / "text.txt").write_text("short")
    with pytest.raises(ValueError, match="has 5 tokens, a sequence of this model has 10"):
        read_sequences(str(tmp_path / "text.txt"), pipe, 2)
    pipe.tokenizer = letters("abcdefghij")
    (tmp_path / "text.txt").write_text("abcdefghij")
    with pytest.raises(ValueError, match="must hold tokens in"):
        read_sequences(str(tmp_path / "text.txt"), pipe, 2)
