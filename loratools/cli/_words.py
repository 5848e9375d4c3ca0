"""Every option of the command line: its name, the group that it stands in, and what it means, once for all commands.

The help text of an option begins with its meaning here, in every command; what it is in one command follows. A test
holds every help page against this table, and says of each shared option and each command without it why that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

READ, CHOOSE, HOW, RANKS, SAY, WRITE, CHECK, SHOW, WORK, HUB = GROUPS = (
    "What is read", "What is chosen", "How it is done", "Ranks", "What is said", "What is written", "Checks",
    "What is shown", "Work", "The Hub",
)  # fmt: skip
"""Headings of a help page, in order."""


class Word(NamedTuple):
    """One option: its group, its meaning, and what stands for its value in help; None where it is a switch, or words.

    `words` says that the value is one of a list, which the help page prints.
    """

    group: str
    meaning: str
    metavar: str | None = None
    words: bool = False


# fmt: off
WORDS: Mapping[str, Word] = {
    "--adapter": Word(READ, "An adapter; once for each.", "PATH"),
    "--alpha": Word(READ, "The alpha that adapters were trained with, for files that do not record it; it wins over "
                          "one that they record.", "NUMBER"),
    "--base": Word(READ, "The base model.", "PATH"),
    "--input": Word(READ, "Where an input of the recipe is; once for each. One named by digest there must have "
                          "it.", "NAME=PATH"),
    "--search": Word(READ, "Find inputs that are nowhere else in this folder, by their digests.", "FOLDER"),
    "--dialect": Word(READ, "Read every adapter as this dialect (see `loratools dialects`).", "NAME"),
    "--all": Word(READ, "Every two of the adapters below this folder, in any dialect.", "FOLDER"),
    "--each": Word(READ, "Every adapter and model in this folder and below it, a line for each: folders whose files "
                         "belong together, and lone files. What is hidden, a trainer's own, or a link within the "
                         "folder is left out.", "FOLDER"),
    "--enable-lora": Word(READ, "Which projections of a fused weight have factors, for loralib's MergedLinear.",
                          "T,F,T"),
    "--initial": Word(READ, "Take away the adapter that training started from, which turns PiSSA, OLoRA and CorDA into "
                            "plain LoRA.", "PATH"),
    "--model-type": Word(READ, "What the base is (gpt2, gpt_oss, …), where its config.json does not say it.", "NAME"),
    "--original": Word(READ, "The unquantized model that the base was made from.", "PATH"),
    "--put": Word(READ, "Adapter to put into the model; once for each.", "PATH"),
    "--take": Word(READ, "Adapter to take out of the model; once for each.", "PATH"),
    "--trained-on": Word(READ, "What the adapter saw where the base is folded (AWQ, SmoothQuant): its original, or the "
                               "folded base itself.", words=True),

    "--exclude": Word(CHOOSE, "Leave these out.", "PATTERN"),
    "--include": Word(CHOOSE, "Only these: a name (q_proj), a glob (layers.*.mlp.*), or re: and a regular expression; "
                              "once for each.", "PATTERN"),
    "--kind": Word(CHOOSE, "Kinds of modules that are factored; others are saved whole.", words=True),
    "--save-module": Word(CHOOSE, "Keep these whole, not factored.", "PATTERN"),
    "--targets": Word(CHOOSE, "Modules, as PEFT's target_modules: names or globs with commas between them, or "
                              "all-linear.", "NAMES"),
    "--similar": Word(CHOOSE, "Least cosine of two changes dW that are listed as near.", "NUMBER"),
    "--most": Word(CHOOSE, "List so many others of each adapter, the most alike. With --all.  [default: all of up to "
                           "2,000 adapters, of more 8]", "N"),
    "--tier": Word(CHOOSE, "Which hash.", "TIER"),

    "--algorithm": Word(HOW, "Digest algorithm.", words=True),
    "--density": Word(HOW, "Share of elements that a method keeps.", "SHARE"),
    "--epsilon": Word(HOW, "Half the range of chances that della gives.", "NUMBER"),
    "--exact": Word(HOW, "Recompute every changed tensor in float64, element by element."),
    "--gamma": Word(HOW, "Share of outliers that breadcrumbs drops.", "SHARE"),
    "--like": Word(HOW, "Where a method's definitions differ, take this library's.", words=True),
    "--method": Word(HOW, "How changes are combined: see above.", "NAME"),
    "--normalize": Word(HOW, "With --like mergekit: divide what is elected by the sum of its weights, as it does for "
                             "ties and della."),
    "--rescale": Word(HOW, "With --like mergekit: rescale what is kept of each change to its L1 norm, as it does for "
                           "dare and della."),
    "--quantized": Word(HOW, "What becomes of a base of codes.", words=True),
    "--rounding": Word(HOW, "How results become numbers of a shorter dtype.", words=True),
    "--seed": Word(HOW, "Seed of what is drawn at random.", "N"),
    "--tied": Word(HOW, "What a change of a tied embedding or head does: refuse, give the head a weight of its own, or "
                        "change both.", words=True),
    "--tight": Word(HOW, "Spend as much again on far tighter bounds."),
    "--arithmetic": Word(HOW, "float32: no products in bfloat16 on the way, on processors that have them.", words=True),
    "--to-lora": Word(HOW, "Make a LoRA of it, whatever its kind; the error is told."),
    "--tolerance": Word(HOW, "Excess over the optimal error², about.", "SHARE"),
    "--onto": Word(HOW, "A folded base (AWQ, SmoothQuant): carry an adapter of its original into its basis, and seal "
                        "it with that.", "PATH"),
    "--weight": Word(HOW, "Weight of an adapter, once for each in order: a number, which may be negative; "
                          "PATTERN=NUMBER for some of its modules, after a comma; or lbw: and a number for each block "
                          "of an image model.", "WEIGHT"),

    "--budget": Word(RANKS, "Share out this many parameters (2M), or bytes (8MB), to the greatest effect.", "SIZE"),
    "--energy": Word(RANKS, "Least rank that keeps this share of the squared norm.", "SHARE"),
    "--max-rank": Word(RANKS, "No module has more.", "R"),
    "--min-rank": Word(RANKS, "No module has less.", "R"),
    "--multiple-of": Word(RANKS, "Round ranks up to multiples of this.", "N"),
    "--noise": Word(RANKS, "Keep what stands above the rounding of the fine-tune's dtype."),
    "--rank": Word(RANKS, "The same rank for every module.", "R"),
    "--ratio": Word(RANKS, "Keep singular values above this share of the largest.", "SHARE"),
    "--sv-cumulative": Word(RANKS, "kohya's: least rank that keeps this share of the sum of singular values.", "SHARE"),
    "--sv-fro": Word(RANKS, "kohya's: least rank that keeps this share of the norm.", "SHARE"),
    "--sv-ratio": Word(RANKS, "kohya's: keep singular values above the largest divided by this.", "NUMBER"),
    "--uniform": Word(RANKS, "Give every module the one rank that the neediest calls for, or the budget allows."),

    "--author": Word(SAY, "Who made it.", "TEXT"),
    "--description": Word(SAY, "What it does.", "TEXT"),
    "--set": Word(SAY, "Any entry of the header, once for each.", "KEY=VALUE"),
    "--strip": Word(SAY, "Take out what is private: local paths, names of people, machines and dataset folders, "
                         "prompts, captions, comments, mail addresses, session ids. Every one is listed."),
    "--tags": Word(SAY, "Words to find it by, with commas between them.", "WORDS"),
    "--thumbnail": Word(SAY, "A picture, PNG, JPEG or WebP of at most 2 MB; what it says of its making is left out.",
                        "FILE"),
    "--title": Word(SAY, "Its name for people.", "TEXT"),
    "--trigger": Word(SAY, "Trigger words, with commas between them; '' takes them out.", "WORDS"),
    "--unset": Word(SAY, "An entry of the header to take out, or a glob: 'ss_*'; once for each.", "KEY"),

    "--allow-loss": Word(WRITE, "Write it even where the dialect cannot say everything."),
    "--allow-outside": Word(WRITE, "Let outputs lie wherever the recipe says, also outside of the folder."),
    "--folder": Word(WRITE, "The folder that outputs go into.", "FOLDER"),
    "--base-id": Word(WRITE, "Name of the base model to record, such as org/model.", "NAME"),
    "--drop-whole": Word(WRITE, "Leave out what is not factored, for servers that take only factors."),
    "--dry-run": Word(WRITE, "Print the plan, from headers alone, and stop."),
    "--dtype": Word(WRITE, "Dtype of what is written.", words=True),
    "--durable": Word(WRITE, "Write the result to the disk itself before it gets its name: a power cut leaves it whole "
                             "or absent."),
    "--force": Word(WRITE, "Replace the output if it exists."),
    "--keep": Word(WRITE, "Make everything in this new folder, and leave it there.", "PATH"),
    "--keep-loss": Word(WRITE, "With --quantized requantize: write what the codes lose beside the model, as an adapter "
                               "of this rank (folder loss).", "R"),
    "--keep-residual": Word(WRITE, "Keep what rounding destroys, so that every bit of the base can be restored."),
    "--max-shard-size": Word(WRITE, "Most bytes of one file: 5GB, 500MB.", "SIZE"),
    "--output": Word(WRITE, "Where the result goes; it must not exist yet.", "PATH"),
    "--profile": Word(WRITE, "With --to peft: as this consumer reads it, or refused; serving is what all of them "
                             "read.", words=True),
    "--resume": Word(WRITE, "Keep what is complete when interrupted, and go on from there the next time."),
    "--to": Word(WRITE, "Dialect of the result (see `loratools dialects`).", "DIALECT"),

    "--certificate": Word(CHECK, "For an adapter that stands for a fine-tune: how much of each layer's change it "
                                 "holds, beside the optimum."),
    "--check-base": Word(CHECK, "What to do when the base is not the one that the adapter was sealed with.",
                         words=True),
    "--header-only": Word(CHECK, "Do not read the data to compare them with the adapter's digest."),
    "--retention": Word(CHECK, "Measure how much of the change survives rounding, on a sample of tiles, on all, or "
                               "not.", words=True),
    "--run": Word(CHECK, "Run base and merged model in transformers too, and compare the logits with the adapter live "
                         "in the base."),
    "--verify": Word(CHECK, "Read the result again and prove it."),

    "--last": Word(SHOW, "Only the last step; what it took in are inputs."),
    "--grid": Word(SHOW, "Print the whole grid of similarities of one module.", "MODULE"),
    "--metadata": Word(SHOW, "List every entry of the file's header."),
    "--modules": Word(SHOW, "Print a line for every module or tensor."),
    "--paper": Word(SHOW, "What section 7 of the LoRA paper shows: A alone, random control, Table 7."),
    "--spectrum": Word(SHOW, "Singular values of every module of an adapter; this reads the factors."),
    "--tasks": Word(SHOW, "Tasks to store.", "N"),

    "--device": Word(WORK, "Where the arithmetic is done (cuda:1: the second GPU); a GPU may round one element in some "
                           "ten thousand to its other neighbour.", words=True),
    "--jobs": Word(WORK, "Paths to work on at once, of several.", "N"),
    "--part": Word(WORK, "Do one part of the work only, such as 3/16, counted from 1, in a job of an array; "
                         "`loratools gather` makes the output when all are done.", "I/N"),
    "--workers": Word(WORK, "Share the work out: a number of processes, the address of a Dask scheduler "
                            "(tcp://host:8786, tls://…), or slurm. They see the same folders.", "N|ADDRESS"),
    "--threads": Word(WORK, "Threads to work with.", "N"),

    "--base-model": Word(HUB, "The base model's name on the Hub, for the card.", "ORG/NAME"),
    "--card": Word(HUB, "Whose README.md stays where the folder's and the Hub's have both been changed.", words=True),
    "--create-pr": Word(HUB, "Open a pull request instead of changing the branch."),
    "--license": Word(HUB, "The licence, as apache-2.0, for the card.", "ID"),
    "--message": Word(HUB, "The title of the commit.", "TEXT"),
    "--no-local": Word(HUB, "With --push: keep nothing here, never more than a shard at a time."),
    "--private": Word(HUB, "Make a new repository private."),
    "--push": Word(HUB, "Send each shard to this repository of the Hub as it is finished.", "REPO"),
    "--revision": Word(HUB, "A branch, a tag or a commit.", "NAME"),
}
# fmt: on

COMMON = ("--json", "--quiet", "--verbose", "--no-progress", "--json-schema")
"""Options of every command."""

REFUSED: Mapping[str, str] = {"--device": "works on the processor alone"}
"""Option -> what is said of a command that has none, before the commands that have it."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "extract-svd": {"--layers": "--modules"},
    "verify": {"--tensors": "--modules"},
    "switch": {"--out": "--take", "--in": "--put"},
    "pull": {"--no-check-base": "--check-base=off"},
}
"""Command -> old spelling -> new one: the old ones work in this version, with a warning."""

