"""How good generated texts are: the share of words that exist, and how far n-grams are from those of real text."""

import math
import re
from collections import Counter

from ..pipelines.call_arguments import checked_arguments

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@checked_arguments
def words_of(text: str) -> list[str]:
    """Its words in lower case, letters with apostrophes between them."""
    return [word.lower() for word in WORD.findall(text)]


@checked_arguments
def real_word_share(texts: list[str], reference: str) -> list[float]:
    """The share of each text's words that occur in a reference text; NaN where there is no word.

    The first and the last word of a text may be cut and do not count.

    Args:
        texts: of which the shares are.
        reference: a text with the words that there are.

    Raises:
        ValueError: for a reference without words.
    """
    known = set(words_of(reference))
    if not known:
        raise ValueError("reference must hold words, got none")
    words = [words_of(text)[1:-1] for text in texts]
    return [sum(word in known for word in some) / len(some) if some else math.nan for some in words]


@checked_arguments
def ngram_divergence(texts: list[str], reference: list[str], n: int = 5) -> float:
    r"""Jensen-Shannon divergence of the n-grams of characters of two sets of texts, in nats, from 0 to log 2.

    .. math:: \tfrac12 KL(p \,\|\, m) + \tfrac12 KL(q \,\|\, m), \quad m = (p + q) / 2

    It falls as texts are added, for real texts too: compare sets of the same size.

    Args:
        texts: the one set.
        reference: the other.
        n: characters of an n-gram, >= 1.

    Raises:
        ValueError: for n < 1 and sets without an n-gram.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    both = []
    for name, some in (("texts", texts), ("reference", reference)):
        counts = Counter(text[i : i + n] for text in some for i in range(len(text) - n + 1))
        if not counts:
            raise ValueError(f"{name} must hold texts of {n} characters or more, got none")
        total = counts.total()
        both.append({gram: count / total for gram, count in counts.items()})
    p, q = both
    middle = {gram: (p.get(gram, 0) + q.get(gram, 0)) / 2 for gram in {*p, *q}}
    return sum(mass * math.log(mass / middle[gram]) for one in both for gram, mass in one.items()) / 2
