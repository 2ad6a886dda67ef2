"""Write docs/guidance_interval_support.md: what the table-driven test found, and how the rest of diffusers calls.

python tests/guidance_interval_matrix.py
"""

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from tiny_guided_pipelines import CASES, ONE_BY_ONE, STEPS, TWO, Case

from diffusers_ext.pipelines import GuidanceInterval, denoiser_calls

PAGE = Path(__file__).parent.parent / "docs" / "guidance_interval_support.md"
HEAD = """# Pipelines that were tried with a guidance interval

Written by `python tests/guidance_interval_matrix.py` from the cases of `tests/test_guidance_interval.py`, which holds
for each of them, with tiny random networks: the whole line equals plain guidance bit for bit, an empty interval equals
guidance off and a middle one a loop over all rows up to rounding, and the networks are run on exactly these rows.
Other pipelines that are written like these work as well; one that is not understood raises an error.

| Pipeline | How it guides | Rows a prompt, guided | Rows a prompt, else |
| --- | --- | --- | --- |
"""
REST = """
## All pipelines of diffusers {version} that guide

{count} pipelines have a guidance scale or a guider, those included that diffusers has deprecated.

{tested}

{tried}

{read}

{steps}

**Refused,** with an error that says so; what is in brackets was not run:

| Pipelines | Why |
| --- | --- |
{refused}
"""
TESTED = "**Tested:** {}, those of the table and, for what does not fit in it (caches, chunks, stages), {}"
ONCE = (
    "**Tried once:** {}. With tiny random networks the whole line was plain guidance bit for bit, an empty interval"
    " guidance off, where the pipeline runs without guidance at all, and a middle one a loop over all rows, where"
    " there is one network to loop over; the rows were as they should be. No test holds it: {}"
)
READ = (
    "**Read only.** The statement that calls the network is written like those of the others; not run, or with nothing"
    " that could tell (EasyAnimateControl fails in diffusers 0.42.1 itself): {}"
)
BY_STEPS = "**By steps only.** The schedulers have no noise levels, so use `guided_steps`: {}"
# Run once on diffusers 0.42.1, each with components like those of tiny_guided_pipelines.py.
TRIED = """
    AnimateDiffControlNetPipeline AnimateDiffPAGPipeline AnimateDiffSDXLPipeline AnimateDiffSparseControlNetPipeline
    AnimateDiffVideoToVideoControlNetPipeline AnimateDiffVideoToVideoPipeline AnyFlowPipeline AudioLDM2Pipeline
    BriaFibo2Pipeline BriaFiboEditPipeline BriaFiboPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline
    ChronoEditPipeline CogVideoXFunControlPipeline CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline
    CogView4ControlPipeline ConsisIDPipeline Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline
    Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline Cosmos3OmniPipeline CosmosTextToWorldPipeline
    CosmosVideoToWorldPipeline CycleDiffusionPipeline EasyAnimateInpaintPipeline Flux2KleinInpaintPipeline
    Flux2KleinPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextInpaintPipeline FluxKontextPipeline
    GlmImagePipeline HeliosPipeline HeliosPyramidPipeline HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline
    HunyuanImageRefinerPipeline HunyuanSkyreelsImageToVideoPipeline HunyuanVideo15ImageToVideoPipeline
    HunyuanVideo15Pipeline HunyuanVideoFramepackPipeline HunyuanVideoImageToVideoPipeline I2VGenXLPipeline
    IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline IFInpaintingPipeline IFInpaintingSuperResolutionPipeline
    IFSuperResolutionPipeline JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky3Img2ImgPipeline
    Kandinsky5I2IPipeline Kandinsky5T2IPipeline Kandinsky6TI2VAPipeline KandinskyCombinedPipeline
    KandinskyImg2ImgCombinedPipeline KandinskyImg2ImgPipeline KandinskyInpaintCombinedPipeline
    KandinskyInpaintPipeline KandinskyPipeline KandinskyPriorPipeline KandinskyV22ControlnetImg2ImgPipeline
    KandinskyV22ControlnetPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22Img2ImgPipeline
    KandinskyV22InpaintCombinedPipeline KandinskyV22InpaintPipeline KandinskyV22PriorEmb2EmbPipeline
    KandinskyV22PriorPipeline KolorsImg2ImgPipeline KolorsPAGPipeline Krea2Pipeline LDMTextToImagePipeline
    LTX2ConditionPipeline LTX2HDRPipeline LTX2ImageToVideoPipeline LTX2InContextPipeline LTXConditionPipeline
    LTXI2VLongMultiPromptPipeline LTXImageToVideoPipeline LongCatAudioDiTPipeline LongCatImageEditPipeline
    LongCatImagePipeline LucyEditPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline MusicLDMPipeline
    NucleusMoEImagePipeline PIAPipeline PRXPipeline PRXPixelPipeline PaintByExamplePipeline PixArtSigmaPAGPipeline
    QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline QwenImageEditPipeline
    QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImageLayeredPipeline
    SanaControlNetPipeline SanaImageToVideoPipeline SanaPAGPipeline SanaWMPipeline ShapEImg2ImgPipeline ShapEPipeline
    SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline
    SkyReelsV2ImageToVideoPipeline StableAudio3Pipeline StableCascadeCombinedPipeline StableCascadeDecoderPipeline
    StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
    StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline StableDiffusionAdapterPipeline
    StableDiffusionAttendAndExcitePipeline StableDiffusionControlNetImg2ImgPipeline
    StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetPAGInpaintPipeline
    StableDiffusionControlNetPAGPipeline StableDiffusionDepth2ImgPipeline StableDiffusionDiffEditPipeline
    StableDiffusionGLIGENPipeline StableDiffusionImageVariationPipeline StableDiffusionInpaintPipelineLegacy
    StableDiffusionLatentUpscalePipeline StableDiffusionModelEditingPipeline StableDiffusionPAGImg2ImgPipeline
    StableDiffusionPAGInpaintPipeline StableDiffusionPanoramaPipeline StableDiffusionXLAdapterPipeline
    StableDiffusionXLControlNetImg2ImgPipeline StableDiffusionXLControlNetInpaintPipeline
    StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusionXLControlNetPAGPipeline
    StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
    StableDiffusionXLControlNetXSPipeline StableDiffusionXLInstructPix2PixPipeline StableDiffusionXLPAGImg2ImgPipeline
    StableDiffusionXLPAGInpaintPipeline StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline TextToVideoZeroSDXLPipeline
    UnCLIPImageVariationPipeline UnCLIPPipeline VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline
    WanAnimatePipeline WanImageToVideoPipeline WanVACEPipeline WanVideoToVideoPipeline ZImageControlNetInpaintPipeline
    ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageOmniPipeline
"""
WITHOUT_NOISE_LEVELS = {"AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "VQDiffusionPipeline"}
REFUSED = {
    "the scale is an input of a distilled network": """
        Flux2Pipeline FluxControlImg2ImgPipeline FluxControlPipeline FluxFillPipeline LatentConsistencyModelPipeline
        SanaSprintPipeline DreamLiteMobilePipeline (FluxControlInpaintPipeline) (FluxControlNetImg2ImgPipeline)
        (FluxControlNetInpaintPipeline) LatentConsistencyModelImg2ImgPipeline (SanaSprintImg2ImgPipeline)
        (VisualClozeGenerationPipeline) (VisualClozePipeline)
    """,
    "self-attention guidance starts from the unconditional prediction (without it, `sag_scale=0`, it works)": """
        StableDiffusionSAGPipeline
    """,
    "edits are guided one by one": """
        SemanticStableDiffusionPipeline LEditsPPPipelineStableDiffusionXL (LEditsPPPipelineStableDiffusion)
    """,
    "safety guidance is a prediction of its own": "StableDiffusionPipelineSafe",
    "the two predictions are halves of different batches": "StableDiffusionGLIGENTextImagePipeline",
    "takes the gradient of the doubled batch": "StableDiffusionPix2PixZeroPipeline",
    "several steps in one batch": "(StableDiffusionParadigmsPipeline)",
    "networks in ONNX, which are no torch modules": """
        (OnnxStableDiffusionImg2ImgPipeline) (OnnxStableDiffusionInpaintPipeline) (OnnxStableDiffusionPipeline)
        (OnnxStableDiffusionInpaintPipelineLegacy) (OnnxStableDiffusionUpscalePipeline) (StableDiffusionOnnxPipeline)
    """,
}


def rows_of(case: Case, **interval) -> float:
    """Network rows a prompt and a step."""
    with GuidanceInterval(case.pipe, **interval) as limited:
        case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)
    return limited.report.rows / case.batch / STEPS


