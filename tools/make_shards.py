#!/usr/bin/env python3
"""Turn a folder of raw files into WebDataset shards that megad2v (and webdataset itself) reads."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.data.format import DATASET_FILE
from megad2v.data.make import classes_of, make_shards, parse_size
from megad2v.data.ranks import Ranks, serve, world
from megad2v.data.team import Team
from megad2v.errors import UserError
from megad2v.modalities.corpus import Corpus
from megad2v.modalities.speech.recording import DECODERS
from megad2v.modalities.speech.shards import LABELS, SpeechOptions, speech_corpus
from megad2v.modalities.text.documents import DOCUMENTS, SENTENCES, TextOptions
from megad2v.modalities.text.shards import LABELS as TEXT_LABELS
from megad2v.modalities.text.shards import text_corpus
from megad2v.modalities.vision.shards import ImageOptions, image_corpus

IMAGE = """\
INPUT is one folder per class, or one flat folder (no labels):

    INPUT/cat/001.jpg          class "cat"; folders below a class folder belong to it
    INPUT/dog/x/y/002.png      class "dog"

OUTPUT gets image-000000.tar, ... (plain tars: KEY.jpg, KEY.cls, KEY.json), index/, dataset.json and report.jsonl
(a line for every file that was skipped or converted, with the reason). Images are shuffled, so that every shard mixes
the classes; the bytes depend on the files and options alone, not on --workers or --mpi.

Upright 8-bit RGB files are copied byte for byte. Others (EXIF-rotated, CMYK, gray, 16-bit, transparent, larger than
--resize-short) are converted. Files that cannot be decoded in full are skipped.

examples:
  python tools/make_shards.py image --input imagenet/train --output shards/train --resize-short 256
  python tools/make_shards.py image --input imagenet/val   --output shards/val   --classes shards/train
"""
SPEECH = """\
INPUT is a folder of recordings, however deep: WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF, AU, SPHERE and whatever else
libsndfile reads, of any rate and any number of channels. OUTPUT gets speech-000000.tar, ... (plain tars: KEY.flac,
16 kHz mono 16-bit; KEY.txt, KEY.cls, KEY.json), index/, dataset.json and report.jsonl (a line for every file that was
skipped or converted, with the reason). Recordings are shuffled; the bytes depend on the files and options alone.

Channels are averaged. FLACs that are 16 kHz mono 16-bit already are copied byte for byte. Skipped are files that
cannot be decoded to their end, hold NaN, are silent, or shorter than --min-seconds. Nothing is normalised: training
does that.

Long recordings are cut into pieces of at most --max-seconds, at the quietest point of the last third of each; nothing
is lost between them. Recordings with a transcript stay whole, as nobody knows which words belong to which piece.

Transcripts (KEY.txt) come from INPUT/transcripts.tsv or the table that --transcripts names (header line, tabs; columns
"path" or "file", relative to INPUT, and "text" or "sentence"), from X.txt beside X.wav, and from LibriSpeech's
*.trans.txt, in this order. Training does not need them.

Labels (KEY.cls), for probes: where every recording lies in a folder directly below INPUT, and there are several, these
are the classes. Where folders are nested (LibriSpeech: speaker/chapter/file) there are none, unless
--labels folders takes the first level (there: speakers).

examples:
  python tools/make_shards.py speech --input LibriSpeech/train-clean-100 --output shards/train
  python tools/make_shards.py speech --input podcasts --output shards/podcasts --max-seconds 30
  python tools/make_shards.py speech --input digits/test --output shards/test --classes shards/train
"""
TEXT = """\
INPUT is a folder of texts, however deep, or one file: .txt, .jsonl (a record a line), .tsv (header line, tabs, no
quotes), each also as .gz or .zst; UTF-8. OUTPUT gets text-000000.tar, ... (plain tars: KEY.tokens.npy, the ids of one
document, each sentence ended by </s>; KEY.cls, KEY.json), tokenizer/, index/, dataset.json and report.jsonl (a line for
everything that was left out, with file, line and reason). The order of the parts of files is shuffled; the bytes depend
on the files and options alone.

Documents: a record of .jsonl and .tsv is one. Of .txt it is the whole file, what stands between blank lines
(--document blank-lines), or each line. Training never fills a block with two documents' text as if it were one.
Sentences, which blocks are cut between: a line, a paragraph (lines between blank lines, for hard-wrapped books), or the
whole document. Line ends inside a sentence stay as they are; those between sentences become </s>.

Nothing is changed in a sentence without --clean, which composes characters (NFC), drops control characters, makes one
space of white space, and leaves out sentences without a letter. Lines that are not UTF-8 are left out and named.
--dedupe keeps one of several documents with the same words.

Labels (KEY.cls), for probes: the column "label" of .tsv files, or --labels folders.

examples:
  python tools/train_tokenizer.py --input wiki --vocab-size 32000 --output tokenizer
  python tools/make_shards.py text --input wiki --tokenizer tokenizer --output shards/wiki --document blank-lines
  python tools/make_shards.py text --input books --tokenizer tokenizer --output books --sentence paragraph --clean
  python tools/make_shards.py text --input train.tsv --tokenizer tokenizer --output shards/probe
