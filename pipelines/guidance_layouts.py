"""How pipelines guide: a table of diffusers' own, and a proposal, read from its source, for a class that is not in it.

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

import ast
import contextlib
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
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

    parts: in order of the batch, or of the calls. how: "batch", "turns" or "calls". on: whether a call guides, from
        the pipeline and the arguments of its call; called at each step.
    optional: a part and the name of the argument, or attribute, without which it is left out.
    extra: after the doubled batch, the network is called again without doubling in one step. gradient: so it is where
        gradients are taken. partly: so it is in steps that the pipeline leaves unguided itself, after a guided one.
    every: all calls but the first of a step are unconditional.
    plus_one: the weight w of a call means c + w (c - u), not u + w (c - u).
    variance: the second half of the channels is no prediction to guide: always, or where it is there ("may"); Lumina
        guides "three" channels.
    text_first: the conditional prediction has the text's tokens in front of the image's.
    fills_cache: the first unconditional call fills a cache that later ones read. aside: which calls, by their
        arguments, fill a cache of all rows and predict nothing.
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
    """A layout as users write it. Raises ValueError for anything else."""
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
        StableDiffusionUpscale StableDiffusionXLControlNetXS StableUnCLIP StableUnCLIPImg2Img TextToVideoSD
        TextToVideoZero TextToVideoZeroSDXL VersatileDiffusionDualGuided VersatileDiffusionImageVariation
        VersatileDiffusionTextToImage VideoToVideoSD VQDiffusion
    """,
    Layout(UNCOND_COND, on=BY_SCALE, variance="may"): "Latte PixArtAlpha PixArtSigma",
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
LAYOUTS["BoostAndSkipPipeline"] = Layout(
    UNCOND_COND, on=lambda pipe, call: call["guidance_scale"] != 1, variance="may"
)  # this package's
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
LAYOUTS["StableDiffusionSAGPipeline"] = Layout(UNCOND_COND, on=BY_SCALE)


# From here on: a class that is not in the table.

UNCONDITIONAL = re.compile(r"uncond|(^|_)(neg|negative|null)(_|\d|$)", re.IGNORECASE)
# Of a split in three, the part with the whole condition: (text, image, uncond), (cond, uncond, img_cond).
WHOLE_CONDITION = re.compile(r"text|^cond$|[^g]_cond$", re.IGNORECASE)
HOW_TO_SAY = (
    'say how it guides: layout="uncond, cond" for one batch whose first half is unconditional, "cond, uncond" for the'
    ' other order, "cond; uncond" for two calls'
)
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


def propose(cls: type, networks: list[str]) -> Layout | None:
    """The layout that the source of a class shows; None for a class that is not made to guide.

    networks: names of the components that are called with a timestep. The class' `__call__`, and the methods that it
    uses, are parsed; nothing is run. Raises ValueError if the source cannot be read or is ambiguous.
    """
    source = _Source(cls, [name for name in networks if "control" not in name.lower()])
    if problem := source.problem():
        raise ValueError(
            f"{cls.__name__} is not among the pipelines whose guidance is known, and {problem}; {HOW_TO_SAY}"
        )
    if source.splits:
        return source.splits[0][0]
    if source.unconditional:
        return Layout(CALLS, "calls")
    return None


def hands_on_only(cls: type, networks: list[str]) -> bool:
    """Whether the source of a class shows that its predictions go to its scheduler and are used nowhere else."""
    try:
        source = _Source(cls, [name for name in networks if "control" not in name.lower()])
    except ValueError:
        return False
    found = source.splits or source.unclear or source.conditional or source.unconditional
    return bool(found) and not source.leaks