def line(name: str, case: Case) -> str:
    style = "two calls" if case.order == TWO else f"one batch: {case.order}"
    control = ", with ControlNet" if "control" in name else ""
    guess = " in guess mode" if "guess" in name else ""
    guided, other = rows_of(case, sigma_lo=0.0), rows_of(case, sigma_hi=1e-9)
    return f"| {type(case.pipe).__name__} ({name}) | {style}{control}{guess} | {guided:g} | {other:g} |"


def pipelines_that_guide() -> dict[str, type]:
    """All pipeline classes of diffusers whose call takes a guidance scale, or that have a guider, by name."""
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        try:
            importlib.import_module(module.name)
        except (ImportError, RuntimeError):  # of a library that is not there
            continue
    classes, found = [DiffusionPipeline], {}
    for cls in classes:
        classes += cls.__subclasses__()
        guides = any(map(re.compile(r"(guidance|cfg)_scale").search, inspect.signature(cls.__call__).parameters))
        guides = guides or "guider" in inspect.signature(cls.__init__).parameters
        if guides and cls.__module__.startswith("diffusers."):
            found[cls.__name__] = cls
    return dict(sorted(found.items()))


def calls_of_networks(cls: type) -> Iterator[denoiser_calls.CallSite]:
    """What the statements of a pipeline say that call one of its networks, without running it."""
    owner = object.__new__(cls)
    parts = {f"self.{name}" for name in inspect.signature(cls.__init__).parameters} | {"current_model"}  # Wan 2.2's
    methods = {name: method for base in reversed(cls.__mro__) for name, method in vars(base).items()}
    for method in map(inspect.unwrap, filter(inspect.isfunction, methods.values())):
        function = denoiser_calls._function(method.__code__)
        for statement in function.statements if function else ():
            if not statement.value:
                continue
            for call in sorted(denoiser_calls._calls(statement.value) & parts):
                yield denoiser_calls._read(function, statement, call, owner)


