#!/usr/bin/env python3
"""A page in the browser to look into models: python -m scripts.playground [WEIGHTS or RUN ...] [--host H] [--port P]

Tokenize: a picture beside its reconstruction and the difference, its codes, and what becomes of it with fewer tokens or
scales, noise, other codes, or those of a second picture. Generate: pictures of classes, seen as they come about, from one
model or from two with the same seed. Each view shows the command that makes the same files.

WEIGHTS or RUN: run folders, checkpoints, files of weights, hf:// addresses, of tokenizers and of generators, which bring
their tokenizers. Without any: the small trained models in pretrained_models/tiny.
It listens on this machine alone. With --host 0.0.0.0 others reach it by the address with the token that is printed.
"""

from ipaddress import IPv4Address

from core import cli
from core.signals import Stopped
from scripts import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.playground", __doc__)
    parser.add_argument("models", nargs="*", metavar="WEIGHTS or RUN")
    parser.add_argument(
        "--host", type=IPv4Address, default="127.0.0.1", help="where to listen (default 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    options = command_line.within(parser.parse_intermixed_args(arguments))

    from core.weights import released
    from run.playground import views
    from run.playground.server import open_server

    models = views.Models(options.models or released.shipped(), print)
    for entry in models.entries:
        print(f"not shown: {entry.error}" if entry.error else f"{entry.kind} {entry.name} is ready")
    server = open_server(models, str(options.host), options.port)
    if server.token:
        print("warning: everyone who can reach this machine and knows the token can use these models")
    print(f"open {server.address} (Ctrl-C ends it)", flush=True)
    with server:
        try:
            server.serve_forever()
        except Stopped:
            print("the playground is closed")
    return 0


if __name__ == "__main__":
    cli.run(main)
