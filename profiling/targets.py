"""Compile for chips that this machine does not have, and read what the compilers say.

TPU targets need libtpu (`pip install "jax[tpu]"`), CUDA targets jax-cuda13-plugin, jax-cuda13-pjrt and a ptxas; neither
needs the chip. The environment that libtpu wants has to be set before JAX starts: import this module first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# libtpu would ask the cloud's metadata server who it is, and holds a lock against a second process.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType

TPU = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CUDA = ("h100",)
# Pods: topology, and the (data, model) mesh that their chips make here.
PODS = {"v5e:16x16": (16, 16), "v6e:16x16": (16, 16), "v5p:8x8x8": (32, 16), "tpu7x:4x4x4": (16, 8)}
TARGETS = (*TPU, *CUDA)

# What XLA has to know of a card that it can't ask.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 device_memory_size: 84942979072 memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class MissingCompiler(RuntimeError):
    """This machine can't compile for the target; the message says what to install."""


@functools.cache
def device(target: str) -> Any:
    """A description of one chip, good for compiling and nothing else."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; expected one of {', '.join(TARGETS)}")
    try:
        if target in TPU:
            if importlib.util.find_spec("libtpu") is None:
                raise MissingCompiler('no libtpu: pip install "jax[tpu]"')
            found = topologies.get_topology_desc(topology_name=TPU[target], platform="tpu")
        else:
            if importlib.util.find_spec("jax_cuda13_plugin") is None:
                raise MissingCompiler("no CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt")
            _find_cuda_tools()
            found = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
    except MissingCompiler:
        raise
    except Exception as error:  # whatever a plug-in raises, the reason is all that matters
        raise MissingCompiler(f"the compiler for {target} doesn't start: {error}") from error
    return found.devices[0]


def pod(topology: str, data: int, model: int, kind: AxisType = AxisType.Explicit) -> jax.sharding.Mesh:
    """A mesh ("data", "model") over the chips of a pod that isn't here, good for compiling and nothing else."""
    device("v5e")  # or the reason why there is no compiler
    chips = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    return jax.sharding.Mesh(np.array(chips).reshape(data, model), ("data", "model"), axis_types=(kind, kind))


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Every operation of the program that moves data between chips: its name, and the bytes of its results a chip."""
    found = []
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    for shapes, name in re.findall(rf"= (.+?) ({names})(?:-start)?\(", compiled.as_text()):
        elements = re.findall(r"(pred|[a-z]+(\d+))\[([\d,]*)\]", shapes)
        sizes = [
            (int(bits) // 8 if bits else 1) * math.prod(int(n) for n in dims.split(",") if n)
            for _, bits, dims in elements
        ]
        found.append((name, sum(sizes)))
    return found


def compile_for(target: str, f: Callable[..., Any], *shapes: Any, dump: str | None = None) -> Any:
    """jit(f) compiled for one chip. `shapes` are pytrees of jax.ShapeDtypeStruct; `dump` is a folder for PTX."""
    chip = device(target)
    sharding = jax.sharding.SingleDeviceSharding(chip)
    platform = "tpu" if target in TPU else "cuda"
    options = {}
    if dump is not None:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True, "xla_dump_emitter_re": ".*"}
    with lowering_for(target):
        traced = jax.jit(f, in_shardings=sharding, out_shardings=sharding).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)


def lowering_for(target: str) -> contextlib.AbstractContextManager[Any]:
    """Where tracing and lowering have to know the chip: Pallas and our TPU kernel ask the abstract mesh for it."""
    return jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device(target)], ("x",)).abstract_mesh)


def temporary_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles of a loop, those of the loops inside it left out, and what they use of each unit.

    Attributes:
      depth: in how many loops it is; 0 for what is outside of all.
    """

    depth: int
    bundles: int
    used: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A TPU kernel's final schedule: bundles, one a cycle, loop by loop in the program's order.

    Attributes:
      grid: how often the outermost loop turns, dimension by dimension.
      units: the core's units by name, and how many operations each takes a cycle; fills from and spills to memory are
        listed as units of their own.
    """

    name: str
    loops: tuple[Loop, ...]
    grid: tuple[int, ...]
    units: tuple[tuple[str, int], ...]

    @property
    def by_depth(self) -> tuple[int, ...]:
        deepest = max(loop.depth for loop in self.loops)
        return tuple(sum(loop.bundles for loop in self.loops if loop.depth == d) for d in range(deepest + 1))

    @property
    def innermost(self) -> list[Loop]:
        """The loops that no other is in, but for the parts of a grid's block that are outside of its loops."""
        following = [*(loop.depth for loop in self.loops[1:]), 0]
        least = min(2, max(loop.depth for loop in self.loops))
        return [loop for loop, depth in zip(self.loops, following, strict=True) if max(depth, least) <= loop.depth]

    @property
    def spills(self) -> int:
        """Vector registers that innermost loops write to memory for want of room, and read back."""
        kinds = [k for k, (name, _) in enumerate(self.units) if ":" in name]
        return sum(loop.used[k] for loop in self.innermost for k in kinds)