UNSEALED = "so a wrong base is not noticed; convert with --base seals it"
"""What follows where an adapter is said to have no base hash."""

MEANT: Mapping[str, str] = {
    "show": "inspect", "info": "inspect", "list": "inspect", "diff": "compare", "check": "validate verify",
    "upload": "push", "download": "pull", "fuse": "merge", "rank": "resize", "shrink": "resize", "add": "combine",
    "svd": "extract-svd", "metadata": "inspect edit", "tour": "demo", "remove": "unmerge", "replace": "switch",
    "digest": "hash", "cost": "estimate", "formats": "dialects",
    "seal": "convert … --base BASE", "undo": "unmerge", "spectrum": "inspect … --spectrum",
}  # fmt: skip
"""What other tools call a command, or a command in words -> what it is called here: names, or a whole call."""

MEANT_OF_KOHYA: Mapping[str, str] = {
    "--ratio": "-w", "--ratios": "-w", "--lbws": "-w", "--dim": "--rank", "--new-rank": "--rank",
    "--network-dim": "--rank", "--new-conv-rank": "--rank", "--conv-dim": "--rank", "--network-alpha": "--alpha",
    "--save-precision": "--dtype", "--sd-model": "--base", "--model-org": "--base", "--merge-to": "--output",
    "--dynamic-method": "--sv-fro", "--dynamic-param": "--sv-fro", "--network-weights": "--adapter",
}  # fmt: skip
"""What the scripts of kohya's sd-scripts call an option, with `-` for `_` -> what it is called here."""

MEANT_OPTIONS: Mapping[str, str] = {
    "--scale": "-w", "--scales": "-w", "--scaling": "-w", "--strength": "-w",
    "--multiplier": "-w", "--lora-scale": "-w", "--weights": "-w", "--out": "--output",
    "--out-dir": "--output", "--output-dir": "--output", "--output-path": "--output", "--save-to": "--output",
    "--overwrite": "--force", "--precision": "--dtype", "--model": "--base", "--lora": "--adapter",
    **MEANT_OF_KOHYA,
}  # fmt: skip
"""What other tools call an option -> what it is called here."""
