"""Metrics of token sequences against the authors' numbers and what they mean."""

import math
from types import SimpleNamespace

import pytest
import torch
from discrete_goldens import golden

from diffusers_ext.metrics import (
    countdown_errors,
    countdown_errors_original,
    countdown_sequences,
    generative_perplexity,
    histogram_distance,
    ngram_divergence,
    real_word_share,
    unigram_entropy,
)


@pytest.mark.parametrize("name", ["clean", "corrupted", "handmade", "random"])
def test_error_rate_of_the_authors(name):
    g = golden("metric_countdown").t
    errors = countdown_errors_original(g[name])
    torch.testing.assert_close(errors, g[f"{name}.err_per_seq"], rtol=0, atol=1e-6)
    torch.testing.assert_close(errors.mean(), g[f"{name}.count_err_fn"], rtol=0, atol=1e-6)


def test_strict_error_rate_looks_at_every_transition():
    x = torch.tensor([[3, 2, 1, 0, 5, 4], [3, 3, 3, 3, 3, 3], [0, 0, 4, 3, 1, 0], [2, 9, 8, 7, 6, 0]])
    assert countdown_errors(x).tolist() == pytest.approx([0, 1, 0.2, 0.4])
    assert countdown_errors_original(x).tolist() == pytest.approx([0, 0.5, 0, 1 / 3])


def test_countdown_data():
    x = countdown_sequences(400, length=40, num_vocabs=8, generator=torch.Generator().manual_seed(0))
    assert x.shape == (400, 40) and x.dtype == torch.int64
    assert not countdown_errors(x).any() and not countdown_errors_original(x).any()
    assert (x[:, 1:][x[:, :-1] == 0] > 0).any()
    first = countdown_sequences(8000, length=1, num_vocabs=8, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(first[:, 0], minlength=8) / 8000
    torch.testing.assert_close(share, torch.full((8,), 1 / 8), rtol=0, atol=0.015)
    again = countdown_sequences(400, length=40, num_vocabs=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_histogram_distance():
    case = golden("metric_piano")
    distance = histogram_distance(case.t["fake"], case.t["true"], 20, prefix_length=case.config["fix_length"])
    torch.testing.assert_close(distance.hellinger, case.t["hellinger_each"], rtol=0, atol=1e-6)
    torch.testing.assert_close(distance.outlier_share, case.t["outlier_each"], rtol=0, atol=1e-6)
    x, other = torch.tensor([[0, 1, 1]]), torch.tensor([[2, 3, 2]])
    same, disjoint = histogram_distance(x, x.flip(1), 4), histogram_distance(x, other, 4)
    assert same.hellinger.item() == same.outlier_share.item() == 0
    assert disjoint.hellinger.item() == pytest.approx(1) and disjoint.outlier_share.item() == 1


class Recorded(torch.nn.Module):
    """A language model that gives recorded logits."""

    def __init__(self, tokens, logits):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.known = {tuple(row): output for row, output in zip(tokens.tolist(), logits, strict=True)}

    def forward(self, input_ids):
        return SimpleNamespace(logits=torch.stack([self.known[tuple(row)] for row in input_ids.tolist()]))


def test_perplexity():
    g = golden("metric_ppl").t
    model = Recorded(g["input_ids"], g["logits"])
    theirs = generative_perplexity(model, g["input_ids"], batch_size=3, average="batches")
    assert theirs == pytest.approx(float(g["ppl"]), rel=1e-5)
    weighted = math.exp(g["nll_each"].double().mean())
    for batch_size in (1, 3, 8):
        assert generative_perplexity(model, g["input_ids"], batch_size) == pytest.approx(weighted, rel=1e-5)


def test_unigram_entropy():
    x = torch.tensor([[3, 3, 3, 3], [0, 1, 2, 3], [0, 0, 1, 1]])
    assert unigram_entropy(x).tolist() == pytest.approx([0, math.log(4), math.log(2)], abs=1e-6)


def test_refusals():
    x = torch.zeros(2, 4, dtype=torch.long)
    for call, message in [
        (lambda: countdown_errors(x.float()), "sequences must be integers"),
        (lambda: countdown_errors(x[:, :1]), "length >= 2"),
        (lambda: countdown_sequences(1, length=0), "length >= 1"),
        (lambda: histogram_distance(x, x[:, :3], 4), "must have one shape"),
        (lambda: histogram_distance(x, x, 4, prefix_length=4), "longer than prefix_length=4"),
        (lambda: histogram_distance(x + 4, x, 4), r"in \[0, num_tokens=4\), got 4 to 4"),
        (lambda: generative_perplexity(torch.nn.Linear(1, 1), x, average="mean"), '"tokens" or "batches"'),
        (lambda: generative_perplexity(torch.nn.Linear(1, 1), x[:0]), "at least one sequence"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_words_that_occur():
    shares = real_word_share(
        ["ut To be, or nort to be th", "x don't DON'T y", "one two", ""], "To be or not; don't. The"
    )
    assert shares[:2] == pytest.approx([5 / 6, 1]) and all(math.isnan(share) for share in shares[2:])
    with pytest.raises(ValueError, match="reference must hold words"):
        real_word_share(["a b c"], "12 - 3")


def test_divergence_of_n_grams():
    assert ngram_divergence(["abcde", "ab"], ["abcde"], n=5) == 0
    assert ngram_divergence(["abab"], ["cdcd"], n=2) == pytest.approx(math.log(2))
    # p = (1/2, 1/2), q = (1, 0): m = (3/4, 1/4)
    expected = (math.log(2 / 3) / 2 + math.log(2) / 2 + math.log(4 / 3)) / 2
    assert ngram_divergence(["ab"], ["aa"], n=1) == pytest.approx(expected)
    for texts, n, message in ((["ab"], 0, "n must be >= 1"), (["ab"], 3, "texts must hold texts of 3 characters")):
        with pytest.raises(ValueError, match=message):
            ngram_divergence(texts, ["abcdef"], n)
