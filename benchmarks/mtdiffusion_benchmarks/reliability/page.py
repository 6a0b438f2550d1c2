"""``docs/reliability.md`` from what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path("docs/reliability.md")
RESULT = Path("benchmarks/results/reliability.json")

_INTRODUCTION = """# Reliability

{answer}

`mtdiffusion bench reliability --out benchmarks/results/reliability.json` tries each fault below on the real commands, and `--docs` makes this page of what it found. `--only` chooses, `--trials` says how often, `--seed` draws other
moments and other cases. What was tried already is not tried again.

## What counts as lost

- **Killed**: the command is killed, and the same command is started again. At the end every file must have the bytes of a run that was not interrupted, and nothing else may be there: no temporary file, no half-made folder, in the
  folder of the work, in the cache, or where temporary files go.
- **Stopped and starved**: besides, the command must end with the status that its signal calls for, or with 2 and a sentence, and never with a traceback.
- **Hostile files**: the command must end with a sentence, within two minutes and two GiB. Nothing is unpickled.
- **Numbers**: the message names the term and the step, or the file and the tensor, or the sample; checkpoints that stay are finite.
- **Made-up inputs**: each is used, or refused with a sentence, within {slow} seconds.

Left out of the comparison are TensorBoard's files, whose names hold the time, and in a benchmark's cells the keys that tell seconds.

## How it is done

One process imports everything, and forks a child for each trial; a child runs the whole command line, on one thread. Moments are uniform over the time that the command takes, and up to four kills come one after another before it may
end. To kill before an operation on files, the child counts its own (Python's audit events) and kills itself before one of them. The work is tiny: 24 pictures of 4 × 4 pixels, six steps, a checkpoint every second.
"""


def page(result: Mapping[str, Any]) -> str:
    """The page."""
    from mtdiffusion_benchmarks.reliability.fuzzing import SLOW

    faults: Mapping[str, Mapping[str, Any]] = result["faults"]
    tried = sum(row["tried"] for row in faults.values())
    lost = sum(row["lost"] for row in faults.values())
    answer = f"Nothing was lost in {tried:,} trials." if not lost else f"In {lost:,} of {tried:,} trials something was."
    parts = [_INTRODUCTION.format(answer=answer, slow=SLOW), "## What was found\n"]
    for group in dict.fromkeys(row["group"] for row in faults.values()):
        parts.append(f"### {group}\n\n| fault | trials | something was lost |\n|---|---|---|")
        for name, row in faults.items():
            if row["group"] == group:
                parts.append(f"| {name} | {row['tried']:,} | {row['lost'] or 'never'} |")
        parts.append("")
    examples = [f"- {name}: {text}" for name, row in faults.items() for text in row["examples"]]
    if examples:
        parts += ["What was lost:\n", *examples, ""]
    hardware = result["hardware"]
    parts += [
        "## Not tried\n",
        *(f"- {what}" for what in result["not_tried"]),
        "",
        f"mtdiffusion {result['version']}, torch {hardware['torch']}, Python {hardware['python']}, hypothesis "
        f"{result['hypothesis']}, {hardware['processor']}, {result['system']}; seed {result['seed']}.",
        "",
    ]
    return "\n".join(parts)