"""


def parser() -> argparse.ArgumentParser:
    """The command line: one subcommand for each modality."""
    top = argparse.ArgumentParser(description=__doc__)
    commands = top.add_subparsers(dest="modality", required=True, metavar="{image,speech,text}")
    image = _command(
        commands, "image", "images", "JPEG, PNG and WebP images, in class folders or one flat folder", IMAGE
    )
    image.add_argument(
        "--resize-short",
        type=int,
        metavar="N",
        help="reduce images whose short side exceeds N pixels to N (default: keep sizes); none is enlarged",
    )
    image.add_argument(
        "--quality", type=int, default=95, metavar="Q", help="JPEG quality of converted images (default: 95)"
    )
    speech = _command(commands, "speech", "recordings", "recordings of any format, rate and length", SPEECH)
    speech.add_argument(
        "--max-seconds",
        type=float,
        default=SpeechOptions.max_seconds,
        metavar="S",
        help="cut longer recordings that have no transcript; 0: cut none (default: %(default)g)",
    )
    speech.add_argument(
        "--min-seconds",
        type=float,
        default=SpeechOptions.min_seconds,
        metavar="S",
        help="leave out shorter recordings (default: %(default)g; what training takes is its own setting)",
    )
    speech.add_argument("--labels", choices=LABELS, default="auto", help="see below (default: auto)")
    speech.add_argument("--transcripts", type=Path, metavar="TSV", help="table of transcripts, see below")
    speech.add_argument(
        "--decoder",
        choices=DECODERS,
        default=SpeechOptions.decoder,
        help="torchaudio reads what its own backend reads, whole files at a time (default: %(default)s)",
    )
    _add_text(commands)
    return top


def _add_text(commands: argparse._SubParsersAction) -> None:
    text = _command(commands, "text", "texts", "text files, plain, JSON lines or tables, of any size", TEXT)
    text.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="what tools/train_tokenizer.py wrote"
    )
    defaults = TextOptions()
    text.add_argument(
        "--document", choices=DOCUMENTS, default=defaults.document, help="of .txt files (default: %(default)s)"
    )
    text.add_argument(
        "--sentence", choices=SENTENCES, default=defaults.sentence, help="what </s> ends (default: %(default)s)"
    )
    text.add_argument(
        "--field", default=defaults.field, metavar="NAME", help=".jsonl and .tsv: where the text is (default: text)"
    )
    text.add_argument("--clean", action="store_true", help="tidy sentences, see below")
    text.add_argument("--dedupe", action="store_true", help="keep one of several equal documents")
    text.add_argument(
        "--max-document-size",
        default="1MiB",
        metavar="SIZE",
        help="longer documents of .txt become several, cut between sentences (default: %(default)s)",
    )
    text.add_argument("--labels", choices=TEXT_LABELS, default="auto", help="see below (default: auto)")


def _command(commands: argparse._SubParsersAction, name: str, files: str, about: str, epilog: str):
    """A subcommand with the options that all have."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"Turn a folder of {files} into shards.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--input", type=Path, required=True, metavar="DIR", help=f"folder of {files}, see below")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder for the shards")
    cores = len(os.sched_getaffinity(0))
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"processes that read, convert and write; 0: none but the main one (default: all {cores} cores here)",
    )
    command.add_argument(
        "--mpi",
        action="store_true",
        help="the ranks that mpirun started do the work instead: mpirun -np 64 python tools/make_shards.py ... --mpi",
    )
    command.add_argument(
        "--max-shard-size",
        default="512MB",
        metavar="SIZE",
        help="largest tar, such as 512MB or 1GiB (default: %(default)s); several shards per data.window mix best",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shuffle (default: 0)")
    command.add_argument(
        "--classes",
        type=Path,
        metavar="DIR",
        help="take class names and ids from these shards (test sets: those of train)",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace shards that make_shards wrote to --output before, and drop an unfinished run of other options",
    )
    return command


def corpus(args: argparse.Namespace) -> Corpus:
    """What is to be turned into shards. Raises UserError."""
    folder = args.classes.parent if args.classes is not None and args.classes.name == DATASET_FILE else args.classes
    classes = classes_of(folder) if folder is not None else None
    if args.modality == "image":
        _check("--resize-short", 1 if args.resize_short is None else args.resize_short, 1, 65_535)
        _check("--quality", args.quality, 1, 100)
        return image_corpus(args.input, ImageOptions(args.resize_short, args.quality), classes)
    if args.modality == "text":
        size = parse_size(args.max_document_size, "--max-document-size")
        options = TextOptions(args.document, args.sentence, args.field, args.clean, args.dedupe, size)
        return text_corpus(args.input, args.tokenizer, options, labels=args.labels, classes=classes)
    options = SpeechOptions(args.max_seconds, args.min_seconds, args.decoder)
    return speech_corpus(args.input, options, labels=args.labels, classes=classes, transcripts=args.transcripts)


def run(args: argparse.Namespace, team: Team | None = None) -> str:
    """Make the shards; returns the line to print. Raises UserError."""
    if args.mpi and args.workers is not None:
        raise UserError("--workers: with --mpi the ranks do the work; leave it out, and start one rank a core")
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    _check("--workers", workers, 0, 1024)
    size = parse_size(args.max_shard_size)
    made = make_shards(
        corpus(args),
        args.output,
        workers=workers,
        max_shard_bytes=size,
        seed=args.seed,
        overwrite=args.overwrite,
        team=team,
    )
    return f"{args.output}: {made.summary}"


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}: expected {low} to {high}, got {value}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    if "--mpi" in (sys.argv[1:] if argv is None else argv):
        return _main_mpi(argv)
    return _main(argv, None)


def _main(argv: list[str] | None, team: Team | None) -> int:
    args = parser().parse_args(argv)
    try:
        print(run(args, team), flush=True)
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _main_mpi(argv: list[str] | None) -> int:
    """Rank 0 reads the command line and drives; all ranks end with its exit code, and it alone says why."""
    try:
        comm = world()
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return error.exit_code
    if comm.rank:
        return serve(comm)
    ranks, code = Ranks(comm), 1
    try:
        code = _main(argv, ranks)
    except SystemExit as error:  # argparse
        code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        ranks.release(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
