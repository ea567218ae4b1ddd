#!/usr/bin/env python3
"""Share a run: python -m scripts.publish RUN OWNER/NAME [--licence apache-2.0] [--private] [--dry-run] [--out FOLDER]

Makes a folder of the averaged weights (with class names, preprocessing, results and, for a generator, its tokenizer), the
configuration, the last preview and a model card, and sends it to a repository of the Hugging Face hub, which is made where
there is none. Measure first: what run_eval_tokenizer.sh and run_eval_generator.sh found of these weights is in the card.
Afterwards anyone can say hf://OWNER/NAME. HF_TOKEN (or `hf auth login`) says who you are, HF_ENDPOINT where the hub is.
"""

from pathlib import Path

from core import cli
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.publish", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run, or one of its checkpoints")
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument(
        "--licence", "--license", default="other", help="of the weights, by the hub's names (default other)"
    )
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument("--dry-run", action="store_true", help="put the folder together and send nothing")
    parser.add_argument(
        "--out", type=Path, help="the folder (default: publish/ in the run); one that was made so before is replaced"
    )
    options = parser.parse_args(arguments)

    from run.publish import Publication

    chosen = (options.run, options.repository, options.licence, options.private, options.out)
    print(Publication(*chosen, upload=not options.dry_run).publish())
    return 0


if __name__ == "__main__":
    cli.run(main)
