"""DiT with guidance in an interval of noise levels, or of steps, as an argument of the call.

Kynkäänniemi et al., NeurIPS 2024, arXiv 2404.07724. The sigmas that the paper gives for DiT-XL/2, such as
(0.34, 1.02], belong to a cosine schedule. On DiT's own linear schedule the steps that it guides, about 125 to 198 of
250, lie at sigma 3.39 to 0.75: to do what the paper did, give `guided_steps`; `guidance_interval` is in the sigmas of
the schedule that is really used.
"""

import torch
from diffusers import DiTPipeline, ImagePipelineOutput

# diffusers copies only the files that this one itself imports
from .applied_guiders import GuiderOfCall  # noqa: F401
from .call_arguments import checked_arguments  # noqa: F401
from .guidance_interval import GuidanceInterval, GuidanceReport
from .guidance_layouts import Layout  # noqa: F401
from .guided_run import Run  # noqa: F401
from .guided_stage import Stage  # noqa: F401
from .interceptors import RUN  # noqa: F401
from .interval import Interval  # noqa: F401
from .layout_proof import Fit  # noqa: F401
from .layout_source import propose  # noqa: F401
from .rows import Rows  # noqa: F401


class DiTGuidanceIntervalPipeline(DiTPipeline):
    """`DiTPipeline` whose call takes `guidance_interval=(sigma_lo, sigma_hi)` or `guided_steps=(first, last)`.

    pipe = DiffusionPipeline.from_pretrained(
        "facebook/DiT-XL-2-256", custom_pipeline=file, trust_remote_code=True
    )
    pipe(class_labels=[207], num_inference_steps=250, guidance_scale=2.5, guided_steps=(125, 198))
    """

    @property
    def guidance_report(self) -> GuidanceReport | None:
        """What the interval did in the last call that had one."""
        return getattr(self, "_guidance_report", None)

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] | None = None,
        guided_steps: tuple[int, int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images as `DiTPipeline` does, guided in an interval.

        Args:
            class_labels: as of `DiTPipeline`.
            guidance_scale: as of `DiTPipeline`.
            generator: as of `DiTPipeline`.
            num_inference_steps: as of `DiTPipeline`.
            output_type: as of `DiTPipeline`.
            return_dict: as of `DiTPipeline`.
            guidance_interval: guidance is on where sigma_lo < sigma <= sigma_hi at the start of a step; sigma is
                sqrt((1 - alpha_bar) / alpha_bar) of the scheduler.
            guided_steps: in its place, the first and the last guided step, both inclusive, from 0. With neither, the
                stock pipeline.

        Raises:
            ValueError: if both are given, or out of range.
        """
        stock = DiTPipeline.__call__
        arguments = (class_labels, guidance_scale, generator, num_inference_steps, output_type, return_dict)
        if guidance_interval is None and guided_steps is None:
            return stock(self, *arguments)
        interval = GuidanceInterval(self, guidance_interval=guidance_interval, guided_steps=guided_steps)
        output = interval.run(stock, self, *arguments)
        self._guidance_report = interval.report
        return output
