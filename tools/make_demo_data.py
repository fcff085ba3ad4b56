#!/usr/bin/env python3
"""Generate small corpora to try megad2v with: no download, the same files for the same seed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also where megad2v is not installed

from megad2v.errors import UserError
from megad2v.modalities.speech.synthetic import SPEAKERS, VOICES, write_demo_speech
from megad2v.modalities.text.synthetic import write_demo_text
from megad2v.modalities.vision.synthetic import CLASSES, write_demo_images

CORPORA = ("image", "speech", "text")

EPILOG = f"""\
OUT/image/<class>/*.jpg      one shape per class ({", ".join(CLASSES)}), 96 to 128 pixels a side
OUT/speech/<speaker>/*.wav   sentences of a made-up language ({", ".join(SPEAKERS)}), 2 to 4 s, 16 kHz mono
OUT/speech/transcripts.tsv   path, text
OUT/text/stories_*.txt       short stories in simple English, a sentence a line, a blank line between stories

espeak-ng speaks where it is installed; elsewhere, or with --voice formant, a small formant synthesiser, whose files are
the same for the same seed and version of numpy.

examples:
  python tools/make_demo_data.py demo
  python tools/make_demo_data.py demo-valid --images-per-class 25 --clips-per-speaker 5 --seed 2
  python tools/make_shards.py image --input demo/image --output shards/image
  python tools/make_shards.py speech --input demo/speech --output shards/speech
  python tools/train_tokenizer.py --input demo/text --vocab-size 1000 --output tokenizer
  python tools/make_shards.py text --input demo/text --tokenizer tokenizer --document blank-lines --output shards/text
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("out", type=Path, metavar="OUT", help="folder to write to; made if missing")
    top.add_argument(
        "--only", choices=CORPORA, action="append", metavar="CORPUS", help="image, speech or text (default: all)"
    )
    top.add_argument(
        "--images-per-class", type=int, default=250, metavar="N", help="pictures of each class (default: %(default)s)"
    )
    top.add_argument(
        "--clips-per-speaker", type=int, default=25, metavar="N", help="sentences by each voice (default: %(default)s)"
    )
    top.add_argument("--stories", type=int, default=3000, metavar="N", help="short texts (default: %(default)s)")
    top.add_argument("--voice", choices=VOICES, default="auto", help="what speaks, see below (default: auto)")
    top.add_argument("--seed", type=int, default=1, metavar="N", help="another seed, other files (default: 1)")
    top.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: all %(default)s cores here)",
    )
    top.add_argument("--overwrite", action="store_true", help="replace the demo corpora that are there")
    return top


def run(args: argparse.Namespace) -> list[str]:
    """Write the corpora; returns the lines to print. Raises UserError."""
    if min(args.images_per_class, args.clips_per_speaker, args.stories, args.workers) < 1:
        raise UserError("--images-per-class, --clips-per-speaker, --stories and --workers: expected at least 1")
    lines: list[str] = []
    common = {"workers": args.workers, "overwrite": args.overwrite}
    if "image" in (args.only or CORPORA):
        folder = args.out / "image"
        write_demo_images(folder, args.images_per_class, args.seed, **common)
        lines.append(f"{folder}: {args.images_per_class * len(CLASSES)} pictures in {len(CLASSES)} classes")
    if "speech" in (args.only or CORPORA):
        folder = args.out / "speech"
        voice = write_demo_speech(folder, args.clips_per_speaker, args.seed, voice=args.voice, **common)
        clips = args.clips_per_speaker * len(SPEAKERS)
        lines.append(f"{folder}: {clips} clips by {len(SPEAKERS)} speakers ({voice})")
    if "text" in (args.only or CORPORA):
        folder = args.out / "text"
        size = write_demo_text(folder, args.stories, args.seed, **common)
        lines.append(f"{folder}: {args.stories} stories ({size / 1e6:.1f} MB)")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is wrong."""
    args = parser().parse_args(argv)
    try:
        print("\n".join(run(args)))
    except UserError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
