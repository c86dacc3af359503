"""The README's tables of figures, between markers, from the JSON files.

A marker names the table and the device that it is about, <!-- profiling: speed cpu-... -->, so the README alone says
which files it has to agree with.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable

from profiling import cases, contenders, local, results, tables, targets
from profiling.cases import GRADIENT, IDS, IN_PLACE, ON_CHIP, ON_ODD_ROWS
from profiling.results import Document, Row

README = local.ROOT / "README.md"
END = "<!-- end of profiling -->"
_MARKED = re.compile(rf"<!-- profiling: (\w+) ([\w.-]+) -->\n(.*?){re.escape(END)}", re.DOTALL)


def rewritten(text: str, device: str | None, folder: pathlib.Path = results.FOLDER) -> str:
    """The README with its tables as the files have them; `device` is put in the place of the one that is named.

    Tables of a machine with huge pages make way for another machine's with huge pages, and those of an accelerator,
    which are kinds of their own, for another accelerator's.
    """
    accelerates = device is not None and has_chip(device, folder)

    def takes_the_place(kind: str, named: str) -> bool:
        if device is None or named in (*targets.TARGETS, "compiled") or accelerates != (kind in _OF_ACCELERATORS):
            return False
        return device.endswith(local.HUGE_PAGES) == named.endswith(local.HUGE_PAGES)

    def table(match: re.Match[str]) -> str:
        kind, named, before = match.groups()
        about = device if device is not None and takes_the_place(kind, named) else named
        body = TABLES[kind](about, folder)
        return f"<!-- profiling: {kind} {about} -->\n{body or before}{END}" if body else match.group(0)

    text = _MARKED.sub(table, text)
    if device is None or accelerates or device.endswith(local.HUGE_PAGES):
        return text

    def picture(match: re.Match[str]) -> str:
        return f"profiling/results/{device}/{match[1]}" if (folder / device / match[1]).exists() else match[0]

    return re.sub(r"profiling/results/[\w.-]+/(\w+\.png)", picture, text)


def has_chip(device: str, folder: pathlib.Path = results.FOLDER) -> bool:
    """Whether what was timed there is an accelerator, whose own time was told beside the clock's."""
    timed = results.load_or_empty(results.path_of(device, "speed", folder))
    return any("seconds_on_chip" in row.figures for row in timed.rows)


def disagreements(text: str, folder: pathlib.Path = results.FOLDER) -> list[str]:
    """What is wrong with the README: tables that aren't as the files have them, or that nothing marks."""
    found = []
    marked = _MARKED.findall(text)
    if not marked:
        return ["README.md has no table between markers"]
    for kind, device, body in marked:
        if kind not in TABLES:
            found.append(f"no table is called {kind}; there are {', '.join(TABLES)}")
        elif not (expected := TABLES[kind](device, folder)):
            found.append(f"the table {kind} is about {device}, of which {folder} has no figures")
        elif body != expected:
            found.append(
                f"the table {kind} of {device} isn't what the results have: python -m profiling report --redraw"
            )
    return found


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _source(documents: Iterable[Document], used: Iterable[str]) -> str:
    """The line under a table: machine, versions, dates and command of the runs that its figures come from."""
    runs = {key: run for document in documents for key, run in document.runs.items()}
    mine = [runs[key] for key in sorted(set(used))]
    packages = ("jax", "optax", "torch", "timm", "libtpu")
    versions = [
        f"{package} {' and '.join(found)}"
        for package in packages
        if (found := sorted({run.versions[package] for run in mine if package in run.versions}))
    ]
    machines = " and ".join(sorted({run.machine for run in mine}))
    dates = " and ".join(sorted({run.date[:10] for run in mine}))
    commands = " and ".join(sorted({f"`{run.command}`" for run in mine}))
    return f"\n{machines}; {', '.join(versions)}; {dates}; {commands}.\n"