def schedules(target: str, script: str, *arguments: str) -> list[Schedule]:
    """The schedules of all kernels that `python -c script` compiles. libtpu reads its flags once, hence a process.

    Where XLA compiles a fusion several times until its blocks fit, the last schedule is the one that stays.
    """
    device(target)
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = dict(os.environ, JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=flags)
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the script to be compiled failed: {done.stderr[-2000:]}")
        found = {}
        for path in sorted(glob.glob(f"{folder}/*-final_bundles.txt")):
            kernel = os.path.basename(path).rsplit("-", 2)[0]  # the time of its compilation, and its name
            name = re.sub(r"^\d+-", "", kernel)
            if "schedule-analysis" in path or name.startswith(("TLP", "<late")):
                continue
            (used,) = glob.glob(f"{folder}/{glob.escape(kernel)}-*-final_hlo-static-per-bundle-utilization.txt")
            with open(path) as bundles, open(used) as utilization:
                found[name] = _schedule(name, bundles.read(), utilization.read())
        return list(found.values())


_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2}:)?\s*:?\s*(>*)\s*\{")


def _schedule(name: str, bundles: str, utilization: str) -> Schedule:
    depths = [len(m.group(1)) for m in map(_BUNDLE.match, bundles.splitlines()) if m]
    grid = re.search(r"iteration_bounds: \(([\d, ]*)\)", bundles)
    _, names, capacities, _, *lines = utilization.splitlines()
    table = np.array([line.split() for line in lines if line.strip()], int)
    if len(table) != len(depths):
        raise RuntimeError(f"{name}: libtpu lists {len(depths)} bundles and what {len(table)} of them use")
    loops = [0]  # the depth of each
    inside = [0]  # the loops that the bundle before was in, from the outside in
    of_bundle = []
    for depth in depths:
        del inside[depth + 1 :]
        while len(inside) <= depth:
            inside.append(len(loops))
            loops.append(len(inside) - 1)
        of_bundle.append(inside[-1])
    belongs = np.array(of_bundle)
    return Schedule(
        name,
        tuple(
            Loop(depth, int((belongs == n).sum()), tuple(map(int, table[belongs == n].sum(axis=0))))
            for n, depth in enumerate(loops)
        ),
        tuple(int(n) for n in grid.group(1).split(",") if n.strip()) if grid else (),
        tuple((unit.strip(), int(n)) for unit, n in zip(names.split(","), capacities.split(), strict=True)),
    )


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says of a CUDA kernel, and what its PTX holds.

    Attributes:
      loads: how wide its loads from global memory are, in bytes.
      instructions: of PTX, all; loop: those between a label and the jump back to it.
      launch: programs, and threads of each; None where XLA doesn't tell.
    """

    name: str
    registers: int
    spilled_bytes: int
    loads: tuple[int, ...]
    instructions: int
    loop: int
    launch: tuple[int, int] | None


def resources(target: str, f: Callable[..., Any], *shapes: Any) -> list[Resources]:
    ptxas = os.path.join(_find_cuda_tools(), "bin", "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        compile_for(target, f, *shapes, dump=folder)
        launches = {}
        for path in glob.glob(f"{folder}/*thunk_sequence.txt"):
            with open(path) as file:
                for name, *sizes in re.findall(r"(\S+) grid: \[([^\]]*)\] threads: \[([^\]]*)\]", file.read()):
                    programs, threads = (math.prod(map(int, size.split(","))) for size in sizes)
                    launches[name] = (programs, threads)
        found = []
        for path in sorted(glob.glob(f"{folder}/*.ptx")):
            with open(path) as file:
                ptx = file.read()
            for name in re.findall(r"\.entry (\w+)", ptx):
                command = [ptxas, "-arch=sm_90a", "-v", path, "-o", os.devnull]
                said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
                loads = tuple(
                    int(count or 1) * int(bits) // 8
                    for count, bits in re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)", ptx)
                )
                body = ptx[ptx.index(f".entry {name}") :]
                found.append(Resources(name, registers, spilled, loads, *_instructions(body), launches.get(name)))
    return found


def _instructions(body: str) -> tuple[int, int]:
    """Instructions of a kernel, and those of its loops."""
    labels: dict[str, int] = {}
    in_loops: set[int] = set()
    count = 0
    for line in body.splitlines():
        if label := re.match(r"\s*(\$\w+):", line):
            labels[label.group(1)] = count
        elif re.match(r"\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s.*;", line):
            count += 1
            if (jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)) and jump.group(1) in labels:
                in_loops.update(range(labels[jump.group(1)], count))
    return count, len(in_loops)


@functools.cache
def _find_cuda_tools() -> str:
    """A CUDA folder with bin/ptxas and nvvm/libdevice, from pip's nvidia-cuda-nvcc or the system."""
    folders = [os.environ.get("CUDA_HOME", "")]
    spec = importlib.util.find_spec("nvidia")
    folders += [os.path.join(path, "cu13") for path in (spec.submodule_search_locations if spec else None) or ()]
    folders += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    for folder in filter(None, folders):
        if os.path.exists(os.path.join(folder, "bin", "ptxas")):
            return folder
    raise MissingCompiler("no ptxas: pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88, or install CUDA 13")
