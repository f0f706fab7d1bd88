"""Make a tokenizer of the captions that a configuration trains on, for a text transformer that is trained with them.

python scripts/tokenizer.py --base CONFIG.yaml --vocab 4000 --out tokenizer.json

The captions are those of `data.params.train`, without the items that are held out for validation. The same captions
give the same file, byte for byte. A configuration then names it as the conditioner's `tokenizer`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import program
from ldm.cli.options import Parser, called, path, split_overrides, whole_number
from ldm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ldm.data.dataset import ImageDataset


def make(options: Any, overrides: Sequence[str]) -> None:
    """Write the tokenizer, and print what it makes of the captions."""
    from ldm.data.dataset import has_captions
    from ldm.diffusion.conditioners.tokenizer import Tokenizer, trained
    from ldm.files import check_writable, published

    out, longest = options.out, options.max_length
    check_writable(out.parent, "--out")
    dataset = _dataset(options, overrides)
    if not has_captions(dataset):
        raise ConfigError("data.params.train: the data set has no captions, of which a tokenizer could be made")
    captions = [*_captions(dataset)]
    content = trained(captions, options.vocab)
    made = Tokenizer(content, longest, str(out))
    if out.exists() and out.read_bytes() != content:
        raise ConfigError(f"--out {out}: is another tokenizer, which runs may need; name another file, or remove it")
    with published(out) as aside:
        aside.write_bytes(content)
    lengths = [made.encode(caption)[1] for caption in captions]
    mean, longer = sum(lengths) / len(lengths), sum(length > longest for length in lengths)
    print(
        f"{out}: {made.size} tokens, of {len(captions)} captions of {mean:.1f} tokens on average and {max(lengths)} at "
        f"most; {longer} are longer than {longest}\nsha256 {made.digest}"
    )


def _dataset(options: Any, overrides: Sequence[str]) -> "ImageDataset":
    """What the configuration trains on."""
    from ldm.config.load import build, load
    from ldm.data.held_out import hold_out

    # No run of stage 1 has to exist yet.
    config = load(options.base, [*overrides, "data.params.autoencoder=null"], options.trust)
    params = config.resolved()["data"]["params"]
    if "train" not in params:
        raise ConfigError(f"data.params.train: {', '.join(map(str, options.base))}: names no data set of captions")
    dataset: ImageDataset = build(params["train"], options.trust, key="data.params.train")
    dataset.prepare()
    return hold_out(dataset, params["num_validation"])[0] if params.get("num_validation") else dataset


def _captions(dataset: "ImageDataset") -> Iterator[str]:
    """Every caption of every item that can be read, in order."""
    from ldm.data.dataset import Texts

    for index in range(len(dataset)):
        try:
            found = dataset.captions(index) if isinstance(dataset, Texts) else dataset[index]["caption"]
        except DataError:
            continue  # training will leave it out as well, and says so
        yield from [found] if isinstance(found, str) else found


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (ldm/errors.py)."""
    parser = Parser(
        prog=called("tokenizer.py", "tokenizer"), description="Make a tokenizer of captions.", allow_abbrev=False
    )
    parser.add_argument("-b", "--base", nargs="+", type=path, required=True, metavar="YAML", help="whose data it is")
    parser.add_argument("--vocab", type=whole_number, default=4000, metavar="N", help="tokens at most (default: 4000)")
    parser.add_argument("--out", type=path, default=Path("tokenizer.json"), metavar="FILE", help="(tokenizer.json)")
    longer = "count the captions of more tokens than this (default: 77)"
    parser.add_argument("--max-length", type=whole_number, default=77, metavar="N", help=longer)
    parser.add_argument("--trust", nargs="+", default=[], metavar="PACKAGE", help="packages that targets may name")

    def work() -> None:
        overrides, words = split_overrides(argv)
        make(parser.parse_strictly(words), overrides)

    return program.answer(work)
