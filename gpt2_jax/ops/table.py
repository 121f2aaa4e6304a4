"""How the implementation of a seam is chosen: from a table, asked in order, the reference last.

A seam is one part of a training step that can be computed in several ways. Its table is a tuple of `Implementation`s.
`choose` takes the first that accepts the plan made so far, and remembers why the others were refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_jax.errors import Gpt2JaxError
from gpt2_jax.names import nearest

if TYPE_CHECKING:
    from gpt2_jax.compute.plan import Plan


class Fallback(str):
    """A refusal whose cause the user can mend, by an installation for example: with --strict it ends the run.

    A refusal that is a plain str has a cause that belongs to the machine or to other settings.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Implementation:
    """One way to compute a seam."""

    name: str
    accepts: Callable[[Plan], str | None]  # the reason for a refusal; None when it can serve the plan made so far
    why: str = ""  # why it is preferred to those behind it, for people
    only_by_name: bool = False  # never taken unless the user names it
    functions: Any = None  # what the seam calls


@dataclass(frozen=True)
class Choice:
    """The implementation that was taken, why, and why others could not be."""

    name: str
    reason: str
    refusals: tuple[tuple[str, str], ...] = ()
    fallbacks: tuple[str, ...] = ()  # refusals that --strict does not accept


def always(plan: Plan) -> None:
    """`accepts` of a reference implementation."""


def choose(seam: str, table: Sequence[Implementation], plan: Plan, requested: str = "auto", flag: str = "--matmul") -> Choice:
    """The first implementation that accepts the plan, or the one that is `requested` by name.

    Gpt2JaxError for a name that is not in the table, or one that cannot serve the plan.
    """
    if requested != "auto" and requested not in (names := [row.name for row in table]):
        raise Gpt2JaxError(f"{flag}: expected one of auto, {', '.join(names)}, found {requested!r}", f"{flag} auto")
    disabled = switched_off()
    refusals = {
        row.name: reason
        for row in table
        if (reason := SWITCHED_OFF if f"{seam}:{row.name}" in disabled else row.accepts(plan)) is not None
    }
    if requested in refusals:
        raise Gpt2JaxError(f"{flag} {requested}: expected to use it, found: {refusals[requested]}", f"{flag} auto")
    candidates = [row for row in table if row.name == requested or (requested == "auto" and not row.only_by_name)]
    chosen = next((row for row in candidates if row.name not in refusals), None)
    if chosen is None:
        raise Gpt2JaxError(
            f"{seam}: expected an implementation that can be used, found none: {'; '.join(refusals.values())}",
            "unset GPT2_JAX_DISABLE",
        )
    before = candidates[: candidates.index(chosen)]
    return Choice(
        chosen.name,
        chosen.why if requested == "auto" else f"asked for with {flag} {requested}",
        tuple((name, str(reason)) for name, reason in refusals.items()),
        tuple(f"{seam}: not {row.name}: {reason}" for row in before if isinstance(reason := refusals[row.name], Fallback)),
    )


SWITCHED_OFF = "switched off by GPT2_JAX_DISABLE"


def switched_off() -> set[str]:
    """The implementations that GPT2_JAX_DISABLE names, as 'seam:implementation'; a name without a seam is of
    the seam 'linear'."""
    names = {name.strip() for name in os.environ.get("GPT2_JAX_DISABLE", "").split(",")} - {""}
    return {name if ":" in name else f"linear:{name}" for name in names}


def check_switched_off(known: Sequence[str]) -> None:
    """Gpt2JaxError when GPT2_JAX_DISABLE names an implementation that is not one of `known` ('seam:implementation')."""
    if unknown := sorted(switched_off() - set(known)):
        shown = ", ".join(name.removeprefix("linear:") for name in known)
        found = ", ".join(name.removeprefix("linear:") for name in unknown)
        meant = [_meant_by(name, known) for name in sorted(switched_off())]
        names = ",".join(name.removeprefix("linear:") for name in meant if name)
        instead = f"GPT2_JAX_DISABLE={names}   (or unset GPT2_JAX_DISABLE)" if all(meant) else "unset GPT2_JAX_DISABLE"
        raise Gpt2JaxError(f"GPT2_JAX_DISABLE: expected names of {shown}, found {found}", instead)


def _meant_by(name: str, known: Sequence[str]) -> str | None:
    """The nearest implementation of the nearest seam."""
    seam, _, implementation = name.partition(":")
    seams = nearest(seam, [row.partition(":")[0] for row in known])
    rows = nearest(implementation, [row.partition(":")[2] for row in known if seams and row.startswith(f"{seams[0]}:")])
    return f"{seams[0]}:{rows[0]}" if rows else None