class _Source:
    """What the methods of a class do with the output of its networks.

    splits: (layout, statement) of each split into named parts. unclear: statements that split it in another way.
    conditional, unconditional: (function, statement) of each call of a network whose output is not split.
    """

    def __init__(self, cls: type, networks: list[str]):
        self.cls, self.networks = cls, {f"self.{name}" for name in networks}
        self.functions = {name: _tree(cls, function) for name, function in _methods(cls).items()}
        self.splits: list[tuple[Layout, ast.stmt]] = []
        self.unclear: list[ast.stmt] = []
        self.leaks: list[ast.stmt] = []
        self.conditional: list[tuple[str, ast.stmt]] = []
        self.unconditional: list[tuple[str, ast.stmt]] = []
        self.combining: set[str] = set()  # methods that make both predictions themselves
        waiting = True
        while waiting:  # a method that returns what a network predicted is called like a network
            self.splits, self.unclear, self.conditional, self.unconditional, self.leaks = [], [], [], [], []
            found = {f"self.{name}" for name in self.functions if self._read(name)}
            waiting = not found <= self.networks
            self.networks |= found

    def problem(self) -> str:
        """Why nothing can be proposed; empty if something can, or if nothing guides."""
        if self.unclear:
            return f"its source splits a prediction in unclear parts: `{ast.unparse(self.unclear[0])}`"
        if self.leaks and (self.splits or self.unconditional):
            return (
                "its source uses its predictions besides handing them to scheduler.step:"
                f" `{ast.unparse(self.leaks[0])[:120]}`"
            )
        layouts = sorted({str(layout) for layout, _ in self.splits})
        if len(layouts) > 1:
            return f"its source shows several layouts: {layouts}"
        if layouts and self.unconditional:
            return (
                f"its source splits a prediction ({layouts[0]}) and calls the network once more without the condition:"
                f" `{ast.unparse(self.unconditional[0][1])[:120]}`"
            )
        for function, statement in self.unconditional:
            earlier = [one for name, one in self.conditional if name == function and one.lineno < statement.lineno]
            if not layouts and not earlier:
                return (
                    "its source calls the network without the condition before it calls it with:"
                    f" `{ast.unparse(statement)[:120]}`"
                )
        if not (self.splits or self.unconditional) and _may_guide(self.cls):
            return "its source shows no prediction that is called unconditional or negative"
        return ""

    def _read(self, name: str) -> bool:
        """Read the network calls of a method; returns whether it hands on what a network predicted."""
        function, returned = self.functions[name], False
        statements = _statements(function)
        aliases = {name for node in statements if self._is_network(node.value) for name in _targets(node)}
        for i, node in enumerate(statements):
            if node.value is None or not _calls(node.value) & (self.networks | aliases):
                continue
            split, hands_on = self._follow(statements, i, _targets(node), self.networks | aliases)
            self.leaks += _leaks(function, statements[i:])
            returned = returned or (hands_on and name != "__call__")
            if split:
                self.combining.add(f"self.{name}")
            elif not (hands_on and isinstance(node, ast.Return)) and not _calls(node.value) & self.combining:
                kind = self.unconditional if any(map(UNCONDITIONAL.search, _words(node))) else self.conditional
                kind.append((name, node))
        if {name} <= {function for function, _ in self.unconditional}:
            self.combining.add(f"self.{name}")
        return returned

    def _is_network(self, value: ast.expr | None) -> bool:
        """Whether an expression is a network, or one of several, and not a call."""
        if isinstance(value, ast.IfExp):
            return self._is_network(value.body) and self._is_network(value.orelse)
        return value is not None and ast.unparse(value) in self.networks

    def _follow(self, statements: list, start: int, reached: set[str], networks: set[str]) -> tuple[bool, bool]:
        """Follow a prediction, from the statement that has it; returns whether it is split, and whether returned."""
        split, returned = False, False
        for i, node in enumerate(statements[start:], start):
            if node.value is None or (i > start and not (_names(node.value) & reached)):
                continue
            if i > start and _calls(node.value) & networks:
                continue  # a network that takes it in
            layout = _split_of(node, statements[i + 1 : i + 2])
            if layout is not None:
                split = True
                self.unclear += [node] if layout.parts == () else []
                self.splits += [(layout, node)] if layout.parts else []
                continue
            returned = returned or isinstance(node, ast.Return)
            split = self._helpers(node, reached) or split
            reached = reached | _targets(node)
        return split, returned

    def _helpers(self, node: ast.stmt, reached: set[str]) -> bool:
        """Methods `self.f(x, ...)` that a prediction is handed to; returns whether one splits it."""
        split = False
        for call in (part for part in ast.walk(node.value) if isinstance(part, ast.Call)):
            name = ast.unparse(call.func).removeprefix("self.")
            if name not in self.functions or f"self.{name}" in self.networks:
                continue
            parameters = [argument.arg for argument in self.functions[name].args.args]
            given = dict(zip(parameters[1:], call.args, strict=False))
            given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            handed = {key for key, value in given.items() if _names(value) & reached or _calls(value) & self.networks}
            if handed:
                inside = ast.Assign([ast.Name(key) for key in sorted(handed)], ast.Constant(None))
                inner = [inside, *_statements(self.functions[name])]
                split = self._follow(inner, 0, handed, self.networks)[0] or split
                self.leaks += _leaks(self.functions[name], inner)
        return split