def is_read(cls: type) -> bool:
    """Whether guidance shows in a call of one of the pipeline's networks, or in one of the pipelines inside of it."""
    return any(
        any(split.run for split in site.splits) or site.unconditional or (site.context and site.timestep)
        for site in calls_of_networks(cls)
    ) or bool(re.search(r"self\.(prior|decoder)_pipe\(", inspect.getsource(cls)))


def listed(names) -> str:
    short = (re.sub(r"Pipeline(\)?)$", r"\1", name) for name in names)
    return ", ".join(sorted(short, key=lambda name: name.strip("("))) + "."


def page(everything: dict[str, type]) -> str:
    """The page, for all pipelines that guide, by name. Raises SystemExit if one is neither read nor accounted for."""
    cases = {name: build() for name, build in CASES.items()}
    one_by_one = {type(build().pipe).__name__ for build in ONE_BY_ONE}
    tested = {type(case.pipe).__name__ for case in cases.values()} | one_by_one
    tried, refused = set(TRIED.split()), {name.strip("()") for names in REFUSED.values() for name in names.split()}
    rest = everything.keys() - tested - tried - WITHOUT_NOISE_LEVELS - refused
    if unclear := sorted(name for name in rest if not is_read(everything[name])):
        raise SystemExit(f"neither read nor known to be refused: {unclear}")
    if wrong := sorted((tried | refused | WITHOUT_NOISE_LEVELS) - everything.keys() | (tried & tested)):
        raise SystemExit(f"no longer in diffusers, or tested by now: {wrong}")
    table = "\n".join(line(name, case) for name, case in cases.items())
    return f"{HEAD}{table}\n" + REST.format(
        version=diffusers.__version__,
        count=len(everything),
        tested=paragraph(TESTED, len(tested & everything.keys()), listed(one_by_one)),
        tried=paragraph(ONCE, len(tried), listed(tried)),
        read=paragraph(READ, listed(rest)),
        steps=paragraph(BY_STEPS, listed(WITHOUT_NOISE_LEVELS)),
        refused="\n".join(f"| {listed(names.split())} | {reason} |" for reason, names in REFUSED.items()),
    )


def paragraph(text: str, *values) -> str:
    return textwrap.fill(text.format(*values), width=119, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(pipelines_that_guide()), encoding="utf-8")