def speed(device: str, folder: pathlib.Path) -> str:
    """Time, ratio, floor, growth and memory of the machine at hand."""
    timed = results.load_or_empty(results.path_of(device, "speed", folder))
    grown = results.load_or_empty(results.path_of(device, "growth", folder))
    planned = results.load_or_empty(results.path_of(device, "memory", folder))
    case = timed.main_case()
    rows, memory = timed.rows_of(case.name, GRADIENT), planned.rows_of(case.name, GRADIENT)
    in_place = timed.rows_of(case.name, IN_PLACE)
    by_batch, by_classes = (grown.rows_of(side, GRADIENT) for side in ("batch", "classes"))
    if not rows:
        return ""
    lines, used = [], []
    for contender in contenders.CONTENDERS:
        if contender.name not in rows:
            continue
        figures = rows[contender.name].figures
        of_memory = memory[contender.name].figures if contender.name in memory else {}
        slopes = [
            tables.number(side[contender.name].figures["slope"], ".2f") if contender.name in side else "-"
            for side in (by_batch, by_classes)
        ]
        given_up = in_place[contender.name].figures if contender.name in in_place else None
        lines.append(
            [
                contender.title,
                tables.milliseconds(figures["seconds"]),
                tables.ratio(figures),
                tables.milliseconds(given_up["seconds"]) if given_up else "-",
                tables.ratio(given_up) if given_up else "-",
                tables.percent(figures["fraction_of_floor"]),
                ", ".join(slopes),
                tables.mib(of_memory, "temporaries"),
                tables.mib(of_memory, "peak"),
                tables.seconds(figures["compile_seconds"]),
            ]
        )
        used += [
            side[contender.name].run
            for side in (rows, in_place, memory, by_batch, by_classes)
            if contender.name in side
        ]
    header = [
        case.name,
        "ms",
        "times ours (95 % interval)",
        "in place, ms",
        "times ours",
        "of the floor",
        "slope by batch, classes",
        "temporaries, MiB",
        "peak, MiB",
        "compile, s",
    ]
    copy = next(iter(rows.values())).figures["copy_bytes_per_second"]
    said = f"\nThe copy moved {copy / 1e9:.1f} GB/s."
    absent = [row for row in timed.rows if not row.measured and (row.case, row.mode) == (case.name, GRADIENT)]
    for note in dict.fromkeys(row.note for row in absent):
        said += f" Not measured: {', '.join(r.contender for r in absent if r.note == note)} ({note})."
    return _markdown(header, lines) + said + "\n" + _source([timed, grown, planned], used)


def measured(device: str, folder: pathlib.Path) -> str:
    """An accelerator's time, by the clock and by the chip: the contenders on two cases, and ours on the others."""
    timed = results.load_or_empty(results.path_of(device, "speed", folder))
    main = (ON_CHIP, ON_ODD_ROWS)
    rows = {case.name: timed.rows_of(case.name, GRADIENT) for case in cases.CASES}
    present = [c for c in contenders.CONTENDERS if any(c.name in rows[case.name] for case in main)]
    if not present:
        return ""
    header = ["", *(f"{case.name}: {what}" for case in main for what in _ON_CHIP)]
    lines = [[c.title, *itertools.chain(*(_on_chip(rows[case.name].get(c.name)) for case in main))] for c in present]
    said = ""
    if first := next((row.figures for row in timed.rows if "seconds_on_chip" in row.figures), None):
        clock, chip = (first[f"copy_bytes_per_second{by}"] / 1e9 for by in ("", "_on_chip"))
        said = f"\nThe copy moved {clock:,.0f} GB/s by the clock and {chip:,.0f} by the chip.\n\n"
    others = {name: found for name, found in rows.items() if name not in [case.name for case in main]}
    used = [row.run for found in rows.values() for row in found.values()]
    return _markdown(header, lines) + said + _by_chip(others) + _source([timed], used)


