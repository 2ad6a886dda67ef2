"""Tiny pipelines of discrete diffusion."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_ext import (
    CTMCScheduler,
    CTMCSequenceTransformer,
    CTMCUNet,
    DiscreteDiffusionPipeline,
    SEDDTransformer,
)

LETTERS = "abcdefgh"


def letter_tokenizer(letters: str = LETTERS) -> PreTrainedTokenizerFast:
    """One token a letter."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build(variant: str) -> DiscreteDiffusionPipeline:
    """Text of 12 letters, sequences of 10 tokens or images (3, 4, 6), with random weights."""
    torch.manual_seed(0)
    tokenizer = None
    if variant == "text":
        sizes = {"hidden_size": 16, "cond_dim": 8, "num_blocks": 1, "num_heads": 2}
        model = SEDDTransformer(vocab_size=9, sequence_length=12, **sizes)
        scheduler, tokenizer = CTMCScheduler(vocab_size=9), letter_tokenizer()
    elif variant == "sequence":
        model = CTMCSequenceTransformer(
            vocab_size=6, d_model=16, num_layers=1, num_heads=2, dim_feedforward=16, temb_dim=8, sequence_length=10
        )
        settings = {"noise_schedule": "constant", "prediction_type": "x0", "time_conditioning": "timestep"}
        scheduler = CTMCScheduler(kernel="uniform", vocab_size=6, constant_rate=3.0, jumps="poisson", **settings)
    else:
        sizes = {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "time_embed_dim": 8}
        model = CTMCUNet(shape=(3, 4, 6), num_levels=8, **sizes)
        settings = {"noise_schedule": "exponential", "prediction_type": "x0", "time_conditioning": "timestep"}
        settings |= {"rate_sigma": 3.0, "Q_sigma": 20.0, "time_base": 0.1, "min_timestep": 0.01}
        scheduler = CTMCScheduler(kernel="gaussian", vocab_size=8, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipe = DiscreteDiffusionPipeline(model.eval(), scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