def _leaks(function: ast.FunctionDef, statements: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that keep what a network predicted, in the first of them, or use it besides the scheduler's step."""
    ends = (ast.Continue, ast.Return, ast.Break, ast.Raise)
    leaving = [node for node in ast.walk(function) if isinstance(node, ast.If) and isinstance(node.body[-1], ends)]
    elsewhere = {part for node in leaving for one in node.body for part in ast.walk(one)}
    reached, stepped, found = _targets(statements[0]), False, []
    made: set[str] = set()  # names that got their value after the network was called
    for node in statements:
        if node.value is None:
            continue
        made |= _targets(node)
        if node is not statements[0] and not _names(node.value) & reached:
            continue
        handed = [_first_argument(call) for call in ast.walk(node.value) if _is_step(call)]
        if handed:
            inside = {part for one in handed for part in ast.walk(one)}
            names = {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name) and part not in inside}
            found += [node] if names & reached and node is not statements[0] else []
            if node is statements[0]:
                return []
            stepped = stepped or node not in elsewhere
            continue
        kept = isinstance(node, ast.Assign) and any(
            not isinstance(part, ast.Name | ast.Tuple) for part in node.targets
        )
        if _collects(node) & made:  # a list of this step
            reached = reached | _collects(node)
            continue
        found += [node] if kept or stepped or _writes(node) else []
        reached = reached | _targets(node)
    return found


def _collects(node: ast.stmt) -> set[str]:
    """The list of `kept.append(x)`."""
    call = node.value
    plain = isinstance(node, ast.Expr) and isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
    appended = plain and call.func.attr == "append" and isinstance(call.func.value, ast.Name)
    return {call.func.value.id} if appended else set()


def _writes(node: ast.stmt) -> bool:
    """Whether a statement hands what it uses to a call for nothing, as `kept.append(x)`, or writes `out=`."""
    calls = [part for part in ast.walk(node.value) if isinstance(part, ast.Call)]
    if any(keyword.arg == "out" for call in calls for keyword in call.keywords):
        return True
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    in_place = isinstance(function, ast.Attribute) and function.attr.endswith("_")
    return not in_place and ast.unparse(function).split(".")[0] not in ("print", "logger", "logging", "warnings")


def _is_step(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step"


def _first_argument(call: ast.Call) -> ast.expr:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "model_output"]
    return (*call.args, *named, call.func)[0]


def _may_guide(cls: type) -> bool:
    """Whether the arguments of a call speak of guidance, or do not say what they are."""
    parameters = inspect.signature(cls.__call__).parameters.values()
    named = any(re.search(r"guid|cfg|scale|weight", parameter.name) for parameter in parameters)
    return named or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _methods(cls: type) -> dict[str, Callable]:
    """`__call__` and the methods that it uses, directly or not, but for those that all pipelines have."""
    found, waiting = {}, ["__call__"]
    while waiting:
        name = waiting.pop()
        method = inspect.getattr_static(cls, name, None)
        method = method.__func__ if isinstance(method, staticmethod | classmethod) else method
        if (
            name in found
            or (hasattr(DiffusionPipeline, name) and name != "__call__")
            or not inspect.isfunction(method)
        ):
            continue
        found[name] = inspect.unwrap(method)
        waiting += [used for used in _code_names(found[name].__code__) if used not in found]
    return found


def _code_names(code) -> set[str]:
    nested = (one for one in code.co_consts if inspect.iscode(one))
    return set(code.co_names).union(*map(_code_names, nested))


def _tree(cls: type, function: Callable) -> ast.FunctionDef:
    """The syntax tree of a function. Raises ValueError if its source is not there, or not what was compiled."""
    name = f"{cls.__name__}.{function.__name__}"
    try:
        text = inspect.getsource(function)
        body = ast.parse(f"class _:\n{text}" if text[0].isspace() else text)
        if text[0].isspace():
            body = body.body[0]
        tree = body.body[0]
        codes = list(_codes(compile(f"class _:\n{text}" if text[0].isspace() else text, "<source>", "exec", 0, True)))
    except (OSError, TypeError, SyntaxError, ValueError) as error:
        raise ValueError(f"the source of {name} cannot be read ({error}); {HOW_TO_SAY}") from error
    if not isinstance(tree, ast.FunctionDef) or not any(_same_code(code, function.__code__) for code in codes):
        raise ValueError(f"the source of {name} is not the code that runs: it was edited or patched; {HOW_TO_SAY}")
    return tree


def _codes(code) -> Iterator:
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield constant
            yield from _codes(constant)


def _same_code(source, code) -> bool:
    """Whether a function's code is that of its source, but for where it stands and what its free names refer to."""
    names = [{*one.co_names, *one.co_freevars, *one.co_cellvars} - {"__class__"} for one in (source, code)]
    constants = [[repr(value) for value in one.co_consts if not inspect.iscode(value)] for one in (source, code)]
    if any(name.startswith("@") for name in names[1]):  # pytest has put more into its asserts
        names[1], constants[1] = names[1] & names[0], constants[0]
    local = [[name for name in one.co_varnames if not name.startswith("@")] for one in (source, code)]
    same = (source.co_name, source.co_argcount) == (code.co_name, code.co_argcount)
    return same and all(one == other for one, other in (names, constants, local))