def _by_chip(rows: dict[str, dict[str, Row]]) -> str:
    """Case by case, what the chip takes for ours, and how many times that for others."""
    times = {
        case: {name: row.figures["seconds_on_chip"] for name, row in found.items() if "seconds_on_chip" in row.figures}
        for case, found in rows.items()
    }
    ours = next((c for c in contenders.CONTENDERS if c.ours and any(c.name in found for found in times.values())), None)
    if ours is None:
        return ""
    peers = [contenders.find(name) for name in ("closed-form", "ours-xla", "official", "ours-mosaic_gpu")]
    lines = [
        [
            case,
            f"{1e6 * found[ours.name]:.1f}",
            tables.percent(rows[case][ours.name].figures["fraction_of_floor_on_chip"]),
            *(f"{found[peer.name] / found[ours.name]:.2f}" if peer.name in found else "-" for peer in peers),
        ]
        for case, found in times.items()
        if ours.name in found
    ]
    header = ["on the chip", f"{ours.title}, us", "of the floor", *(f"{peer.title}, times" for peer in peers)]
    return _markdown(header, lines)


_ON_CHIP = ("ms", "times ours (95 % interval)", "on the chip, ms", "of the floor")


def _on_chip(row: Row | None) -> list[str]:
    if row is None:
        return ["-"] * len(_ON_CHIP)
    figures = row.figures
    return [
        tables.milliseconds(figures["seconds"]),
        tables.ratio(figures),
        tables.milliseconds(figures.get("seconds_on_chip")),
        tables.percent(figures.get("fraction_of_floor_on_chip")),
    ]


def pages(device: str, folder: pathlib.Path) -> str:
    """Time and ratio alone, of a machine whose large arrays lie in huge pages."""
    timed = results.load_or_empty(results.path_of(device, "speed", folder))
    case = timed.main_case()
    rows = timed.rows_of(case.name, GRADIENT)
    present = [contender for contender in contenders.CONTENDERS if contender.name in rows]
    if not present:
        return ""
    figures = [rows[contender.name].figures for contender in present]
    header = [f"{case.name}, huge pages", *(contender.title for contender in present)]
    lines = [
        ["ms", *(tables.milliseconds(found["seconds"]) for found in figures)],
        ["times ours (95 % interval)", *(tables.ratio(found) for found in figures)],
    ]
    return _markdown(header, lines) + _source([timed], [rows[contender.name].run for contender in present])


def chips(_: str, folder: pathlib.Path) -> str:
    """Memory and schedule of the chips that are compiled for."""
    planned = {name: results.load_or_empty(results.path_of(name, "memory", folder)) for name in CHIPS}
    scheduled = {name: results.load_or_empty(results.path_of(name, "schedule", folder)) for name in CHIPS}
    lines, used = [], []
    for contender in contenders.CONTENDERS:
        cells = []
        for name in CHIPS:
            memory = planned[name].rows_of(ON_CHIP.name, GRADIENT).get(contender.name)
            schedule = scheduled[name].rows_of(ON_CHIP.name, GRADIENT).get(contender.name)
            figures = schedule.figures if schedule else {}
            if name != "h100":
                cells.append(tables.number(figures.get("bundles_per_1024")))
            if name in ("v5e", "h100"):
                traffic, temporaries = (
                    tables.mib(memory.figures if memory else {}, k) for k in ("traffic", "temporaries")
                )
                cells.append(f"{traffic} ({temporaries})" if memory else "-")
            if name == "h100":
                cells.append(tables.number(figures.get("kernels"), "d"))
                cells.append(tables.number(figures.get("registers"), "d"))
            used += [row.run for row in (memory, schedule) if row]
        if any(cell != "-" for cell in cells):
            lines.append([contender.title, *cells])
    if not lines:
        return ""
    header = [
        ON_CHIP.name,
        "v5e: bundles per 1024",
        "v5e: traffic (temporaries), MiB",
        "v6e: bundles",
        "tpu7x: bundles",
        "H100: traffic (temporaries), MiB",
        "H100: kernels",
        "H100: registers",
    ]
    return _markdown(header, lines) + _source([*planned.values(), *scheduled.values()], used)


CHIPS = ("v5e", "v6e", "tpu7x", "h100")


