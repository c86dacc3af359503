"""A session on disk, so that a killed one can go on: Orbax checkpoints of one run after the other.

A session's steps are numbered through: step s of run r (both from 0, T steps a run) is DIR/<r * T + s>. A checkpoint
holds the trainer's arrays and, as JSON, the position, the settings and checksums. Each run's last one is kept, with its
curve and its weights, and so the kept ones together are the whole session.

Orbax writes a checkpoint under a temporary name and renames it when it is complete, so that a kill leaves nothing that
could be taken for one. It doesn't notice a changed byte in an array's data (seen with 0.12.8): the checksums do.

Of several processes, each writes, checks and reads its own devices' shards in the same directory, and the first one
writes the JSON. A process that fails in this ends the others (lifeline.py), and none renames a checkpoint before all
have written their parts of it.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import os
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import rich.console
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from phenotypes.training import Point, Position, Told, Trainer

# These don't decide the weights. The mesh does, in the last bits.
_NOT_SETTINGS = (
    *("output", "checkpoint_dir", "checkpoint_every", "resume"),
    *("processes", "process_id", "coordinator", "join_timeout", "launched"),
)

_T = TypeVar("_T")


class CheckpointError(Exception):
    """A checkpoint can't be written, read or used; the message is for the user."""


class Store:
    """The checkpoints of one session in one directory."""

    def __init__(self, options: argparse.Namespace, release: str, steps_per_run: int, console: rich.console.Console):
        """Opens options.checkpoint_dir and says where the session goes on.

        Args:
          options: the command line; a checkpoint made with another one is refused.
          release: of the data; likewise.
          steps_per_run: of every run.
          console: for the line that says so.

        Raises:
          CheckpointError: the directory can't be made or read, holds checkpoints though --resume isn't given, or its
            newest checkpoint is corrupted or of another session.
        """
        self.directory = options.checkpoint_dir.resolve()
        self.every = options.checkpoint_every
        self.steps_per_run = steps_per_run
        self.settings = {name: value for name, value in vars(options).items() if name not in _NOT_SETTINGS}
        self.settings["release"] = release
        self.runs = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"--checkpoint-dir: {self.directory} can't be made: {error.strerror}") from error
        self.manager = self._orbax(self._open, f"--checkpoint-dir: {self.directory} can't be opened")
        newest = self.manager.latest_step()
        self._compare_views(newest)
        if newest is None:
            if options.resume:
                console.print(f"No checkpoint in {self.directory} yet: starting from the beginning", soft_wrap=True)
            return
        if not options.resume:
            raise CheckpointError(
                f"{self.directory} holds a session's checkpoints: --resume continues it, and a new session needs "
                "another --checkpoint-dir"
            )
        session = self.session(newest)
        self._compare_settings(session["settings"])
        console.print(
            f"Resuming from {self.directory / str(newest)}: {session['run']} after "
            f"{session['position']['steps']} of {steps_per_run} steps",
            soft_wrap=True,
        )

    def keeper(self, run: str) -> "RunKeeper":
        """Of the session's next run, under a name for messages."""
        self.runs += 1
        return RunKeeper(self, run, (self.runs - 1) * self.steps_per_run)

    def steps(self) -> list[int]:
        """Of the complete checkpoints, in order."""
        return sorted(self.manager.all_steps())

    def session(self, step: int) -> dict[str, Any]:
        """A checkpoint's JSON."""
        args = ocp.args.Composite(session=ocp.args.JsonRestore())
        session = self._orbax(lambda: self.manager.restore(step, args=args).session, self._unreadable(step))
        if not isinstance(session, dict) or session.pop("crc32", None) != _text_checksum(session):
            raise CheckpointError(f"{self._unreadable(step)}: its JSON has changed since it was written")
        return session

    def arrays(self, step: int, like: dict[str, jax.Array], checksums: dict[str, int]) -> dict[str, jax.Array]:
        """A checkpoint's arrays, with the shapes, dtypes and shardings of `like`."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, like), strict=True)
        )
        arrays = self._orbax(lambda: self.manager.restore(step, args=args).state, self._unreadable(step))
        for name, array in arrays.items():
            for shard in array.addressable_shards:
                place = _place(name, array, shard.index)
                if checksums.get(place) != _checksum(shard.data):
                    raise CheckpointError(f"{self._unreadable(step)}: {place} has changed since it was written")
        return arrays

    def save(self, step: int, run: str, arrays: dict[str, jax.Array], position: Position) -> None:
        """Writes a checkpoint; the older ones go once it is complete."""
        session: dict[str, Any] = {
            "run": run,
            "settings": self.settings,
            "position": dataclasses.asdict(position),
            "checksums": _checksums(arrays),
        }
        session["crc32"] = _text_checksum(session)
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), session=ocp.args.JsonSave(session))
        good = f"{self.directory / str(self.steps()[-1])} is the last good one" if self.steps() else "there is none yet"
        failure = f"the checkpoint {self.directory / str(step)} can't be written ({good})"
        if not self._orbax(lambda: self.manager.save(step, args=args), failure):
            raise CheckpointError(f"{failure}: Orbax declined")

    def _open(self) -> ocp.CheckpointManager:
        keep = [checkpoint_managers.LatestN(2), checkpoint_managers.EveryNSteps(self.steps_per_run)]
        return ocp.CheckpointManager(
            self.directory,
            item_names=("state", "session"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,  # what kills have left; in the background, and a save waits for it
                # The next step gives the arrays' buffers away, and an error has to come up here and not later.
                enable_async_checkpointing=False,
            ),
        )

    def _compare_views(self, newest: int | None) -> None:
        if jax.process_count() > 1:
            views = multihost_utils.process_allgather(np.int32(-1 if newest is None else newest))
            for process in np.flatnonzero(views != views[0]):
                here, there = ("no checkpoint" if views[i] < 0 else f"checkpoint {views[i]}" for i in (0, process))
                raise CheckpointError(
                    f"--checkpoint-dir: {self.directory} isn't the same for all processes: process 0 finds {here} as "
                    f"the newest, process {process} {there}"
                )

    def _compare_settings(self, saved: dict[str, Any]) -> None:
        for name in self.settings.keys() | saved.keys():
            here, there = (json.dumps(settings.get(name)) for settings in (self.settings, saved))
            if here != there:
                what = "the ontology's release" if name == "release" else "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"--resume: {what} is {here} and the checkpoints in {self.directory} were made with {there}"
                )

    def _unreadable(self, step: int) -> str:
        steps = self.steps()
        older = [other for other in steps if other < step]
        if step < steps[-1]:
            advice = "it holds a finished run, and the session can't be resumed without it"
        else:
            advice = f"delete it to go on from {older[-1]}" if older else "there is no older one"
        return f"the checkpoint {self.directory / str(step)} can't be read ({advice})"

    def _orbax(self, call: Callable[[], _T], failure: str) -> _T:
        """Calls Orbax and turns whatever it raises, of which there are many types, into one sentence."""
        with _muted():
            try:
                return call()
            except Exception as error:
                reason = _reason(error)
            # Orbax's unfinished coroutines complain when they are collected: here, where they aren't heard.
            gc.collect()
        # Other writes of the same checkpoint may still be under way, and fail as unheard as this one.
        for logger in _loggers():
            logger.setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise CheckpointError(f"{failure}: {reason}")


class RunKeeper:
    """The checkpoints of one run: those after step `start` of the session, up to its last."""

    def __init__(self, store: Store, run: str, start: int):
        self.store, self.run, self.start = store, run, start

    def due(self, steps: int) -> bool:
        return self.store.every is not None and steps % self.store.every == 0

    def save(self, trainer: Trainer, position: Position) -> None:
        """Raises CheckpointError with the reason and the last good checkpoint."""
        step = self.start + position.steps
        if step not in self.store.steps():  # a resumed run may stop where it began
            self.store.save(step, self.run, _named(trainer.state), position)

    def restore(self, trainer: Trainer) -> Position | None:
        """Raises CheckpointError if the newest checkpoint is corrupted, or that of a finished run is gone."""
        steps = self.store.steps()
        last = self.start + self.store.steps_per_run
        ours = [step for step in steps if self.start < step <= last]
        if steps and steps[-1] > last and last not in ours:
            raise CheckpointError(f"{self.store.directory / str(last)}, the last checkpoint of {self.run}, is missing")
        if not ours:
            return None
        session = self.store.session(ours[-1])
        fresh = _named(trainer.state)
        arrays = self.store.arrays(ours[-1], fresh, session["checksums"])
        trainer.state = jax.tree.unflatten(jax.tree.structure(trainer.state), [arrays[name] for name in fresh])
        position = Position(**session["position"])
        position.curve = [Point(**point) for point in session["position"]["curve"]]
        position.told = [Told(*numbers) for numbers in session["position"]["told"]]
        return position


def _named(state: Any) -> dict[str, jax.Array]:
    """A pytree's leaves under their paths, in the pytree's order: the same file format for NNX and linen."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """Of all shards, by all processes together: each knows its own devices' bytes and every device's place."""
    ours = {
        _place(name, array, shard.index): _checksum(shard.data)
        for name, array in arrays.items()
        for shard in array.addressable_shards
        if shard.replica_id == 0
    }
    if jax.process_count() == 1:
        return ours
    indices = {name: array.sharding.devices_indices_map(array.shape).values() for name, array in arrays.items()}
    places = sorted({_place(name, arrays[name], index) for name in arrays for index in indices[name]})
    known = multihost_utils.process_allgather(np.array([ours.get(place, 0) for place in places], np.uint32))
    return dict(zip(places, map(int, known.max(axis=0)), strict=True))


def _place(name: str, array: jax.Array, index: tuple[slice, ...]) -> str:
    """The name alone for a whole array, and name[0:256, 0:1409] for a part of one."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True)]
    if bounds == [(0, size) for size in array.shape]:
        return name
    return f"{name}[{', '.join(f'{start}:{stop}' for start, stop in bounds)}]"


