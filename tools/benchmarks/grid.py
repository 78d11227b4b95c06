"""Measures the grid of networks, sizes, batches and cores against peers: one command.

It says how long it will take, writes after every case, and continues with --resume. Otherwise it is
the part `step` with other defaults.
"""

from collections.abc import Sequence

from benchmarks import arguments as shared
from benchmarks import step
from benchmarks.results import Results
from effv2_jax.command import Parser
from effv2_jax.errors import UserError

_EPILOG = """\
example:
  python tools/benchmark.py grid --json grid.json --csv grid.csv --resume \\
      --peer-python timm=/venvs/timm/bin/python,keras-tf=/venvs/tf/bin/python
then
  python tools/benchmark.py tables grid.json
  python tools/benchmark.py draw grid.json --out pictures
"""


def run(arguments: Sequence[str]) -> None:
    """Measures, prints and writes.

    Raises:
        UserError: arguments that are wrong; nothing was measured. Or contestants that failed; the
            others were measured.
    """
    parser = Parser(__doc__, _EPILOG, prog="tools/benchmark.py grid")
    shared.add_cases(
        parser,
        models="efficientnetv2-b0,efficientnetv2-s",
        sizes="128,192,300",
        batches="8,16,32",
        cores="1,all",
    )
    step.add_flags(parser, peers_default="timm,keras-tf")
    parser.add_argument("--estimate", action="store_true", help="say how long it takes; no more")
    flags = step.read_flags(parser, arguments)
    if flags.json is None and not flags.estimate:
        raise UserError("--json is missing: a grid takes hours; name the file that keeps it")
    if flags.json is not None and flags.json.exists() and not flags.resume:
        raise UserError(f"--json {flags.json} exists: continue it with --resume, or name another")
    results = Results(flags.json, flags.csv, resume=flags.resume)
    if flags.estimate:
        left = [case for case in step.cases_of(flags) if not step.is_done(case, flags, results)]
        print(step.estimate(left, flags))
        return
    step.measure(flags, results)
