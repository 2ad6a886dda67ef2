"""Write docs/guidance_interval_support.md: the table of layouts, what was tried, and which guiders there are.

python tests/guidance_interval_matrix.py
python tests/guidance_interval_matrix.py --fingerprints    # of the code that the table describes, for the tests
"""

import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from tiny_guided_pipelines import CASES, ONE_BY_ONE, STEPS, Case

from diffusers_ext.pipelines import GuidanceInterval
from diffusers_ext.pipelines.applied_guiders import check_guider
from diffusers_ext.pipelines.guidance_layouts import COMBINED, LAYOUTS, REFUSED, REFUSED_CALLS
from diffusers_ext.pipelines.layout_source import _methods

PAGE = Path(__file__).parent.parent / "docs" / "guidance_interval_support.md"
FINGERPRINTS = Path(__file__).parent / "goldens" / "guidance_fingerprints.json"
HEAD = """# Pipelines that can be guided in an interval, or by a guider

Written by `python tests/guidance_interval_matrix.py`. Tests hold for each pipeline of the first table, with tiny
random networks: the whole line equals plain guidance bit for bit, an empty interval equals guidance off and a middle
one a loop over all rows up to rounding, the networks are run on exactly these rows, and `verify=True` finds the layout
that the table has. With two parts, a guider `ClassifierFreeGuidance(w)` equals the stock pipeline called with that
weight.

A layout is "uncond, cond" for one batch with these parts, "cond; uncond" for two calls.

| Pipeline | Layout | Guiders | Rows a prompt, guided | Rows a prompt, else |
| --- | --- | --- | --- | --- |
"""
REST = """
## All pipelines of diffusers {version} that guide

{count} pipelines have a guidance scale or a guider, those included that diffusers has deprecated. {listed} of them are
in the table of `pipelines/guidance_layouts.py`; a test compares the code of all of them with the code that it was made
for.

| Layout | Guiders | Pipelines |
| --- | --- | --- |
{layouts}

Combined pipelines, whose parts are guided each: {combined}

{tested}

{tried}

{steps}

**Refused,** with an error that says so, as it is applied:

| Pipelines | Why |
| --- | --- |
{refused}

## Guiders

Of diffusers {version}: **can be applied** {can}. **Refused**, since they need other calls of the network: {cannot}
"""
TESTED = "**Tested:** {}, those of the first table and, for what does not fit in it (caches, chunks, stages), {}"
ONCE = (
    "**Tried once,** before the layouts were declared: {}. With tiny random networks the whole line was plain guidance"
    " bit for bit, an empty interval guidance off, and a middle one a loop over all rows. No test holds it: {}"
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


def rows_of(case: Case, **interval) -> float:
    """Network rows a prompt and a step."""
    with GuidanceInterval(case.pipe, **interval) as limited:
        case.pipe(**case.options, generator=torch.Generator().manual_seed(0), return_dict=False)
    return limited.report.rows / case.batch / STEPS


def line(name: str, case: Case) -> str:
    guides = "yes" if len(re.split(", |; ", case.order)) == 2 else "no"
    guided, other = rows_of(case, sigma_lo=0.0), rows_of(case, sigma_hi=1e-9)
    return f"| {type(case.pipe).__name__} ({name}) | {case.order} | {guides} | {guided:g} | {other:g} |"


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


def fingerprint(cls: type) -> str:
    """Of `__call__` and the methods that it uses."""
    sources = [f"{name}:{inspect.getsource(method)}" for name, method in sorted(_methods(cls).items())]
    return hashlib.sha256(re.sub(r"\s+", "", "".join(sources)).encode()).hexdigest()[:16]


def listed(names) -> str:
    short = (re.sub(r"Pipeline(\)?)$", r"\1", name) for name in names)
    return ", ".join(sorted(short, key=lambda name: name.strip("("))) + "."


def by_layout(names: list[str]) -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(str(LAYOUTS[name]), []).append(name)
    lines = []
    for text, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        optional = {LAYOUTS[name].optional and LAYOUTS[name].optional[0] for name in group} - {None}
        parts = len(re.split(", |; | \\| ", text))
        guides = "yes" if parts == 2 else f"without {optional.pop()}" if optional else "no"
        written = text.replace("|", "\\|")
        lines.append(f"| {written} | {guides} | {listed(group)} |")
    return "\n".join(lines)


def guiders() -> tuple[list[str], list[str]]:
    """Names of the guiders of diffusers: that can be applied, and that cannot."""
    can, cannot = [], []
    for cls in vars(diffusers.guiders).values():
        if not (isinstance(cls, type) and issubclass(cls, BaseGuidance) and cls is not BaseGuidance):
            continue
        try:
            check_guider(object.__new__(cls))
            can.append(cls.__name__)
        except ValueError:
            cannot.append(cls.__name__)
    return sorted(can), sorted(cannot)


def page(everything: dict[str, type]) -> str:
    """The page, for all pipelines that guide, by name. Raises SystemExit if one is not in the table."""
    cases = {name: build() for name, build in CASES.items()}
    one_by_one = {type(build().pipe).__name__ for build in ONE_BY_ONE}
    tested = {type(case.pipe).__name__ for case in cases.values()} | one_by_one
    tried = set(TRIED.split())
    if missing := sorted(everything.keys() - LAYOUTS.keys() - COMBINED - REFUSED.keys()):
        raise SystemExit(f"not in the table: {missing}")
    if wrong := sorted((tried | WITHOUT_NOISE_LEVELS) - everything.keys() | (tried & tested)):
        raise SystemExit(f"no longer in diffusers, or tested by now: {wrong}")
    table = "\n".join(line(name, case) for name, case in cases.items())
    reasons: dict[str, list[str]] = {}
    for name, reason in {**REFUSED, **{name: reason for name, (reason, _) in REFUSED_CALLS.items()}}.items():
        reasons.setdefault(reason, []).append(name)
    can, cannot = guiders()
    return f"{HEAD}{table}\n" + REST.format(
        version=diffusers.__version__,
        count=len(everything),
        listed=len(everything.keys() & (LAYOUTS.keys() | COMBINED)),
        layouts=by_layout(sorted(everything.keys() & LAYOUTS.keys())),
        combined=listed(COMBINED),
        tested=paragraph(TESTED, len(tested & everything.keys()), listed(one_by_one)),
        tried=paragraph(ONCE, len(tried), listed(tried)),
        steps=paragraph(BY_STEPS, listed(WITHOUT_NOISE_LEVELS)),
        refused="\n".join(f"| {listed(names)} | {reason} |" for reason, names in reasons.items()),
        can=", ".join(can),
        cannot=", ".join(cannot) + ".",
    )


def paragraph(text: str, *values) -> str:
    return textwrap.fill(text.format(*values), width=119, break_long_words=False, break_on_hyphens=False)


def write_fingerprints(everything: dict[str, type]) -> None:
    found = {"diffusers": diffusers.__version__, "pipelines": {n: fingerprint(c) for n, c in everything.items()}}
    FINGERPRINTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--fingerprints" in sys.argv:
        write_fingerprints(pipelines_that_guide())
    else:
        PAGE.write_text(page(pipelines_that_guide()), encoding="utf-8")
