"""Options and examples of each command, one row for an option. Loads nothing but the standard library."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scvae_tools._other_names import OTHER_LETTERS, OTHER_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

# -- values ------------------------------------------------------------------------------------------------------------


def mixture(text: str) -> str | bool:
    """Kind of mixture; ``none`` is the plain VAE."""
    if text not in ("gmvae", "vade", "none"):
        raise argparse.ArgumentTypeError(f"must be gmvae, vade or none; found {text!r}")
    return False if text == "none" else text


def components(text: str) -> int | tuple[int, ...]:
    """Number of components, or the smallest and the largest."""
    numbers = [_whole(part) for part in text.split("-")]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"must be a number, or the smallest and largest such as 4-20; found {text!r}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def widths(text: str) -> int | list[int]:
    """Width of the hidden layers, or several widths with commas between."""
    numbers = [_whole(part) for part in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; found {text!r}") from None


def column(text: str) -> str:
    """Name of a column."""
    return text


def columns(text: str) -> list[str]:
    """Names of columns, with commas between."""
    return text.split(",")


def folder(text: str) -> Path:
    """Folder of a model, or of a training or comparison to continue."""
    return Path(text)


def setting(text: str) -> tuple[str, Any]:
    """Name and value of an argument; the value is JSON, or text if it is not JSON."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, such as dropout_rate=0.1; found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option or a positional argument: how it is written, its name in Python, its type, its help."""

    flags: str
    name: str
    kind: Callable[[str], Any] = str
    help: str = ""
    metavar: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def usage(self) -> str:
        """Form in the usage line, for required and positional arguments; empty for others."""
        first = self.flags.split()[0]
        if first.startswith("-"):
            return f"{first} {self.shown}" if self.more.get("required") else ""
        return f"[{first}]" if self.more.get("nargs") == "?" else first

    @property
    def shown(self) -> str:
        """Placeholder of the value in the help."""
        return self.metavar or _METAVARS.get(self.kind, "NAME")

    def add_to(self, parser: Any) -> None:
        """Add the option to a parser, without a default: the default of the Python function applies."""
        flags = self.flags.split()
        if not flags[0].startswith("-"):
            parser.add_argument(self.name, metavar=flags[0], type=self.kind, help=self.help, **self.more)
            return
        options: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS, "help": self.help, **self.more}
        if "action" not in self.more or self.more["action"] == "append":
            options |= {"type": self.kind, "metavar": self.shown}
        if "choices" in self.more:
            options.pop("metavar")
        parser.add_argument(*flags, **options)


_METAVARS = {int: "N", float: "X", Path: "FILE", folder: "DIR", column: "COLUMN", columns: "COLUMN,..."}
FLAG = {"action": "store_true"}

DATA = Option("DATA", "data", help="file or folder of counts; or demo, 700 blood cells that come with scanpy")
ORIENTATION = Option(
    "--orientation",
    "orientation",
    help="of text files, which is never guessed [cells-by-genes]",
    more={"choices": ("cells-by-genes", "genes-by-cells")},
)
READING = (
    ORIENTATION,
    Option("--genome", "genome", help="genome to take, where files of 10x Genomics hold several"),
    Option("--raw", "raw", help="take the counts, and their genes, from raw in place of X", more=FLAG),
)
IN_MEMORY = Option("--in-memory", "in_memory", help="read all counts, also those of large files", more=FLAG)
OUTPUT = Option("-o --output", "output", Path, "file to write, .h5ad or .zarr")
TABLE = Option("-o --output", "output", Path, "table to write, .tsv or .tsv.gz; printed if not given")
OVERWRITE = Option("--overwrite", "overwrite", help="replace what exists", more=FLAG)
MODEL = Option("--model", "model", folder, "folder of the trained model", more={"required": True})
LAYER = Option("--layer", "layer", help="layer with the counts, in place of X")
LABELS = Option("--labels-key", "labels_key", column, "column of obs with labels to score the clusters by")
DEVICE = Option(
    "--device", "accelerator", help="where to compute [auto]", more={"choices": ("auto", "cpu", "gpu", "mps")}
)
SEED = Option("--seed", "random_state", int, "seed; the same seed gives the same result [0]")
KEY = Option("--key-added", "key_added", help="name of the results in the file [scvae]")
SAYING = (
    Option("--quiet", "quiet", help="show no progress, messages or summary", more=FLAG),
    Option("--json", "json", help="print the result as JSON, and nothing else on standard output", more=FLAG),
    Option("--traceback", "traceback", help="show where in the program an error came from", more=FLAG),
)


