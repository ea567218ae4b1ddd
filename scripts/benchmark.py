#!/usr/bin/env python3
"""How fast a config runs here: python -m scripts.benchmark CONFIG [key=value ...] [--what ...] [--batch ...] [options]

  python -m scripts.benchmark configs/rectok/ditdh_xl.yaml --tokenizer-config configs/rectok/tokenizer.yaml
  python -m scripts.benchmark configs/toy/rectok_tokenizer.yaml --what train,decode --batch 1,8 --markdown docs/benchmarks.md
  python -m scripts.benchmark configs/dar/ar_l.yaml --tokenizer-config configs/dar/tokenizer.yaml --what sample,stream

Networks start from random weights and pictures are noise: neither weights nor data are needed, speed depends on
neither. Everything else is what the programs run: networks built and frozen by run/load.py; train is the trainer's own
step (forward, backward, clipping, AdamW, EMA, in parts of train.micro_batch; a generator encodes its pictures, unless
data.cache_latents is set); sample is that of run_sample.sh, with decoding to pixels and the config's `sample` section;
encode and decode are those of evaluations and of stored codes.
Three more can be asked for:

  generate      sample without the decoding
  uncached      generate with the whole sequence computed anew for every code
  stream        sample with every picture that can be seen on the way (scripts.sample --preview); the row says after
                which share of the time to the whole picture the first one was there

--against DIR times the original too, in the same run and in turn: DIR is a checkout of its repository, whose code runs in a
process of its own with what it imports installed here. Both sides have random weights of the same sizes, the same batch,
precision and device; theirs trains with AdamW, clipping and, where ours is compiled, torch.compile, samples as its own
sampling program does, and DiT^DH with classifier-free guidance alone. Not compared: training of tokenizers (their losses
need weights), stream and uncached. Ratios are printed and kept by --json. run/originals.py names every module and call that
is expected; it was written without the originals' code and has only been tried on stand-ins of the same names.

--versus WAY times the same call done in another way too, in the same process and in turn, and tells how many times as fast ours
is: the median over the turns, which what else the machine does hardly moves. On one thread of a CPU the process's own time
counts. WAY is one of
  eager         without torch.compile; with --mode compiled
  plain         as plain PyTorch does it: eager, nchw, matrix products by MKL on any processor
  nchw, nhwc    kernels of convolutions with the pixels of a channel, or the channels of a pixel, side by side
  uncached      of generate: the whole sequence computed anew for every code
  fresh         of sampling: no weights, caches and recordings are kept from call to call
--markdown then fills a table of these ratios.

--decode-steps 8,16 measures decode once for each number of steps, where the tokenizer decodes in steps. Columns:

  img/s         batch / median time of --repeats calls after --warmup, the device synchronised around each
  FLOPs/img     counted by torch on the meta device: matrix products and convolutions of the whole call, with backward
  mode          eager or compiled; --mode config (default) as train.compile, sample.compile and eval.compile say
  MFU           FLOPs per second of the peak of the device: in bf16 that of core/devices.py, where it knows the device;
                otherwise a product of matrices and a copy are timed first ("probed")
  floor         img/s if arithmetic ran at peak and every byte (weights at each use, key and value cache) moved once at
                the full bandwidth, the longer of the two; bound by flops or bytes
  first         seconds of the first call: compilation, captured graphs, library set-up
  memory        peak on the GPU during the timed calls; of the process on a CPU
"""

import shlex
from pathlib import Path

from core import cli
from core.errors import UserError, nearest
from scripts import command_line

DEFAULT = ("train", "encode", "decode", "sample")
WHAT = (*DEFAULT, "generate", "uncached", "stream")


def whole_numbers(text: str, option: str) -> list[int]:
    """Of "1,32,256"."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: whole numbers separated by commas") from None
    if min(numbers) < 1 or max(numbers) > command_line.MOST:
        raise UserError(f"{option} {text}: give 1 or more, at most {command_line.MOST:,}")
    return numbers


def main(arguments: list[str]) -> int:
    parser = command_line.parser_of("python -m scripts.benchmark", __doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--what", default=",".join(DEFAULT), help=f"of {','.join(WHAT)} (default: the first four, if they apply)"
    )
    parser.add_argument("--batch", default="32", help="batch sizes, 1,32,256 (default 32)")
    parser.add_argument("--mode", choices=("config", "eager", "compiled", "both"), default="config")
    parser.add_argument("--decode-steps", help="numbers of steps that decode is measured with, 8,16 (default: its own)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the config's")
    parser.add_argument("--tokenizer-config", help="config whose tokenizer is used, where the weights are not here")
    parser.add_argument("--guide-config", help="config of the weaker model of autoguidance")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of a row: fewer repeats of slow calls")
    parser.add_argument(
        "--against", metavar="DIR", help="checkout of the original's repository, timed in turn with ours"
    )
    parser.add_argument("--versus", metavar="WAY", help="eager, nchw, nhwc, uncached or fresh, timed in turn with ours")
    parser.add_argument("--markdown", help="file whose table gets the rows")
    parser.add_argument("--json", help="file whose list gets the rows, in numbers")
    options = command_line.within(parser.parse_intermixed_args(arguments))

    batches = whole_numbers(options.batch, "--batch")
    steps = whole_numbers(options.decode_steps, "--decode-steps") if options.decode_steps else []
    if options.repeats < 1 or options.warmup < 0 or options.seconds <= 0:
        raise UserError("--repeats: give 1 or more; --warmup: 0 or more; --seconds: more than 0")
    wanted = options.what.split(",")
    for word in wanted:
        if word not in WHAT:
            raise UserError(f'--what: "{word}" is not known.{nearest(word, WHAT)}')

    from core import dist
    from run import against, benchmark

    if options.versus and options.versus not in benchmark.WAYS:
        raise UserError(f'--versus: "{options.versus}" is not known.{nearest(options.versus, benchmark.WAYS)}')
    if options.versus and options.against:
        raise UserError("--versus and --against: one of them at a time is timed in turn with ours")
    if options.versus == "eager" and options.mode != "compiled":
        raise UserError("--versus eager: add --mode compiled, or both sides are the same")
    overrides = [*options.overrides, *([f"train.precision={options.precision}"] if options.precision else [])]
    config = benchmark.read_config(options.config, overrides, options.tokenizer_config)
    if config.task == "tokenizer":
        wanted = [word for word in wanted if word not in benchmark.OF_GENERATORS]
    job = benchmark.Job(
        config,
        wanted,
        batches,
        dist.pick_device(options.device),
        benchmark.read_guide(options.guide_config, config) if options.guide_config else None,
        tuple(steps),
        ("eager", "compiled") if options.mode == "both" else (options.mode,),
        options.warmup,
        options.repeats,
        options.seconds,
        against.Originals(options.against) if options.against else None,
        options.versus,
    )
    benchmark.check(job)
    rows = benchmark.run(job)
    if options.markdown and rows:
        benchmark.append_rows(Path(options.markdown), rows, arguments)
        print(f"added to {options.markdown}")
    if options.json and rows:
        benchmark.append_json(Path(options.json), rows, shlex.join(arguments))
        print(f"added to {options.json}")
    return 0


if __name__ == "__main__":
    cli.run(main)
