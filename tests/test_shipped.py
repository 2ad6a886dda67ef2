"""The models that ship: they load by name, are as small as promised, and do what their cards say."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline

from diffusers_ext import BoostAndSkipDDIMScheduler, BoostAndSkipPipeline
from diffusers_ext.discrete.losses import likelihood_bound
from diffusers_ext.discrete.music import tokens_to_pitches
from diffusers_ext.evaluation import evaluate_digits
from diffusers_ext.hub import export_pipeline
from diffusers_ext.metrics import countdown_errors, frechet_distance
from diffusers_ext.shipped import (
    load_network,
    load_pipeline,
    load_shipped_classifier,
    network_class,
    resolve_model,
    shipped_models,
)


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_names_and_sizes():
    models = shipped_models()
    assert set(models) == {
        "mnist-classifier", "mnist-unet", "mnist-edm2", "mnist-flow", "countdown-sedd", "jsb-sedd", "shakespeare-sedd"
    }  # fmt: skip
    assert size(models["mnist-unet"]) < 4e6 and size(models["mnist-edm2"]) < 3e6 and size(models["mnist-flow"]) < 4e6
    assert (models["mnist-classifier"] / "diffusion_pytorch_model.safetensors").stat().st_size < 1e6
    assert size(models["mnist-classifier"]) < 3e6
    assert resolve_model("mnist-unet") == str(models["mnist-unet"])
    assert resolve_model("google/ddpm-cat-256") == "google/ddpm-cat-256"


def test_the_reference_is_of_the_training_set():
    classifier, reference = load_shipped_classifier()
    dim = classifier.config.feature_dim
    assert reference.features.shape == (10_000, dim) and reference.features.dtype == torch.float32
    assert reference.mean.shape == (dim,) and reference.covariance.shape == (dim, dim)
    assert reference.labels.unique().tolist() == list(range(10))
    # a sixth of the set has nearly the statistics of the whole
    features = reference.features.double()
    distance = frechet_distance(features.mean(0), features.T.cov(), reference.mean, reference.covariance)
    assert distance < 0.01 * reference.covariance.trace()
    # the features are those of this classifier: its read-out recognises them
    recognised = (classifier.to_logits(reference.features).argmax(1) == reference.labels).double().mean()
    assert recognised > 0.99


def test_the_model_loads_by_name_by_class_and_by_diffusers():
    folder = shipped_models()["mnist-unet"]
    assert json.loads((folder / "model_index.json").read_text())["null_class"] == 10
    for pipe in (load_pipeline("mnist-unet"), DiffusionPipeline.from_pretrained(folder)):
        assert type(pipe) is BoostAndSkipPipeline
        assert pipe.config.null_class == 10 and pipe.unet.config.num_class_embeds == 11


@pytest.mark.slow
def test_samples_are_recognised_and_boosted_ones_differ():
    pipe = load_pipeline("mnist-unet", "boost-and-skip")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(10)
    classifier, _ = load_shipped_classifier()

    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            class_labels=labels, num_inference_steps=12, generator=generator, output_type="pt", **options
        ).images

    plain = draw()
    with torch.no_grad():
        recognised = (classifier(plain * 2 - 1).logits.argmax(1) == labels).double().mean()
    assert recognised >= 0.9
    assert (draw(gamma=4.0, skip_steps=3) - plain).abs().mean() > 0.01


@pytest.mark.slow
def test_edm2_digits_are_recognised_and_guidance_runs_where_it_should():
    pipe = load_pipeline("mnist-edm2")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(30) % 10
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 8, "guidance_scale": 2.0, "guided_steps": (2, 4), "generator": generator}
    images = pipe(labels, output_type="pt", **call).images
    assert pipe.num_evaluations == {"unet": 15, "guidance_unet": 6}
    classifier, _ = load_shipped_classifier()
    with torch.no_grad():
        recognised = (classifier(images * 2 - 1).logits.argmax(1) == labels).double().mean()
    assert images.shape == (30, 1, 28, 28) and recognised >= 0.9


@pytest.mark.slow
@torch.no_grad()
def test_the_flow_leads_overdone_digits_back():
    """Guidance of weight 15 leaves grey smears; after the flow images are nearer to the training set, and digits."""
    base, flow = load_pipeline("mnist-unet"), load_pipeline("mnist-flow")
    labels = torch.arange(10)
    for pipe in (base, flow):
        pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 16, "guidance_scale": 15.0, "generator": generator}
    before = base(class_labels=labels, output_type="pt", **call).images
    after = flow(before, class_labels=labels, num_inference_steps=4, output_type="pt").images
    measured = [evaluate_digits(images, labels, ["knn_distance"]) for images in (before, after)]
    assert measured[1]["knn_distance"] < 0.8 * measured[0]["knn_distance"]
    assert measured[1]["recognised"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["countdown-sedd", "jsb-sedd"])
def test_sequence_models_draw_what_their_names_say(name):
    """A step for eight tokens is enough for most CountDown transitions, and for voices in their order."""
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    assert size(shipped_models()[name]) < 3.1e6 and pipe.model.config.sequence_length == 256
    tokens = pipe(batch_size=4, num_inference_steps=32, generator=torch.Generator().manual_seed(0)).tokens
    if name == "countdown-sedd":
        assert countdown_errors(tokens).mean() < 0.1
    else:
        soprano, _, _, bass = torch.from_numpy(tokens_to_pitches(tokens)).unbind(-1)
        assert (soprano > bass).double().mean() > 0.9
        held = (tokens[:, 4:] == tokens[:, :-4]).double().mean()
        assert 0.4 < held < 0.9  # sixteenths are seldom all new


SONNET = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
"""


