"""The sequence network of tauLDR: a post-norm transformer over tokens, modulated by the time."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class SequenceAttnProcessor:
    """Self-attention through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SequenceAttention", x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, dim). Returns the same shape."""
        query, key, value = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).unbind(dim=2)
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(out.flatten(2).to(x.dtype))


class SequenceAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of (batch, length, d_model); query, key and value come from one matrix."""

    _default_processor_cls = SequenceAttnProcessor
    _available_processors = [SequenceAttnProcessor]  # noqa: RUF012  diffusers' name and form
    _supports_qkv_fusion = False

    def __init__(self, d_model: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(d_model, 3 * d_model)
        self.to_out = nn.Linear(d_model, d_model)
        self.set_processor(SequenceAttnProcessor())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, dim). Returns the same shape."""
        return self.processor(self, x)


class TokenEmbedding(nn.Linear):
    """The linear layer of one-hot tokens, without making them: (batch, length) int64 -> (batch, length, d_model)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (batch, length). Returns (batch, length, dim)."""
        return F.embedding(tokens, self.weight.T) + self.bias


class Film(nn.Module):
    """x times a factor plus a shift, both linear in the time embedding."""

    def __init__(self, temb_dim: int, d_model: int):
        super().__init__()
        self.linear = nn.Linear(temb_dim, 2 * d_model)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, dim). temb: (batch, dim of the time). Returns x's shape."""
        factor, shift = self.linear(temb).unsqueeze(1).chunk(2, dim=-1)
        return factor * x + shift


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, d_model: int, hidden: int, dropout: float):
        super().__init__(nn.Linear(d_model, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, d_model))


class SequenceBlock(nn.Module):
    """Attention and feed-forward, each added and then normed; one modulation serves both."""

    def __init__(self, d_model: int, heads: int, hidden: int, temb_dim: int, dropout: float):
        super().__init__()
        self.attn = SequenceAttention(d_model, heads)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ff = FeedForward(d_model, hidden, dropout)
        self.dropout = nn.Dropout(dropout)
        self.film = Film(temb_dim, d_model)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, dim). temb: (batch, dim of the time). Returns x's shape."""
        x = self.film(self.norm1(x + self.dropout(self.attn(x))), temb)
        return self.film(self.norm2(x + self.dropout(self.ff(x))), temb)


class OutputBlock(nn.Module):
    """A feed-forward that is added, normed and modulated."""

    def __init__(self, d_model: int, hidden: int, temb_dim: int, dropout: float):
        super().__init__()
        self.ff = FeedForward(d_model, hidden, dropout)
        self.norm = nn.LayerNorm(d_model)
        self.film = Film(temb_dim, d_model)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, dim). temb: (batch, dim of the time). Returns x's shape."""
        return self.film(self.norm(x + self.ff(x)), temb)


class CTMCSequenceTransformer(ModelMixin, AttentionMixin, ConfigMixin):
    """Logits of p(x_0 | x_t) of token sequences (Campbell et al., 2205.14987, for piano rolls).

    Args:
        vocab_size: number of tokens.
        d_model: width of the network, even and a multiple of num_heads.
        num_layers: number of transformer layers.
        num_heads: attention heads of a layer.
        dim_feedforward: width of a layer's hidden layer.
        num_output_layers: number of residual layers before the logits.
        temb_dim: width of the time embedding, even and at least 4.
        time_hidden_dim: width of the time embedding's hidden layer; dim_feedforward if None.
        film_dim: width of what modulates the layers; 4 temb_dim if None.
        time_scale_factor: factor on the time before it is embedded.
        dropout: in training mode.
        one_hot_input: embed tokens by a matrix; False: as the number 2 x / vocab_size - 1.
        integer_time: cut the time to an integer before it is embedded, so that the network sees 0 for all t < 1. The
            authors' code does, so their checkpoints were trained with it; off, the network sees t.
        sequence_length: that the network was trained on and is sampled at; it takes any.

    Raises:
        ValueError: unless d_model is even and a multiple of num_heads, and temb_dim even and at least 4.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["SequenceBlock"]  # noqa: RUF012  diffusers' name and form
    _no_split_modules = ["SequenceBlock", "OutputBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 129,
        d_model: int = 128,
        num_layers: int = 6,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_output_layers: int = 2,
        temb_dim: int = 128,
        time_hidden_dim: int | None = None,
        film_dim: int | None = None,
        time_scale_factor: float = 1000,
        dropout: float = 0.1,
        one_hot_input: bool = True,
        integer_time: bool = False,
        sequence_length: int | None = None,
    ):
        super().__init__()
        if d_model % num_heads or d_model % 2:
            raise ValueError(f"d_model must be even and a multiple of num_heads, got {d_model}, {num_heads}")
        if temb_dim < 4 or temb_dim % 2:
            raise ValueError(f"temb_dim must be even and at least 4, got {temb_dim}")
        time_hidden_dim, film_dim = time_hidden_dim or dim_feedforward, film_dim or 4 * temb_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(temb_dim, time_hidden_dim), nn.ReLU(), nn.Linear(time_hidden_dim, film_dim)
        )
        self.embedding = TokenEmbedding(vocab_size, d_model) if one_hot_input else nn.Linear(1, d_model)
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SequenceBlock(d_model, num_heads, dim_feedforward, film_dim, dropout) for _ in range(num_layers)
        )
        self.output_blocks = nn.ModuleList(
            OutputBlock(d_model, dim_feedforward, film_dim, dropout) for _ in range(num_output_layers)
        )
        self.output = nn.Linear(d_model, vocab_size)
        self.gradient_checkpointing = False

    def forward(
        self, tokens: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Logits (batch, length, vocab_size) of the clean tokens, as `.sample`; 1 is added at the current token.

        Args:
            tokens: (batch, length) int64, any length.
            timestep: t in [0, 1], (batch,).
            return_dict: False gives the tuple (logits,).

        Raises:
            ValueError: for other shapes.
        """
        if tokens.ndim != 2 or timestep.shape != tokens.shape[:1]:
            raise ValueError(
                f"tokens must be (batch, length) and timestep (batch,), got {tuple(tokens.shape)},"
                f" {tuple(timestep.shape)}"
            )
        if self.config.integer_time:
            timestep = timestep.long()
        dtype = self.dtype
        features = get_timestep_embedding(timestep * self.config.time_scale_factor, self.config.temb_dim)
        temb = self.time_mlp(features.to(dtype))
        if self.config.one_hot_input:
            x = self.embedding(tokens)
        else:
            x = self.embedding((tokens.to(dtype) / self.config.vocab_size * 2 - 1).unsqueeze(-1))
        x = self.input_dropout(x + _positions(tokens.shape[1], self.config.d_model, x.device).to(x.dtype))
        for block in (*self.blocks, *self.output_blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, temb)
            else:
                x = block(x, temb)
        logits = self.output(x)
        current = tokens.unsqueeze(-1).to(logits.device)
        logits.scatter_add_(-1, current, torch.ones_like(current, dtype=logits.dtype))
        return Transformer2DModelOutput(sample=logits) if return_dict else (logits,)


def _positions(length: int, dim: int, device: torch.device) -> torch.Tensor:
    """Sines at even and cosines at odd features, (length, dim) float32."""
    frequencies = torch.exp(-math.log(10000) / dim * torch.arange(0, dim, 2, device=device))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
