"""``docs/reliability.md`` from what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtdiffusion_benchmarks.reliability import many
from mtdiffusion_benchmarks.reliability.children import LIMIT, MOST_MEMORY
from mtdiffusion_benchmarks.reliability.hangs import TIMEOUT
from mtdiffusion_benchmarks.reliability.topology import FILES, LOGGED

PAGE = Path("docs/reliability.md")
RESULT = Path("benchmarks/results/reliability.json")

_INTRODUCTION = """# Reliability

{answer} The faults were tried on the real commands, by

```sh
mtdiffusion bench reliability --out benchmarks/results/reliability.json
mtdiffusion bench reliability --docs
```

The second makes this page of what the first found. `--only` chooses faults, `--trials` says how often each is tried,
`--seed` draws other moments and other cases. It needs `hypothesis`. What was tried already and lost nothing is not
tried again. What lost something is, once it is mended: then the later trials alone are counted here.

## What counts as lost

- **Killed**: the command is killed, and the same command is started again. In the end every file has to have the bytes
  of a run that nothing interrupted. Nothing else may be there: no temporary file and no half-made folder, beside the
  results, in the cache, or where temporary files go.
- **Stopped and starved**: the command has to end with the status of its signal, or with status 2 and a sentence. A
  traceback counts as lost. Then the same as for what was killed.
- **Hostile files**: the command has to end with a sentence, within {seconds:.0f} seconds and {memory:.0f} GiB. Nothing
  in a file is run.
- **Two processes**, one of which is stopped or killed: the other ends by itself, with status 2 and a sentence, which
  names the one that is stopped. Then the same as for what was killed.
- **Numbers**: the message has to name the term, the step and the sample; of a moment, or of a file, the tensor.
  Checkpoints that stay have to be finite.
- **Made-up inputs**: each is used, or refused with a sentence, within {slow} seconds and {memory:.0f} GiB beyond what
  is there before.

Three things are left out of the comparison. TensorBoard's files have the time in their names. A benchmark's cells say
how many seconds something took. And for a process that loads data Python keeps files of its own among the temporary
ones, which stay there if that process is killed.

## How it is done

One process imports everything, and forks a child for each trial. A child runs the whole command line, on one thread.
Where a fault says that a new process starts, it starts from nothing.

Two processes are two children that meet by gloo, with `training.timeout` of {timeout} seconds; the moments at which one
of them is stopped or killed are uniform over the time after they have met.

Random moments are uniform over the time that the command takes. Up to four kills come one after another before it may
end. To be killed before an operation on files, a child counts its own, by Python's audit events.

The work is tiny: pictures of 4 × 4 pixels, six steps, a checkpoint every second step. Where there is no room for files,
it is a limit on the size of each. A disk that is full is a small file system in memory, which is mounted for the trial.
A clock that goes back does so for the command and for the files that are there by then.
"""


def page(result: Mapping[str, Any], topology: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    """The page, of what ``bench reliability``, ``bench topology`` and ``bench samples`` found."""
    from mtdiffusion_benchmarks.reliability.fuzzing import SLOW

    faults: Mapping[str, Mapping[str, Any]] = result["faults"]
    tried, lost = (sum(row[key] for row in faults.values()) for key in ("tried", "lost"))
    answer = (
        f"Something was lost in {lost:,} of {tried:,} trials." if lost else f"Nothing was lost in {tried:,} trials."
    )
    parts = [_INTRODUCTION.format(answer=answer, seconds=LIMIT, memory=MOST_MEMORY / 2**30, slow=SLOW, timeout=TIMEOUT)]
    parts.append("## What was found\n")
    for group in dict.fromkeys(row["group"] for row in faults.values()):
        parts.append(f"### {group}\n\n| fault | trials | something was lost |\n|---|---|---|")
        rows = ((name, row) for name, row in faults.items() if row["group"] == group)
        parts += [
            f"| {name} | {row['tried']:,} | {row.get('skipped') or row['lost'] or 'never'} |" for name, row in rows
        ]
        parts.append("")
    if lost:
        parts += [
            "What was lost:\n",
            *(f"- {name}: {text}" for name, row in faults.items() for text in row["examples"]),
            "",
        ]
    hardware = result["hardware"]
    parts += [
        *_on_any_processes(topology),
        *many.section(samples),
        "## Not tried\n",
        *(f"- {what}" for what in result["not_tried"]),
        "",
        f"mtdiffusion {result['version']}, torch {hardware['torch']}, Python {hardware['python']}, hypothesis "
        f"{result['hypothesis']}, {hardware['processor']}, {result['system']}; seed {result['seed']}. All trials took "
        f"{sum(row['seconds'] for row in faults.values()) / 60:.0f} minutes.",
        "",
    ]
    return "\n".join(parts)


def _on_any_processes(topology: Mapping[str, Any]) -> list[str]:
    """The section of what ``bench topology`` found."""
    rows: list[Mapping[str, Any]] = topology["rows"]
    resumed = [row for row in rows if row["resumed"]]
    quantities = [*FILES, LOGGED]
    most = max(row[what] for row in rows for what in quantities)
    verdict = f"below {topology['wanted']:.0e}" if most < topology["wanted"] else "more than is wanted"
    lines = [
        "## One run on any number of processes\n",
        f"The greatest difference is {most:.1e}, {verdict}.",
        "One process without accumulation is compared with every other way to share out the same training, in float64:",
        "processes × `training.accumulate`, and `training.parallel`. Each trains the run from its beginning, and each",
        f"goes on with what each has begun: {len(resumed)} pairs. The training takes {topology['steps']} steps, and is",
        f"gone on with after {topology['resumed_at']}. By\n",
        "```sh\nmtdiffusion bench topology --out benchmarks/results/topology.json\n```\n",
        f"| how it is shared out | {' | '.join(quantities)} | resumed from any: the greatest of all |",
        f"|---|{'---|' * len(quantities)}---|",
    ]
    for row in rows:
        if not row["resumed"]:
            worst = max(each[what] for each in resumed if each["ended"] == row["ended"] for what in quantities)
            lines.append(f"| {row['ended']} | {' | '.join(_size(row[what]) for what in quantities)} | {_size(worst)} |")
    return [
        *lines,
        "",
        "What is logged is the loss, its terms, those of held-out samples and the gradient's norm; of what is above 1,",
        "the difference is a share. All of it ran on the CPU, by torchrun and gloo, in "
        f"{topology['seconds'] / 60:.0f} minutes.",
        "",
    ]


def _size(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"