def _checksum(shard: jax.Array) -> int:
    return zlib.crc32(np.ascontiguousarray(shard).data)


def _text_checksum(session: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(session, sort_keys=True).encode())


def _reason(error: BaseException) -> str:
    """What went wrong in a few words; TensorStore's messages run to pages, with the system's error at the end."""
    within: BaseException | None = error
    while within is not None:
        if isinstance(within, OSError) and within.strerror:
            return within.strerror
        if code := re.search(r"os_error_code='(\d+)'", str(within)):
            return os.strerror(int(code[1]))
        within = within.__cause__ or within.__context__
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(name) for name in ("absl", "asyncio")]


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Without the tracebacks that Orbax logs beside the exception that it raises."""
    loggers = _loggers()
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    if not isinstance(sys.unraisablehook, _WithoutOrbax):
        sys.unraisablehook = _WithoutOrbax(sys.unraisablehook)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class _WithoutOrbax:
    """An unraisablehook that keeps quiet about the reads that were under way when another one failed.

    They end in TensorStore's threads at some later time and find their event loop closed, so it stays for good.
    """

    def __init__(self, hook: Callable[[Any], Any]):
        self.hook = hook

    def __call__(self, unraisable: Any) -> None:
        files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
        if hasattr(unraisable.object, "cr_code"):  # a coroutine that is collected before its first step has no frames
            files.append(unraisable.object.cr_code.co_filename)
        if str(unraisable.exc_value) != "Event loop is closed" and not any("orbax" in file for file in files):
            self.hook(unraisable)
