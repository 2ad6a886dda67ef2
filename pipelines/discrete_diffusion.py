"""Text, token sequences and images of integer levels by discrete diffusion in continuous time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from transformers import PreTrainedTokenizerBase

from .call_arguments import checked_arguments
from .pixel_space import FiniteWatch, as_output, check_callback, check_count, checked_generator, is_integer

LONGEST = 65_536  # tokens, that a config is believed to mean
IMAGE_TYPES = ("pil", "np", "pt")


@dataclass
class DiscreteDiffusionPipelineOutput(BaseOutput):
    """What was asked for comes first, as in the tuple of `return_dict=False`.

    Attributes:
        images: PIL images or an array.
        text: a string a sample; each None where not asked for.
        tokens: (batch, length) int64.
    """

    images: list | np.ndarray | torch.Tensor | None = None
    text: list[str] | None = None
    tokens: torch.Tensor | None = None


class DiscreteDiffusionPipeline(DiffusionPipeline):
    """Sampling from a network on tokens with a `CTMCScheduler`: SEDD, CountDown, tauLDR (2310.16834, 2205.14987).

    Args:
        model: called as model(tokens, time) with tokens (batch, length) int64 and time (batch,), what the scheduler's
            `model_time` gives; returns (batch, length, vocab_size) of the scheduler's prediction type. From its config
            are read, if there: `sequence_length`, and `shape` of images.
        scheduler: a `CTMCScheduler`.
        tokenizer: of text models; its tokens come first in the vocabulary, the mask after them.
    """

    model_cpu_offload_seq = "model"
    _optional_components = ["tokenizer"]  # noqa: RUF012  diffusers' name and form
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012

    def __init__(self, model: ModelMixin, scheduler: SchedulerMixin, tokenizer: PreTrainedTokenizerBase | None = None):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler, tokenizer=tokenizer)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current or last call, the final denoising counted, corrector steps not."""
        return self._num_timesteps

    @checked_arguments
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        suffix: str | list[str] | None = None,
        tokens: torch.Tensor | np.ndarray | None = None,
        given: torch.Tensor | np.ndarray | None = None,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        num_inference_steps: int | None = 128,
        timesteps: list[float] | None = None,
        sampler: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["tokens"],  # noqa: B006  diffusers' signature
    ) -> DiscreteDiffusionPipelineOutput | tuple:
        """Sample, around what is given.

        Args:
            prompt: text at the start, a string or one a sample; needs a tokenizer.
            suffix: text at the end, likewise.
            tokens: instead of text, tokens (length,) or (batch, length), of which some are kept.
            given: where `tokens` are to be kept, a boolean tensor of the same shape. The network sees given tokens in
                every step and they come out as they went in.
            batch_size: number of samples; by default one for each prompt or row of tokens.
            sequence_length: by default that of `tokens`, or what the model's config says.
            num_inference_steps: steps of the schedule; the network runs once more for the final denoising (not with
                gillespie at the end of time, twice a step with theta_trapezoidal), and once for each corrector step.
            timesteps: instead, all edges, from 1 on decreasing in (0, 1].
            sampler: one of `CTMCScheduler`, such as "tweedie", for this call.
            generator: one, or one a sample, which makes a sample independent of its batch.
            output_type: "text", "tokens", or for models of images "pil", "np" (batch, height, width, channels) or "pt"
                (batch, channels, height, width), both in [0, 1]; None is "text" with a tokenizer, "pil" for images.
            return_dict: whether to return a `DiscreteDiffusionPipelineOutput` or a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, {"tokens": tokens}) after each step; what it
                returns under "tokens" goes on from there.
            callback_on_step_end_tensor_inputs: which tensors the callback sees; there is "tokens" alone.

        Raises:
            ValueError: for inputs that contradict each other or the components.
            NotFiniteError: a ValueError, where the network returns NaN, infinity, or a row without any possible token,
                with the step and the sample.
        """
        scheduler = self._scheduler(sampler)
        output_type = self._output_type(output_type)
        check_callback(self, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        fixed, given = self._given_tokens(prompt, suffix, tokens, given, batch_size, sequence_length, scheduler)
        fixed, given = fixed.to(device), given.to(device)
        generator = checked_generator(generator, len(fixed))
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            scheduler.set_timesteps(timesteps=timesteps, device=device)
            check_start(scheduler)
        self._num_timesteps = len(scheduler.timesteps)
        watch = FiniteWatch(self._num_timesteps)

        sample = torch.where(given, fixed, scheduler.sample_prior(tuple(fixed.shape), generator, device))
        times = scheduler.timesteps.tolist()  # all that is read of the schedule
        clock = times[0]
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                clock = clock if scheduler.sampler.counts_tokens else times[i]
                sample, clock = self._step(scheduler, watch, i, clock, sample, generator)
                sample = torch.where(given, fixed, sample)
                for time, size in scheduler.corrections(i):
                    corrected = self._correct(scheduler, watch, i, time, size, sample, generator)
                    sample = torch.where(given, fixed, corrected)
                if callback_on_step_end is not None:
                    kwargs = dict.fromkeys(callback_on_step_end_tensor_inputs, sample)
                    replaced = callback_on_step_end(self, i, t, kwargs).get("tokens", sample)
                    sample = torch.where(given, fixed, replaced)
                progress_bar.update()

        watch.finish()
        self._check_decoded(scheduler, sample)
        output = self._to_output(sample, output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (getattr(output, "images" if output_type in IMAGE_TYPES else output_type),)

    # One step; the network's output, the largest tensor, lives no longer than these functions

    def _step(self, scheduler, watch, index: int, clock, sample, generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens after step `index` and the time that they are at, (batch,), which gillespie keeps for each sample."""
        output = self._model_output(scheduler, watch, index, clock, sample)
        options = {}
        if scheduler.sampler.counts_tokens:
            options["num_decode"] = scheduler.num_decode_on_device(sample, index)
        result = scheduler.step(output, clock, sample, generator, **options)
        return result.prev_sample, result.prev_timestep

    def _correct(self, scheduler, watch, index: int, time: float, size: float, sample, generator) -> torch.Tensor:
        output = self._model_output(scheduler, watch, index, time, sample)
        return scheduler.step_correct(output, time, sample, size, generator).prev_sample

    def _model_output(self, scheduler, watch: FiniteWatch, index: int, time, sample: torch.Tensor) -> torch.Tensor:
        output = self.model(sample, scheduler.model_time(time, len(sample), sample.device))
        output = output if isinstance(output, torch.Tensor) else output[0]
        watch.see("the network's output", scheduler.reverse.largest(output), index)
        return output

    @staticmethod
    def _check_decoded(scheduler, sample: torch.Tensor) -> None:
        if scheduler.mask_token_id is not None and (masked := (sample == scheduler.mask_token_id).sum(1)).any():
            first = int(masked.nonzero()[0])
            raise ValueError(
                f"sample {first} of the batch still holds {int(masked[first])} masks after the last step; the network"
                " gave no tokens for them, or the callback put them there"
            )

    # Inputs

    def _scheduler(self, sampler: str | None) -> SchedulerMixin:
        scheduler = self.scheduler
        missing = [name for name in ("model_time", "step_correct", "sample_prior") if not hasattr(scheduler, name)]
        if missing:
            raise ValueError(
                f"DiscreteDiffusionPipeline needs a CTMCScheduler, got {type(scheduler).__name__} without"
                f" {', '.join(missing)}"
            )
        if sampler is None or sampler == scheduler.config.sampler:
            return scheduler
        return type(scheduler).from_config(scheduler.config, sampler=sampler)

    def _output_type(self, output_type: str | None) -> str:
        has_shape = self._model_config("shape") is not None
        if output_type is None:
            return "text" if self.tokenizer is not None else "pil" if has_shape else "tokens"
        if output_type not in ("text", "tokens", *IMAGE_TYPES):
            raise ValueError(f'output_type must be "text", "tokens", "pil", "np" or "pt", got {output_type!r}')
        if output_type == "text" and self.tokenizer is None:
            raise ValueError('output_type="text" needs a tokenizer; build the pipeline with one or use "tokens"')
        if output_type in IMAGE_TYPES and not has_shape:
            raise ValueError(
                f'output_type="{output_type}": {type(self.model).__name__} has no image shape; use "tokens"'
            )
        return output_type

    def _model_config(self, name: str):
        return getattr(self.model, "config", {}).get(name)

    def _given_tokens(self, prompt, suffix, tokens, given, batch_size, sequence_length, scheduler):
        """Tokens (batch, length) int64 and where they are given, (batch, length) bool."""
        if (tokens is None) != (given is None):
            raise ValueError("tokens and given belong together: which tokens, and where they are kept; pass both")
        if tokens is not None:
            if prompt is not None or suffix is not None:
                raise ValueError("tokens and prompt or suffix exclude each other; pass one of the two")
            tokens, given = self._token_rows(tokens, given, sequence_length, scheduler)
        else:
            length = self._length(sequence_length)
            rows = _zip_texts(prompt, suffix)
            tokens = torch.zeros(len(rows), length, dtype=torch.int64)
            given = torch.zeros(len(rows), length, dtype=torch.bool)
            for row, mask, (start, end) in zip(tokens, given, rows, strict=True):
                self._write_texts(row, mask, start, end)
        if batch_size is not None:
            check_count("batch_size", batch_size)
            if len(tokens) not in (1, batch_size):
                raise ValueError(f"batch_size={batch_size}, but {len(tokens)} prompts or rows of tokens are given")
            tokens, given = tokens.expand(batch_size, -1), given.expand(batch_size, -1)
        return tokens, given

    def _length(self, sequence_length: int | None) -> int:
        if sequence_length is None:
            shape = self._model_config("shape")
            known = self._model_config("sequence_length") if shape is None else math.prod(shape)
            if known is None:
                raise ValueError("the model's config has no sequence_length; pass sequence_length=")
            if not is_integer(known) or not 1 <= known <= LONGEST:
                raise ValueError(
                    f"the model's config has sequence_length={known!r}, which must be an integer in [1, {LONGEST}];"
                    " pass sequence_length= if it is meant"
                )
            return known
        check_count("sequence_length", sequence_length)
        return sequence_length

    def _token_rows(self, tokens, given, sequence_length, scheduler):
        tokens, given = torch.as_tensor(tokens).cpu(), torch.as_tensor(given).cpu()
        if tokens.ndim not in (1, 2) or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers (length,) or (batch, length), got {tuple(tokens.shape)}")
        if given.dtype != torch.bool or given.shape not in (tokens.shape, tokens.shape[-1:]):
            raise ValueError(
                f"given must be boolean and of the shape of tokens, got {given.dtype} {tuple(given.shape)}"
            )
        if sequence_length not in (None, tokens.shape[-1]):
            raise ValueError(f"sequence_length={sequence_length}, but tokens have the length {tokens.shape[-1]}")
        tokens = tokens.reshape(-1, tokens.shape[-1]).long()
        given = given.expand(tokens.shape)
        real = scheduler.kernel.num_real_tokens
        outside = given & ((tokens < 0) | (tokens >= real))
        if outside.any():
            raise ValueError(f"given tokens must be in [0, {real}), got {tokens[outside].unique().tolist()}")
        return tokens, given

    def _write_texts(self, row: torch.Tensor, mask: torch.Tensor, start: str | None, end: str | None) -> None:
        """Put the tokens of two texts at the ends of a row (length,) and note where."""
        if (start or end) and self.tokenizer is None:
            raise ValueError(
                "prompt and suffix need a tokenizer; build the pipeline with one, or pass tokens and given"
            )
        # the sequence goes on beside a text, where [CLS] or [SEP] would begin or end it
        first, last = (
            self.tokenizer(text, add_special_tokens=False).input_ids if text else [] for text in (start, end)
        )
        if len(first) + len(last) > len(row):
            raise ValueError(
                f"prompt and suffix are {len(first) + len(last)} tokens long, the sequence is {len(row)}; shorten them"
            )
        for place, ids in ((slice(0, len(first)), first), (slice(len(row) - len(last), len(row)), last)):
            row[place] = torch.tensor(ids, dtype=torch.int64)
            mask[place] = True

    # Output

    def _to_output(self, sample: torch.Tensor, output_type: str) -> DiscreteDiffusionPipelineOutput:
        if output_type == "text":
            return DiscreteDiffusionPipelineOutput(tokens=sample, text=self.tokenizer.batch_decode(sample))
        if output_type in IMAGE_TYPES:
            return DiscreteDiffusionPipelineOutput(tokens=sample, images=self._to_images(sample, output_type))
        return DiscreteDiffusionPipelineOutput(tokens=sample)

    def _to_images(self, sample: torch.Tensor, output_type: str) -> list | np.ndarray | torch.Tensor:
        """Images of levels in channel-first order, the highest level 1."""
        levels = self.scheduler.kernel.num_real_tokens
        return as_output(sample.view(len(sample), *self._model_config("shape")).float() / (levels - 1), output_type)


def check_start(scheduler: SchedulerMixin) -> None:
    """Raise ValueError where the edges as set do not begin at 1, where all is noise."""
    if (start := float(scheduler.edges[0])) != 1:
        raise ValueError(
            f"timesteps must begin at 1, where sampling starts from noise alone, got {start}; to go on from tokens at"
            " a time in between, call the scheduler's step in a loop of your own"
        )


def _zip_texts(prompt, suffix) -> list[tuple[str | None, str | None]]:
    """(prompt, suffix) of each sample; a single string serves all."""
    columns = [[text] if text is None or isinstance(text, str) else list(text) for text in (prompt, suffix)]
    count = max(map(len, columns))
    if any(len(column) not in (1, count) or not column for column in columns):
        raise ValueError(f"prompt and suffix must be strings or lists of one length, got {list(map(len, columns))}")
    return list(zip(*(column * (count // len(column)) for column in columns), strict=True))