def labels(_: str, folder: pathlib.Path) -> str:
    """What the forms of labels cost our kernels on the chips that are compiled for."""
    documents = {
        (name, kind): results.load_or_empty(results.path_of(name, kind, folder))
        for name in CHIPS
        for kind in ("memory", "schedule")
    }
    lines, used = [], []
    for form, what in (("int8", "a byte a label"), ("packed", "a bit"), ("sparse", f"{IDS} ids a row")):
        case = dataclasses.replace(ON_CHIP, labels=form).name
        cells = []
        for name in CHIPS:
            ours = contenders.default(name).name
            memory, schedule = (
                documents[name, kind].rows_of(case, GRADIENT).get(ours) for kind in ("memory", "schedule")
            )
            if name != "h100":
                cells.append(tables.number(schedule.figures["bundles_per_1024"] if schedule else None))
            if name in ("v5e", "h100"):
                sizes = (tables.mib(memory.figures if memory else {}, k) for k in ("traffic", "temporaries"))
                cells.append("{} ({})".format(*sizes) if memory else "-")
            used += [row.run for row in (memory, schedule) if row]
        if any(cell != "-" for cell in cells):
            lines.append([what, *cells])
    header = [
        ON_CHIP.name.removesuffix("-int8"),
        "v5e: bundles per 1024",
        "v5e: traffic (temporaries), MiB",
        "v6e: bundles",
        "tpu7x: bundles",
        "H100: traffic (temporaries), MiB",
    ]
    return _markdown(header, lines) + _source(documents.values(), used) if lines else ""


def head(device: str, folder: pathlib.Path) -> str:
    """The head without logits: on the machine at hand, on accelerators that ran it, on chips that are compiled for."""
    ran = sorted(path.name for path in folder.iterdir() if path.is_dir() and has_chip(path.name, folder))
    names = dict.fromkeys((device, *ran, *CHIPS))
    documents = {name: results.load_or_empty(results.path_of(name, "head", folder)) for name in names}
    lines = [
        [
            name,
            row.case,
            row.contender,
            f"{row.figures['figure']:,.2f} {row.figures['unit']}",
            tables.bound(row.figures),
        ]
        for name, document in documents.items()
        for row in document.rows
        if row.measured
    ]
    used = [row.run for document in documents.values() for row in document.rows if row.measured]
    header = ["", "features, classes, labels", "", "figure", "bound"]
    return _markdown(header, lines) + _source(documents.values(), used) if lines else ""


def parity(device: str, folder: pathlib.Path) -> str:
    """The worst error of each implementation and dtype over all regions, beside the careful version's."""
    document = results.load_or_empty(results.path_of(device, "parity", folder))
    rows = [row for row in document.rows if row.measured and row.mode != "row sums"]
    lines = []
    for name, dtype in dict.fromkeys((row.contender, row.case) for row in rows):
        mine = [row.figures for row in rows if (row.contender, row.case) == (name, dtype)]
        worst = {
            key: max((f[key] for f in mine if f.get(key) is not None), default=None)
            for key in ("loss_abs", "careful_loss_abs", "gradient_abs", "careful_gradient_abs", "gradient_ulps")
        }
        holds = all(
            row.figures["holds"] for row in document.rows if (row.contender, row.case) == (name, dtype) and row.measured
        )
        where = " in the interpreter" if any(r.note for r in rows if (r.contender, r.case) == (name, dtype)) else ""
        lines.append(
            [
                f"`{name}`{where}",
                dtype,
                *(
                    tables.error(worst[f"{what}_abs"])
                    + ("" if dtype == "float64" else f" ({tables.error(worst[f'careful_{what}_abs'])})")
                    for what in ("loss", "gradient")
                ),
                "holds" if holds else "**broken**",
            ]
        )
    if not lines:
        return ""
    header = ["", "logits", "loss: largest error (careful)", "gradient: largest error (careful)", "bound"]
    return _markdown(header, lines) + _source([document], [row.run for row in rows])


TABLES: dict[str, Callable[[str, pathlib.Path], str]] = {
    "speed": speed,
    "measured": measured,
    "pages": pages,
    "chips": chips,
    "labels": labels,
    "head": head,
    "parity": parity,
    "errors": parity,
}
_OF_ACCELERATORS = ("measured", "errors")
