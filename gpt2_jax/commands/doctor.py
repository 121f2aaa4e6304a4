"""Say what this machine is, what is installed, what of it does harm, and what to do. Exit status 1 when something must be done.

python scripts/doctor.py

The lines above "to do" can be shared: they hold no name of a person or machine, no path and no network address.
"""

from __future__ import annotations

import argparse
import sys

from gpt2_jax.commands.command_line import help_text
from gpt2_jax.doctor import examine
from gpt2_jax.errors import as_typed, program_name


def main(words: list[str]) -> None:
    argparse.ArgumentParser(
        prog=program_name(),
        description=help_text(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(words)
    to_do, broken = [], False
    for finding in examine():
        mark = "!!" if finding.broken else "->" if finding.remedy else "  "
        print(f"{mark} {finding.subject:<14} {finding.found}", flush=True)
        to_do += [finding.remedy] if finding.remedy else []
        broken = broken or finding.broken
    print("\nto do:" if to_do else "\nnothing to do")
    for remedy in to_do:
        print(f"   {as_typed(remedy)}")
    sys.exit(1 if broken else 0)
