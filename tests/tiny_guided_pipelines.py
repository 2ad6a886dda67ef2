"""Stock pipelines with random weights and a few thousand parameters, one of every family that guides, for tests.

`CASES` holds a builder for each; it returns a `Case`. Those of `ONE_BY_ONE` have a shape of their own.
"""

from tiny_guided import unets, transformers, calls  # noqa: F401, I001  each puts its own into CASES, in this order
from tiny_guided.calls import TWO
from tiny_guided.case import BATCH, CASES, STEPS, TOKENS, Case, _fill, embeds, flow, masks, prompts
from tiny_guided.one_by_one import ONE_BY_ONE, any_flow_far, kandinsky_2_2_combined, qwen_image_2_1, text_to_video_zero

__all__ = [
    "BATCH", "CASES", "ONE_BY_ONE", "STEPS", "TOKENS", "TWO", "Case", "_fill", "any_flow_far", "embeds", "flow",
    "kandinsky_2_2_combined", "masks", "prompts", "qwen_image_2_1", "text_to_video_zero",
]  # fmt: skip
