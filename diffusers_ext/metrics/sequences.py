"""How good generated token sequences are: CountDown rules, note histograms, perplexity and entropy."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..pipelines.call_arguments import checked_arguments


@checked_arguments
def countdown_sequences(
    count: int, length: int = 256, num_vocabs: int = 32, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The CountDown data of Jump Your Steps (2410.07761): (count, length) int64 in [0, num_vocabs).

    A start is drawn uniformly, counted down to 0, then the next is drawn; the sequence is cut to its length.

    Args:
        count: how many sequences, >= 0.
        length: tokens of each sequence, >= 1.
        num_vocabs: number of tokens, >= 2.
        generator: of the draws; by default torch's own.

    Raises:
        ValueError: unless count >= 0, length >= 1 and num_vocabs >= 2.
    """
    if count < 0 or length < 1 or num_vocabs < 2:
        raise ValueError(f"need count >= 0, length >= 1, num_vocabs >= 2, got {count=}, {length=}, {num_vocabs=}")
    starts = torch.randint(num_vocabs, (count, length), generator=generator)
    columns = [starts[:, 0]]
    for position in range(1, length):
        before = columns[-1]
        columns.append(torch.where(before == 0, starts[:, position], before - 1))
    return torch.stack(columns, dim=1)


@checked_arguments
def countdown_wrong(sequences: torch.Tensor) -> torch.Tensor:
    """Which transitions are wrong, (n, length - 1) bool: after a token other than 0 comes only the next smaller one.

    Args:
        sequences: (n, length >= 2) integers.
    """
    sequences = _tokens("sequences", sequences, least=2)
    before, after = sequences[:, :-1], sequences[:, 1:]
    return (before != 0) & (after != before - 1)


@checked_arguments
def countdown_errors(sequences: torch.Tensor) -> torch.Tensor:
    """Share of wrong transitions of each sequence, (n,) float32; the strict rate is the mean.

    Args:
        sequences: (n, length >= 2) integers. Every one of the length - 1 transitions counts.
    """
    return countdown_wrong(sequences).float().mean(dim=1)


@checked_arguments
def countdown_errors_original(sequences: torch.Tensor) -> torch.Tensor:
    """The error rate as the authors' `check_err` counts it, (n,) float32, for comparison with their tables.

    After each transition that it looks at, right or wrong, it passes over the next one, so that it sees about every
    second; and it divides by the length.

    Args:
        sequences: (n, length) integers.
    """
    sequences = _tokens("sequences", sequences, least=1)
    before, errors = sequences[:, 0], torch.zeros(len(sequences), device=sequences.device)
    for token in sequences[:, 1:].unbind(dim=1):
        looked_at = before != 0
        errors += looked_at & (token != before - 1)
        before = torch.where(looked_at, 0, token)
    return errors / sequences.shape[1]


@dataclass(frozen=True)
class HistogramDistance:
    """Distances of n pairs of sequences.

    Attributes:
        hellinger: (n,) float32, each in [0, 1].
        outlier_share: (n,) float32, each in [0, 1].
    """

    hellinger: torch.Tensor
    outlier_share: torch.Tensor


@checked_arguments
def histogram_distance(
    generated: torch.Tensor, reference: torch.Tensor, num_tokens: int, prefix_length: int = 0
) -> HistogramDistance:
    r"""How far the token histogram of each generated sequence is from that of its true continuation (tauLDR, piano).

    .. math:: H(p, q) = \frac{1}{\sqrt 2} \lVert \sqrt p - \sqrt q \rVert_2

    The outlier share is the share of generated tokens that the reference does not contain.

    Args:
        generated: (n, length) integers in [0, num_tokens).
        reference: (n, length), likewise.
        num_tokens: size of the vocabulary.
        prefix_length: tokens at the start that were given and do not count.

    Raises:
        ValueError: for two shapes, other than integers, and a prefix that leaves no token.
    """
    generated, reference = _tokens("generated", generated), _tokens("reference", reference)
    if generated.shape != reference.shape or not 0 <= prefix_length < generated.shape[1]:
        raise ValueError(
            f"generated and reference must have one shape, longer than prefix_length={prefix_length}, got"
            f" {tuple(generated.shape)}, {tuple(reference.shape)}"
        )
    p, q = (_histogram(sequences[:, prefix_length:], num_tokens) for sequences in (generated, reference))
    hellinger = (p.sqrt() - q.sqrt()).norm(dim=1) / 2**0.5
    return HistogramDistance(hellinger=hellinger, outlier_share=(p * (q == 0)).sum(dim=1))


@checked_arguments
@torch.no_grad()
def generative_perplexity(
    model: torch.nn.Module, tokens: torch.Tensor, batch_size: int = 8, average: str = "tokens"
) -> float:
    """Perplexity of generated text under a causal language model of transformers, such as GPT-2 large.

    exp of the mean negative log likelihood of all tokens but the first of each sequence. Repetitive text has a low
    perplexity too: state `unigram_entropy` beside it. SEDD and Jump Your Steps use gpt2-large.

    Args:
        model: the causal language model.
        tokens: (n, length >= 2) integers of the model's vocabulary.
        batch_size: sequences that pass the model together, >= 1.
        average: "tokens", over all tokens alike; "batches", the mean of the means of the batches, as in the authors'
            code, where a smaller last batch weighs as much as others.

    Raises:
        ValueError: for no tokens, another average, and a batch size below 1.
    """
    tokens = _tokens("tokens", tokens, least=2)
    if average not in ("tokens", "batches"):
        raise ValueError(f'average must be "tokens" or "batches", got {average!r}')
    if batch_size < 1 or len(tokens) == 0:
        raise ValueError(f"need batch_size >= 1 and at least one sequence, got {batch_size=}, {len(tokens)} sequences")
    device = next(model.parameters()).device
    means, sizes = [], []
    for batch in tokens.split(batch_size):
        logits = model(input_ids=batch.to(device)).logits[:, :-1].float()
        means.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(device)))
        sizes.append(len(batch))
    weights = torch.tensor(sizes if average == "tokens" else [1] * len(sizes), dtype=torch.float64)
    return float(torch.exp((torch.stack(means).cpu().double() * weights).sum() / weights.sum()))


@checked_arguments
def unigram_entropy(tokens: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of the token frequencies within each sequence, (n,) float32.

    Computed in float64 on the CPU.

    Args:
        tokens: (n, length) integers.
    """
    tokens = _tokens("tokens", tokens)
    entropies = []
    for sequence in tokens.cpu():
        share = torch.unique(sequence, return_counts=True)[1].double() / len(sequence)
        entropies.append(-(share * share.log()).sum())
    return torch.stack(entropies).float().to(tokens.device)


def _histogram(sequences: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Shares of each token, (n, num_tokens) float32."""
    if len(sequences) and not 0 <= int(sequences.min()) <= int(sequences.max()) < num_tokens:
        raise ValueError(
            f"tokens must be in [0, num_tokens={num_tokens}), got {int(sequences.min())} to {int(sequences.max())}"
        )
    counts = torch.zeros(len(sequences), num_tokens, device=sequences.device)
    counts.scatter_add_(1, sequences, torch.ones_like(sequences, dtype=counts.dtype))
    return counts / sequences.shape[1]


def _tokens(name: str, value: torch.Tensor, least: int = 1) -> torch.Tensor:
    value = torch.as_tensor(value)
    if value.ndim != 2 or value.shape[1] < least or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(
            f"{name} must be integers (n, length >= {least}), got {value.dtype} of the shape {tuple(value.shape)}"
        )
    return value.long()