def _statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The simple statements of a function that have a value, in source order."""
    kinds = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)
    found = (node for node in ast.walk(function) if isinstance(node, kinds))
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _targets(statement: ast.stmt) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {name for target in targets if target is not None for name in _names(target)}


def _calls(node: ast.AST) -> set[str]:
    return {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}


def _words(statement: ast.stmt) -> set[str]:
    """Names and attributes in a statement, but for those in a joined batch, which holds both predictions."""
    joins = [part for part in ast.walk(statement) if isinstance(part, ast.Call)]
    joined = {
        node for call in joins if ast.unparse(call.func) in ("torch.cat", "torch.stack") for node in ast.walk(call)
    }
    nodes = [node for node in ast.walk(statement) if node not in joined]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _split_of(node: ast.stmt, following: list[ast.stmt]) -> Layout | None:
    """The layout of a statement that splits rows; one without parts if it is unclear; None for other statements."""
    for names, how in (_chunk_names(node), _slice_names(node, following), _turn_names(node)):
        if names is not None:
            return _layout_of_names(names, how)
    return None


def _layout_of_names(names: list[str], how: str) -> Layout:
    unconditional = [name for name in names if UNCONDITIONAL.search(name)]
    if len(names) not in (2, 3) or len(unconditional) != 1 or len(set(names)) < len(names) or "_" in names:
        return Layout((), how)
    parts = dict.fromkeys(unconditional, "uncond")
    rest = [name for name in names if name not in parts]
    parts |= {name: "perturbed" for name in rest if re.search("perturb", name, re.IGNORECASE)}
    rest = [name for name in names if name not in parts]
    whole = rest if len(rest) == 1 else [name for name in rest if WHOLE_CONDITION.search(name)]
    if len(whole) != 1:
        return Layout((), how)
    return Layout(tuple(parts.get(name, "cond" if name in whole else "image") for name in names), how)


def _chunk_names(node: ast.stmt) -> tuple[list[str] | None, str]:
    """Names of `a, b = x.chunk(2)` and `a, b = torch.split(x, n)`; what else is split by rows has no names."""
    value = node.value
    splits = [
        call
        for call in ast.walk(value)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("chunk", "split", "tensor_split", "unbind")
    ]
    for call in splits:
        position = 2 if ast.unparse(call.func.value) == "torch" else 1
        dims = [keyword.value for keyword in call.keywords if keyword.arg == "dim"]
        dims = dims or call.args[position : position + 1]
        if dims and ast.unparse(dims[0]) != "0":
            continue
        sizes = call.args[position - 1 : position]
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if call is not value or not isinstance(target, ast.Tuple) or (sizes and isinstance(sizes[0], ast.List)):
            return [], "batch"
        names = [ast.unparse(element) for element in target.elts]
        count = ast.unparse(sizes[0]) if call.func.attr == "chunk" and sizes else ""
        return ([] if (count.isdigit() and int(count) != len(names)) or "*" in "".join(names) else names), "batch"
    return None, ""


def _slice_names(node: ast.stmt, following: list[ast.stmt]) -> tuple[list[str] | None, str]:
    """Names of `a, b = x[:n], x[n:]`, or of the two as statements of their own."""
    pairs = []
    for one in (node, *following):
        target = one.targets[0] if isinstance(one, ast.Assign) and len(one.targets) == 1 else None
        if isinstance(target, ast.Tuple) and isinstance(one.value, ast.Tuple):
            pairs += zip(target.elts, one.value.elts, strict=False)
        elif target is not None:
            pairs.append((target, one.value))
    rows = [
        (ast.unparse(target), ast.unparse(value.value), value.slice)
        for target, value in pairs[:2]
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Slice) and value.slice.step is None
    ]
    if len(rows) == 2 and rows[0][1] == rows[1][1]:
        (first, _, low), (second, _, high) = rows
        ends = [low.upper, high.lower]
        if (
            low.lower is None
            and high.upper is None
            and None not in ends
            and ast.unparse(ends[0]) == ast.unparse(ends[1])
        ):
            return ([] if isinstance(ends[0], ast.Constant) else [first, second]), "batch"
    return None, ""


def _turn_names(node: ast.stmt) -> tuple[list[str] | None, str]:
    """Names of `a, b = x[::2], x[1::2]`."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if not (isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)):
        return None, ""
    count, slices = len(node.value.elts), [ast.unparse(part) for part in node.value.elts]
    turns = all(text.endswith((f"[{i or ''}::{count}]", f"[{i}::{count}]")) for i, text in enumerate(slices))
    turns = turns and count == len(target.elts)
    return ([ast.unparse(element) for element in target.elts], "turns") if turns else (None, "")