def _set(whose: str) -> Option:
    text = f"any other argument of {whose}, value in JSON; can be repeated"
    return Option("--set", "set", setting, text, "NAME=VALUE", {"action": "append"})


COUNTS = (
    LAYER,
    Option("--genes", "mask_var", column, "boolean column of var: the genes to use [all]"),
    Option("--batch-key", "batch_key", column, "column of obs that the decoder is given"),
    Option("--size-factor", "size_factor_key", column, "column of obs with size factors [total counts]"),
    Option(
        "--categorical-covariates",
        "categorical_covariate_keys",
        columns,
        "columns of obs that the decoder is given too",
    ),
    Option(
        "--continuous-covariates",
        "continuous_covariate_keys",
        columns,
        "columns of obs with numbers, given to the decoder too",
    ),
)
#: Arguments of `tl.scvae`.
FIT = (
    Option("--likelihood", "likelihood", help="distribution of the counts: poisson, nb, zip, zinb, ... [nb]"),
    Option("--mixture", "mixture", mixture, "gmvae, vade, or none for a plain VAE [gmvae]", "KIND"),
    Option(
        "--components", "n_components", components, "number of clusters, or range to find it in [found]", "N|MIN-MAX"
    ),
    Option("--latent", "n_latent", int, "dimensions of the latent space [10]"),
    Option("--hidden", "n_hidden", widths, "width of the hidden layers, or one for each layer [128]", "N[,N...]"),
    Option("--layers", "n_layers", int, "number of hidden layers [1]"),
    *COUNTS,
    Option("--labels-key", "labels_key", column, "column of obs with known labels, to train on"),
    Option(
        "--unlabeled", "unlabeled_category", help="what that column holds for cells without a label", metavar="LABEL"
    ),
    Option("--epochs", "max_epochs", int, "largest number of epochs [about 4,000 steps of 128 cells]"),
    Option("--batch-size", "batch_size", int, "cells a training step [128]"),
    Option("--learning-rate", "lr", float, "learning rate of Adam [0.001]"),
    Option("--train-size", "train_size", float, "share of the cells to train on [0.9]"),
    Option("--no-early-stopping", "early_stopping", help="train for all epochs", more={"action": "store_false"}),
    Option("--checkpoint", "checkpoint", folder, "folder for the state of the training, to continue from there"),
    Option("--lambda", "write_lambda", help="write the dense layer of lambda, whatever its size", more=FLAG),
    Option("--no-lambda", "write_lambda", help="leave it out [written up to 192 MiB]", more={"action": "store_false"}),
    Option("--allow-non-integer", "allow_non_integer", help="accept estimated counts", more=FLAG),
    SEED,
    DEVICE,
    KEY,
)
#: Arguments of `tl.compare`.
COMPARE = (
    *COUNTS,
    LABELS,
    Option("--epochs", "max_epochs", int, "largest number of epochs of a model [about 4,000 steps of 128 cells]"),
    Option("--directory", "directory", folder, "folder for what is finished, to continue from there"),
    SEED,
    DEVICE,
)
#: Arguments of `SCVAE.sample`.
SAMPLE = (
    Option("--cells", "n_cells", int, "number of cells to draw [1000]"),
    Option("--component", "components", help="draw from this component only"),
    Option("--batch", "batch", help="draw cells of this batch only"),
    SEED,
)
#: Arguments of `SCVAE.load`.
LOAD = (
    DEVICE,
    Option("--model-version", "version", help="weights of the model to use: best, end or early_stop [best]"),
)
FILL = Option("--fill-missing", "fill_missing", help="take genes of the model that the data lack as 0", more=FLAG)
NONE_BELOW = Option(
    "--none-below", "none_below", float, "call a cell none that fits the model worse than all but this share, e.g. 0.01"
)
#: Arguments of `tl.evaluate`.
EVALUATE = (LABELS, SEED)


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command: what it does in a line, its options, the Python function that --set reaches, its examples."""

    help: str
    options: tuple[Option, ...]
    examples: tuple[str, ...]


def hint_for_option(token: str, command: Command) -> str:
    """Say how an option that a command does not have is written here; empty if there is nothing like it."""
    written = token.partition("=")[0]
    name = written.lstrip("-").replace("-", "_")
    name = OTHER_LETTERS.get(name, name) if len(name) == 1 else OTHER_NAMES.get(name, (name,))[0]
    flags = {option.name: option.flags.split()[-1] for option in command.options if option.flags.startswith("-")}
    if name in flags:
        return f"{written} is {flags[name]} here"
    if "set" in flags and name in {ours for ours, _ in OTHER_NAMES.values()}:
        return f"{written} is --set {name}=... here"
    close = get_close_matches(written, flags.values(), n=1)
    return f"did you mean {close[0]} for {written}?" if close else ""


#: Commands by name. The examples can be run in this order: each uses files that earlier ones wrote.
COMMANDS = {
    "datasets": Command(
        "list data sets, or write one to a file",
        (
            Option("NAME", "dataset", help="one of svt.datasets; none to list them", more={"nargs": "?"}),
            OUTPUT,
            OVERWRITE,
            _set("the function of that name"),
        ),
        (
            "scvae-tools datasets",
            "scvae-tools datasets pbmc68k_reduced -o pbmc.h5ad",
            "scvae-tools datasets simulate -o cells.zarr --set n_cells=300 --set n_batches=2",
        ),
    ),
    "fit": Command(
        "train on counts, and write latent codes, clusters and lambda",
        (
            DATA,
            OUTPUT,
            Option("--model", "model", folder, "folder to save the trained model in"),
            OVERWRITE,
            *READING,
            IN_MEMORY,
            *FIT,
            Option("--score-key", "score_key", column, "column of obs to score clusters by; not trained on"),
            _set("svt.tl.scvae, svt.SCVAE or svt.SCVAE.train"),
        ),
        (
            "scvae-tools fit demo --epochs 20 --score-key bulk_labels",
            "scvae-tools fit pbmc.h5ad -o fitted.h5ad --model model --likelihood zinb --components 4-12 --epochs 20",
            "scvae-tools fit cells.zarr -o vae.zarr --mixture none --batch-key batch --epochs 5 --set dropout_rate=0.1",
        ),
    ),
    "evaluate": Command(
        "bounds and scores of a trained model on data",
        (DATA, MODEL, TABLE, OVERWRITE, *READING, LAYER, FILL, *EVALUATE, *LOAD, _set("svt.tl.evaluate")),
        ("scvae-tools evaluate pbmc.h5ad --model model --labels-key bulk_labels",),
    ),
    "predict": Command(
        "latent codes and clusters of new cells, by a trained model",
        (DATA, MODEL, OUTPUT, OVERWRITE, *READING, IN_MEMORY, LAYER, FILL, NONE_BELOW, KEY, *LOAD),
        ("scvae-tools predict demo --model model -o predicted.h5ad",),
    ),
    "compare": Command(
        "train a model for every combination of options, and compare them on held-out cells",
        (
            DATA,
            Option(
                "--grid",
                "grid",
                help="values by name of the argument: a .json or .toml file, or JSON itself",
                metavar="FILE|JSON",
                more={"required": True},
            ),
            TABLE,
            OVERWRITE,
            *READING,
            *COMPARE,
            _set("svt.tl.compare, svt.SCVAE or svt.SCVAE.train"),
        ),
        ('scvae-tools compare demo --grid \'{"likelihood": ["poisson", "nb"]}\' -o comparison.tsv --epochs 3',),
    ),
    "sample": Command(
        "draw counts of new cells from a trained model",
        (MODEL, OUTPUT, OVERWRITE, *SAMPLE, *LOAD),
        ("scvae-tools sample --model model --cells 200 -o sampled.h5ad",),
    ),
    "plot": Command(
        "draw what a file of results holds",
        (
            Option(
                "DATA", "data", help="file of results; or a .tsv table, for those that draw one", more={"nargs": "?"}
            ),
            Option("NAME", "plot", help="one of svt.pl", more={"nargs": "?"}),
            Option("-o --output", "output", Path, "picture to write: .png, .pdf, .svg, ..."),
            OVERWRITE,
            Option("--list", "list", help="list the plots", more=FLAG),
            _set("the function of that name"),
        ),
        (
            "scvae-tools plot --list",
            "scvae-tools plot fitted.h5ad training -o training.png",
            "scvae-tools plot fitted.h5ad confusion -o confusion.pdf --set labels_key=bulk_labels",
            "scvae-tools plot comparison.tsv compare -o comparison.png",
        ),
    ),
}
