"""All measurements, their files, the pictures and the README's tables; or whether the README agrees with the files."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from rich.console import Console

from profiling import head, local, memory, parity, plots, readme, results, schedule, speed
from profiling.results import Run
from profiling.session import Session

# In this order: what is quick and says most comes first, in case the session is cut short.
PARTS: dict[str, Callable[[Session], None]] = {
    "parity": parity.measure,
    "speed": speed.measure,
    "memory": memory.measure,
    "schedule": schedule.measure,
    "head": head.measure,
}


def measure(session: Session, run: Run, folder: pathlib.Path = results.FOLDER) -> None:
    """Each part's rows go to their files as soon as it ends, or is ended."""
    for part in PARTS.values():
        before = len(session.rows)
        try:
            part(session)
        except KeyboardInterrupt:
            session.cut_short = True
        finally:
            results.save(session.rows[before:], run, folder)
        if session.cut_short:
            return


def redraw(console: Console, folder: pathlib.Path = results.FOLDER, path: pathlib.Path = readme.README) -> None:
    """The pictures of the device at hand and the README's tables, from the files."""
    for picture in plots.draw(local.slug(), folder):
        console.print(f"wrote {picture}")
    if path.exists():
        text = path.read_text()
        device = local.slug() if (folder / local.slug()).exists() else None
        fresh = readme.rewritten(text, device, folder)
        if fresh != text:
            path.write_text(fresh)
            console.print(f"rewrote the tables of {path}")


def check(console: Console, folder: pathlib.Path = results.FOLDER, path: pathlib.Path = readme.README) -> int:
    """Exit status 0 where the README's tables are what the files have."""
    wrong = readme.disagreements(path.read_text(), folder)
    for line in wrong:
        console.print(line, style="red", markup=False)
    if not wrong:
        console.print(f"{path.name} agrees with {folder}")
    return 1 if wrong else 0
