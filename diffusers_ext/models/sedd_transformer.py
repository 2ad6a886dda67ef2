"""The score network of discrete diffusion on text: a diffusion transformer over tokens with rotary attention."""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

FREQUENCIES = 128  # of the embedding of sigma, half of its features


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding. x: (batch, length, heads, dim). cos, sin: (length, dim / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SEDDAttnProcessor:
    """Rotary self-attention through diffusers' dispatcher: SDPA, flash attention, xformers, ..."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "SEDDAttention", x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, hidden_size). cos, sin: (length, head dim / 2). Returns x's shape."""
        query, key, value = attn.to_qkv(x).unflatten(-1, (3, attn.heads, -1)).unbind(dim=2)
        out = dispatch_attention_fn(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out(out.flatten(2).to(x.dtype))


class SEDDAttention(nn.Module, AttentionModuleMixin):
    """Self-attention of (batch, length, hidden_size); query, key and value come from one matrix."""

    _default_processor_cls = SEDDAttnProcessor
    _available_processors = [SEDDAttnProcessor]  # noqa: RUF012  diffusers' name and form
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.set_processor(SEDDAttnProcessor())

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, hidden_size). cos, sin: (length, head dim / 2). Returns x's shape."""
        return self.processor(self, x, cos, sin)


class ScaleNorm(nn.Module):
    """Layer normalisation in float32 with a gain and no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., dim). Returns the same shape and dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float()).to(x.dtype)


class SEDDBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the noise level (adaptive layer norm)."""

    def __init__(self, hidden_size: int, cond_dim: int, heads: int, mlp_ratio: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = ScaleNorm(hidden_size), ScaleNorm(hidden_size)
        self.attn = SEDDAttention(hidden_size, heads)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, mlp_ratio * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * hidden_size, hidden_size),
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(cond_dim, 6 * hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: torch.Tensor, c: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, hidden_size). c: (batch, cond_dim). cos, sin: (length, head dim / 2)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        attended = self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        x = x + gate1 * self.dropout(attended)
        return x + gate2 * self.dropout(self.mlp(self.norm2(x) * (1 + scale2) + shift2))


class SEDDOutput(nn.Module):
    """Modulated norm and read-out to the vocabulary."""

    def __init__(self, hidden_size: int, cond_dim: int, vocab_size: int):
        super().__init__()
        self.norm = ScaleNorm(hidden_size)
        self.modulation = nn.Linear(cond_dim, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (batch, length, hidden_size). c: (batch, cond_dim). Returns (batch, length, vocab_size)."""
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class SEDDTransformer(ModelMixin, AttentionMixin, ConfigMixin):
    r"""Log scores log p_t(y) / p_t(x) of every token y at every position (Lou et al., 2310.16834).

    The network of SEDD, and of the CountDown models of Jump Your Steps. A fresh network returns zeros (before
    scale_by_sigma).

    Args:
        vocab_size: number of tokens, with the mask, if there is one, as the last token.
        hidden_size: width of the network; hidden_size / num_heads is even.
        cond_dim: width of the embedding of the noise.
        num_blocks: number of transformer blocks.
        num_heads: attention heads of a block.
        mlp_ratio: width of a block's hidden layer over hidden_size.
        dropout: in training mode.
        scale_by_sigma: for the absorbing kernel: log(e^sigma_bar - 1) and log(vocab_size - 1) are subtracted, which
            the exact score contains.
        sequence_length: that the network was trained on and is sampled at; it takes any.
        num_streams: voices that take turns in a sequence, a token each. Rotary attention sees distances alone, so an
            embedding tells each position its voice, position % num_streams; with 1 there is none, as in SEDD.

    Raises:
        ValueError: unless hidden_size / num_heads is even and num_streams is at least 1.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["SEDDBlock"]  # noqa: RUF012  diffusers' name and form
    _no_split_modules = ["SEDDBlock", "SEDDOutput"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 50258,
        hidden_size: int = 768,
        cond_dim: int = 128,
        num_blocks: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        dropout: float = 0.1,
        scale_by_sigma: bool = True,
        sequence_length: int | None = None,
        num_streams: int = 1,
    ):
        super().__init__()
        if num_streams < 1:
            raise ValueError(f"num_streams must be >= 1, got {num_streams}; 1 is a sequence of one voice")
        if hidden_size % num_heads or hidden_size // num_heads % 2:
            raise ValueError(f"hidden_size / num_heads must be even, got {hidden_size} / {num_heads}")
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.kaiming_uniform_(self.embedding.weight, a=math.sqrt(5))
        self.stream_embedding = None
        if num_streams > 1:
            self.stream_embedding = nn.Embedding(num_streams, hidden_size)
            nn.init.kaiming_uniform_(self.stream_embedding.weight, a=math.sqrt(5))
        self.time_mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))
        self.blocks = nn.ModuleList(
            SEDDBlock(hidden_size, cond_dim, num_heads, mlp_ratio, dropout) for _ in range(num_blocks)
        )
        self.output = SEDDOutput(hidden_size, cond_dim, vocab_size)
        self.gradient_checkpointing = False

    def forward(
        self, tokens: torch.Tensor, sigma: torch.Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Log scores (batch, length, vocab_size), as `.sample`, 0 at the current token.

        Args:
            tokens: (batch, length) int64, any length.
            sigma: total noise sigma_bar, (batch,).
            return_dict: False gives the tuple (log scores,).

        Raises:
            ValueError: for other shapes.
        """
        if tokens.ndim != 2 or sigma.shape != tokens.shape[:1]:
            raise ValueError(
                f"tokens must be (batch, length) and sigma (batch,), got {tuple(tokens.shape)}, {tuple(sigma.shape)}"
            )
        x = self.embedding(tokens)
        if self.stream_embedding is not None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.stream_embedding(positions % self.config.num_streams)
        c = F.silu(self.time_mlp(_sigma_features(sigma).to(x.dtype)))
        cos, sin = self._rotation(tokens.shape[1], x.device)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, c, cos, sin)
            else:
                x = block(x, c, cos, sin)
        scores = self.output(x, c)  # changed in place below: at 50,258 tokens a copy would be the largest tensor
        if self.config.scale_by_sigma:
            scores.sub_(self._log_scale(sigma.to(scores.device))[:, None, None])
        scores.scatter_(-1, tokens.unsqueeze(-1).to(scores.device), 0)
        return Transformer2DModelOutput(sample=scores) if return_dict else (scores,)

    def _log_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        sigma = sigma.float()
        return torch.expm1(sigma).log() + math.log(self.config.vocab_size - 1)

    def _rotation(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position x frequency, (length, head dim / 2) float32."""
        dim = self.config.hidden_size // self.config.num_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 10000.0**-exponents)
        return angles.cos(), angles.sin()


def _sigma_features(sigma: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of sigma at 128 frequencies from 1 down to 1e-4, (batch, 256) float32."""
    steps = torch.arange(FREQUENCIES, dtype=torch.float32, device=sigma.device) / FREQUENCIES
    angles = sigma.float()[:, None] * torch.exp(-math.log(10000) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
