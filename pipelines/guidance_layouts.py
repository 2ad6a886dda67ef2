"""How pipelines guide: a table of diffusers' own.

diffusers' pipelines guide in two ways. One call of the network on a batch of several parts, whose output is split,

    noise_pred = self.unet(torch.cat([latents] * 2), t, ...)
    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)

or a second call for the unconditional prediction,

    noise_pred = self.transformer(latents, encoder_hidden_states=prompt_embeds, ...)
    neg_noise_pred = self.transformer(latents, encoder_hidden_states=negative_prompt_embeds, ...)

A layout is written "uncond, cond" for parts in this order, "uncond | cond" for parts that take turns row by row, and
"cond; uncond" for two calls. Parts are "cond", "uncond", "image" (InstructPix2Pix's condition on the image alone) and
"perturbed" (perturbed-attention guidance).
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from .rows import Cut

PARTS = ("cond", "uncond", "image", "perturbed")


def by_property(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> bool:
    """Whether a call guides, for pipelines that decide by their `do_classifier_free_guidance`."""
    return bool(pipe.do_classifier_free_guidance)


def above_one(*names: str) -> Callable[[DiffusionPipeline, dict], bool]:
    """The same for pipelines that decide by an argument of the call, or by one of several."""

    def is_on(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> bool:
        return any((arguments.get(name) or 0) > 1 for name in names)

    return is_on


@dataclass(frozen=True)
class Layout:
    """How a pipeline guides.

    Attributes:
        parts: in order of the batch, or of the calls.
        how: "batch", "turns" or "calls".
        on: whether a call guides, from the pipeline and the arguments of its call; called at each step.
        optional: a part and the name of the argument, or attribute, without which it is left out.
        extra: after the doubled batch, the network is called again without doubling in one step.
        gradient: so it is where gradients are taken.
        partly: so it is in steps that the pipeline leaves unguided itself, after a guided one.
        every: all calls but the first of a step are unconditional.
        plus_one: the weight w of a call means c + w (c - u), not u + w (c - u).
        variance: the second half of the channels is no prediction to guide: always, or where it is there ("may");
            Lumina guides "three" channels.
        text_first: the conditional prediction has the text's tokens in front of the image's.
        fills_cache: the first unconditional call fills a cache that later ones read.
        aside: which calls, by their arguments, fill a cache of all rows and predict nothing.
    """

    parts: tuple[str, ...]
    how: str = "batch"
    on: Callable[[DiffusionPipeline, dict], bool] = by_property
    optional: tuple[str, str] | None = None
    extra: bool = False
    gradient: bool = False
    partly: bool = False
    every: bool = False
    plus_one: bool = False
    variance: str = ""
    text_first: bool = False
    fills_cache: bool = False
    aside: Callable[[dict], bool] | None = None

    def __str__(self) -> str:
        return {"batch": ", ", "turns": " | ", "calls": "; "}[self.how].join(self.parts)

    @functools.cached_property
    def cut(self) -> Cut:
        """The parts to run without guidance, and which of them stand for the others."""
        run = [i for i, part in enumerate(self.parts) if part in ("cond", "perturbed")]
        run.sort(key=lambda i: self.parts[i] == "perturbed")
        source = tuple(run.index(i) if i in run else 0 for i in range(len(self.parts)))
        return Cut(len(self.parts), tuple(run), source, self.how == "turns")

    def of_call(self, pipe: DiffusionPipeline, arguments: dict[str, Any]) -> "Layout":
        """The layout of one call, without the part that it has no use for."""
        if self.optional is None:
            return self
        part, name = self.optional
        if arguments[name] if name in arguments else getattr(pipe, name):
            return self
        return replace(self, parts=tuple(one for one in self.parts if one != part), optional=None)


def parse_layout(text: str) -> Layout:
    """A layout as users write it.

    Raises:
        ValueError: for anything else.
    """
    kinds = {",": "batch", "|": "turns", ";": "calls"}
    found = [mark for mark in kinds if isinstance(text, str) and mark in text]
    parts = tuple(part.strip() for part in text.split(found[0])) if len(found) == 1 else ()
    known = set(parts) <= set(PARTS) and {"cond", "uncond"} <= set(parts) and len(set(parts)) == len(parts)
    if not known or (found == [";"] and parts != ("cond", "uncond")):
        raise ValueError(
            'layout must be like "uncond, cond" (a batch in parts, in this order), "uncond | cond" (parts that take'
            f' turns row by row) or "cond; uncond" (two calls, in this order), with parts of {PARTS}, got {text!r}; a'
            " pipeline that makes the unconditional call first cannot be limited"
        )
    return Layout(parts, kinds[found[0]])


UNCOND_COND, COND_UNCOND, CALLS = ("uncond", "cond"), ("cond", "uncond"), ("cond", "uncond")
BY_SCALE = above_one("guidance_scale")
_PAG = Layout(("uncond", "cond", "perturbed"), optional=("perturbed", "do_perturbed_attention_guidance"))
_CALLS = Layout(CALLS, "calls", above_one("guidance_scale"))
_TRUE = Layout(CALLS, "calls", above_one("true_cfg_scale"))
_PLUS_ONE = Layout(CALLS, "calls", by_property, plus_one=True)

# Each with the classes, without "Pipeline" in their names.
_TABLE = {
    Layout(UNCOND_COND): """
        AltDiffusion AltDiffusionImg2Img AnimateDiff AnimateDiffControlNet AnimateDiffSDXL AnimateDiffSparseControlNet
        AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet AnyFlow Bria CogView3Plus EasyAnimate
        EasyAnimateControl EasyAnimateInpaint ErnieImage HiDreamImage HunyuanDiTControlNet I2VGenXL JoyImageEditPlus
        Kandinsky3 Kandinsky3Img2Img KandinskyV22Prior Kolors KolorsImg2Img LTX LTX2 LTX2Condition LTX2HDR
        LTX2ImageToVideo LTX2InContext LTXCondition LTXI2VLongMultiPrompt LTXImageToVideo Mochi PIA PRX PRXPixel Sana
        SanaControlNet SanaImageToVideo SanaVideo SanaWM StableAudio3 StableDiffusion StableDiffusionAdapter
        StableDiffusionControlNet StableDiffusionControlNetImg2Img StableDiffusionControlNetInpaint
        StableDiffusionDepth2Img StableDiffusionImg2Img StableDiffusionInpaint
        StableDiffusionLDM3D StableDiffusionXL StableDiffusionXLAdapter StableDiffusionXLControlNet
        StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetInpaint StableDiffusionXLControlNetUnion
        StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetUnionInpaint
        StableDiffusionXLGuidanceInterval StableDiffusionXLImg2Img StableDiffusionXLInpaint
    """,
    Layout(UNCOND_COND, extra=True): """
        StableDiffusion3 StableDiffusion3ControlNet StableDiffusion3ControlNetInpainting StableDiffusion3Img2Img
        StableDiffusion3Inpaint
    """,
    Layout(UNCOND_COND, variance="always"): """
        HunyuanDiT KandinskyV22 KandinskyV22Img2Img KandinskyV22Inpaint
    """,
    Layout(UNCOND_COND, on=BY_SCALE): """
        Allegro Amused AmusedImg2Img AmusedInpaint AudioLDM AudioLDM2 AuraFlow BlipDiffusion BlipDiffusionControlNet
        BriaFibo BriaFiboEdit CogVideoX CogVideoXFunControl CogVideoXImageToVideo CogVideoXVideoToVideo ConsisID
        CycleDiffusion KandinskyPrior KandinskyV22PriorEmb2Emb MusicLDM PaintByExample ShapE ShapEImg2Img StableAudio
        StableDiffusionControlNetXS StableDiffusionDiffEdit StableDiffusionGLIGEN StableDiffusionImageVariation
        StableDiffusionInpaintPipelineLegacy StableDiffusionLatentUpscale StableDiffusionModelEditing
        StableDiffusionSAG StableDiffusionUpscale StableDiffusionXLControlNetXS StableUnCLIP StableUnCLIPImg2Img
        TextToVideoSD TextToVideoZero TextToVideoZeroSDXL VersatileDiffusionDualGuided VersatileDiffusionImageVariation
        VersatileDiffusionTextToImage VideoToVideoSD VQDiffusion
    """,
    Layout(UNCOND_COND, on=BY_SCALE, variance="may"): "Latte PixArtAlpha PixArtSigma",
    Layout(UNCOND_COND, on=lambda pipe, call: call["guidance_scale"] != 1, variance="may"): "BoostAndSkip",
    Layout(UNCOND_COND, on=BY_SCALE, variance="always"): """
        IF IFImg2Img IFImg2ImgSuperResolution IFInpainting IFInpaintingSuperResolution IFSuperResolution Kandinsky
        KandinskyImg2Img KandinskyInpaint KandinskyV22Controlnet KandinskyV22ControlnetImg2Img
    """,
    Layout(UNCOND_COND, aside=lambda arguments: arguments["kv_cache_flag"]["is_cache_step"]): "AnyFlowFAR",
    Layout(UNCOND_COND, on=BY_SCALE, gradient=True): "StableDiffusionAttendAndExcite",
    Layout(UNCOND_COND, on=above_one("min_guidance_scale", "max_guidance_scale")): "StableVideoDiffusion",
    Layout(UNCOND_COND, on=lambda pipe, call: call["guidance_scale"] != 1.0): "LDMTextToImage",
    Layout(UNCOND_COND, on=above_one("decoder_guidance_scale")): "UnCLIPImageVariation",
    Layout(UNCOND_COND, on=above_one("prior_guidance_scale", "decoder_guidance_scale")): "UnCLIP",
    Layout(UNCOND_COND, "turns", BY_SCALE): "StableDiffusionPanorama",
    Layout(COND_UNCOND): "StableCascadeDecoder StableCascadePrior WuerstchenDecoder WuerstchenPrior",
    Layout(COND_UNCOND, partly=True): """
        ZImage ZImageControlNet ZImageControlNetInpaint ZImageImg2Img ZImageInpaint ZImageOmni
    """,
    Layout(COND_UNCOND, partly=True, extra=True): "AceStep",
    Layout(COND_UNCOND, on=BY_SCALE, variance="may"): "DiT DiTGuidanceInterval",
    Layout(COND_UNCOND, on=BY_SCALE, variance="three"): "Lumina",
    Layout(("cond", "image", "uncond")): "StableDiffusionInstructPix2Pix",
    Layout(
        ("cond", "image", "uncond"),
        on=lambda pipe, call: call["guidance_scale"] > 1 and call["image_guidance_scale"] >= 1,
    ): "StableDiffusionXLInstructPix2Pix",
    Layout(("uncond", "image", "cond"), on=lambda pipe, call: True, optional=("image", "image")): "DreamLite",
    Layout(
        ("cond", "uncond", "image"), on=lambda pipe, call: True, optional=("image", "input_images")
    ): "OmniGen",
    _PAG: """
        AnimateDiffPAG KolorsPAG SanaPAG StableDiffusion3PAG StableDiffusion3PAGImg2Img StableDiffusionControlNetPAG
        StableDiffusionControlNetPAGInpaint StableDiffusionPAG StableDiffusionPAGImg2Img StableDiffusionPAGInpaint
        StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img StableDiffusionXLPAG
        StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint
    """,
    replace(_PAG, variance="always"): "HunyuanDiTPAG",
    replace(_PAG, on=BY_SCALE, variance="may"): "PixArtSigmaPAG",
    _CALLS: """
        BriaFibo2 Chroma ChromaImg2Img ChromaInpaint ChronoEdit CogView4 CogView4Control Flux2Klein Flux2KleinInpaint
        GlmImage Helios HeliosPyramid HunyuanImage HunyuanImageRefiner HunyuanVideo15 HunyuanVideo15ImageToVideo
        JoyImageEdit Kandinsky5I2I Kandinsky5I2V Kandinsky5T2I Kandinsky5T2V Kandinsky6TI2VA LongCatAudioDiT
        LongCatImage LongCatImageEdit LucyEdit Lumina2 MotifVideo MotifVideoImage2Video NucleusMoEImage OvisImage
        SkyReelsV2 SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo
        SkyReelsV2DiffusionForcingVideoToVideo SkyReelsV2ImageToVideo Wan WanAnimate WanImageToVideo WanVACE
        WanVideoToVideo Cosmos3Omni
    """,
    _TRUE: """
        Flux FluxControlNet FluxImg2Img FluxInpaint FluxKontext FluxKontextInpaint HunyuanSkyreelsImageToVideo
        HunyuanVideo HunyuanVideoFramepack HunyuanVideoImageToVideo QwenImage QwenImageControlNet
        QwenImageControlNetInpaint QwenImageEdit QwenImageEditInpaint QwenImageEditPlus QwenImageImg2Img
        QwenImageInpaint QwenImageLayered
    """,
    replace(_TRUE, fills_cache=True): "QwenImage21",
    replace(_CALLS, on=lambda pipe, call: True, text_first=True): "Ideogram4",
    replace(_CALLS, every=True): "UniDiffuser",
    _PLUS_ONE: """
        Cosmos2TextToImage Cosmos2VideoToWorld Cosmos2_5_PredictBase Cosmos2_5_Transfer CosmosTextToWorld
        CosmosVideoToWorld Krea2
    """,
}  # fmt: skip


def _by_name(table: dict) -> dict[str, Any]:
    """The entry of each class; its name is written without "Pipeline" at the end."""
    named = {name: entry for entry, names in table.items() for name in names.split()}
    return {name if "Pipeline" in name else f"{name}Pipeline": entry for name, entry in named.items()}


LAYOUTS = _by_name(_TABLE)
# Pipelines of pipelines, each of which guides.
COMBINED = {
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22InpaintCombinedPipeline",
    "StableCascadeCombinedPipeline",
    "WuerstchenCombinedPipeline",
}
# Networks that are called with a timestep and not guided.
UNGUIDED_NETWORKS = {"super_res_first", "super_res_last"}
DISTILLED = "hands the guidance scale to its network, which is distilled: there is no unconditional prediction"
_REFUSED = {
    DISTILLED: """
        Flux2 FluxControl FluxControlImg2Img FluxControlInpaint FluxControlNetImg2Img FluxControlNetInpaint FluxFill
        LatentConsistencyModel LatentConsistencyModelImg2Img SanaSprint SanaSprintImg2Img DreamLiteMobile VisualCloze
        VisualClozeGeneration
    """,
    "guides its edits one by one": """
        SemanticStableDiffusion LEditsPPPipelineStableDiffusionXL LEditsPPPipelineStableDiffusion
    """,
    "has safety guidance, a prediction of its own": "StableDiffusionPipelineSafe",
    "takes its two predictions from halves of different batches": "StableDiffusionGLIGENTextImage",
    "takes the gradient of the doubled batch": "StableDiffusionPix2PixZero",
    "runs several steps in one batch": "StableDiffusionParadigms",
    "has its networks in ONNX, which are no torch modules": """
        OnnxStableDiffusion OnnxStableDiffusionImg2Img OnnxStableDiffusionInpaint
        OnnxStableDiffusionInpaintPipelineLegacy OnnxStableDiffusionUpscale StableDiffusionOnnx
    """,
}
REFUSED = _by_name(_REFUSED)
# Calls that are refused, of classes that are not.
REFUSED_CALLS: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "StableDiffusionSAGPipeline": (
        "calls its network again with the unconditional part of what it predicted; give sag_scale=0",
        lambda call: call["sag_scale"] > 0,
    ),
    "AceStepPipeline": (
        "guides in an interval of its own; leave cfg_interval_start at 0",
        lambda call: call["cfg_interval_start"] > 0,
    ),
}

# Where the code may come from that the table describes, and what diffusers wraps it in.
_ROOTS = [os.path.dirname(inspect.getfile(module)) + os.sep for module in (diffusers, torch)]
_ROOTS += [os.path.dirname(os.path.abspath(__file__)) + os.sep, inspect.getfile(contextlib)]


def table_class(cls: type) -> type | None:
    """The class of the table, diffusers' own or this package's, whose code a class runs; None if there is none.

    A subclass that overrides a method of it, but for `__init__`, and a class that was patched have code of their own.
    """
    for base in cls.__mro__:
        known = base.__name__ in LAYOUTS or base.__name__ in COMBINED or base.__name__ in REFUSED
        if known and _is_own(base):
            names = {name for one in base.__mro__ if one not in DiffusionPipeline.__mro__ for name in vars(one)}
            names = {name for name in names if not name.startswith("__") or name == "__call__"}
            same = all(inspect.getattr_static(cls, name) is inspect.getattr_static(base, name) for name in names)
            return base if same else None
    return None


def _is_own(base: type) -> bool:
    """Whether the functions of a class were written in diffusers' files, or in this folder's."""
    functions = [value for one in base.__mro__ if issubclass(one, DiffusionPipeline) for value in vars(one).values()]
    layers = [function for function in functions if inspect.isfunction(function)]
    for function in layers:
        if (inner := getattr(function, "__wrapped__", None)) is not None:
            layers.append(inner)
    files = {os.path.abspath(function.__code__.co_filename) for function in layers}
    return all(any(file.startswith(root) for root in _ROOTS) or "huggingface_hub" in file for file in files)