def test_the_text_model_knows_text_from_words_in_any_order():
    """Chance has log 4613 = 8.4 nats a token; real words alone say little, since most tokens are words."""
    pipe = load_pipeline("shakespeare-sedd")
    assert size(shipped_models()["shakespeare-sedd"]) < 5 * 2**20
    tokens = torch.tensor(pipe.tokenizer(SONNET).input_ids[: pipe.model.config.sequence_length])
    rows = torch.stack([tokens, tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]])
    generator = torch.Generator().manual_seed(0)
    text, shuffled = likelihood_bound(pipe.model, pipe.scheduler, rows, num_times=32, generator=generator).tolist()
    assert text < 5.5 and shuffled > text + 1


def test_the_text_model_keeps_its_prompt():
    pipe = load_pipeline("shakespeare-sedd")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 8, "output_type": "text", "generator": torch.Generator().manual_seed(0)}
    texts = pipe(prompt=["O Romeo", "Thou"], suffix=" to die.", **call).text
    assert texts[0].startswith("O Romeo") and texts[1].startswith("Thou")
    assert all(text.endswith(" to die.") for text in texts)


def test_code_in_a_folder_needs_trust(tmp_path):
    export_pipeline(load_pipeline("mnist-unet"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds code, boost_and_skip\.py"):
        load_pipeline(str(tmp_path / "out"))
    assert load_pipeline(str(tmp_path / "out"), trust_remote_code=True).config.null_class == 10


def test_a_stock_scheduler_becomes_ours_under_boost_and_skip(tmp_path):
    pipe = load_pipeline("mnist-unet")
    DDPMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config)).save_pretrained(tmp_path)
    assert type(load_pipeline(str(tmp_path), "boost-and-skip").scheduler) is BoostAndSkipDDIMScheduler
    assert type(load_pipeline(str(tmp_path)).scheduler) is DDIMScheduler


def test_a_shipped_model_that_is_no_pipeline_is_named():
    with pytest.raises(ValueError, match="'mnist-classifier' is no pipeline"):
        load_pipeline("mnist-classifier")


def test_an_unknown_pipeline_name_is_refused():
    with pytest.raises(ValueError, match="pipeline must be one of"):
        load_pipeline("mnist-unet", "boost")


def test_networks_are_told_from_pipelines(tmp_path):
    assert network_class("mnist-classifier") == "ImageClassifier" and network_class("mnist-unet") is None
    assert type(load_network("mnist-classifier")).__name__ == "ImageClassifier"
    unet = load_pipeline("mnist-unet").unet
    unet.save_pretrained(tmp_path / "stock")
    again = load_network(str(tmp_path / "stock"), trust_remote_code=True)
    assert type(again) is type(unet) and torch.equal(again.conv_out.weight, unet.conv_out.weight)
    with pytest.raises(ValueError, match="'mnist-unet' is no network"):
        load_network("mnist-unet")
    config = json.loads((tmp_path / "stock/config.json").read_text())
    config |= {"_class_name": "Foreign", "auto_map": {"AutoModel": "foreign.Foreign"}}
    (tmp_path / "stock/config.json").write_text(json.dumps(config))
    (tmp_path / "stock/foreign.py").write_text("raise RuntimeError('this was run')\n")
    with pytest.raises(ValueError, match=r"holds code, foreign\.py"):
        load_network(str(tmp_path / "stock"))
