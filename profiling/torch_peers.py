"""The losses of torch's users: timm's AsymmetricLossMultiLabel and BCEWithLogits, eager and under torch.compile.

And the official code's AsymmetricLossOptimized. It is in no package: clone its repository, and name the folder in the
environment as ASL_OFFICIAL.

torch is imported when one of them is built. The tensors hold the same logits and labels as JAX's arrays; labels are
float32, as both losses want them, made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

INSTALL = "pip install '.[peers]'"
OFFICIAL, REPOSITORY = "ASL_OFFICIAL", "https://github.com/Alibaba-MIIL/ASL"
_LOSSES = "src/loss_functions/losses.py"


@functools.cache
def missing() -> str | None:
    """Why torch or timm can't be had, or None."""
    # torch.compile's caches would make the second compilation look quick.
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    for package in ("torch", "timm.loss"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed: {INSTALL}"
        except Exception as error:  # a torchvision of another torch, say
            return f"{package} can't be imported: {type(error).__name__}: {error}"
    return None


def _torch() -> Any:
    return importlib.import_module("torch")


def asymmetric() -> Any:
    return importlib.import_module("timm.loss").AsymmetricLossMultiLabel(
        gamma_neg=4, gamma_pos=1, clip=0.05, reduction="sum"
    )


def lacks_official() -> str | None:
    """Why the official code can't be had, or None."""
    folder = os.environ.get(OFFICIAL)
    if not folder:
        return f"the official code is no package: git clone {REPOSITORY}, and its folder in {OFFICIAL}"
    return None if (pathlib.Path(folder) / _LOSSES).is_file() else f"{OFFICIAL}={folder} has no {_LOSSES}"


def official() -> Any:
    specification = importlib.util.spec_from_file_location(
        "official_losses", pathlib.Path(os.environ[OFFICIAL], _LOSSES)
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.AsymmetricLossOptimized(gamma_neg=4, gamma_pos=1, clip=0.05)


def cross_entropy() -> Any:
    return _torch().nn.BCEWithLogitsLoss(reduction="sum")


def asymmetric_compiled() -> Any:
    return _torch().compile(asymmetric())


def cross_entropy_compiled() -> Any:
    return _torch().compile(cross_entropy())


def tensors(arrays: tuple[Any, Any], cuda: bool = False) -> tuple[Any, Any]:
    """Logits that want a gradient, in their own dtype, and float32 labels, from NumPy arrays."""
    torch = _torch()
    logits, labels = arrays
    x = torch.from_numpy(logits.astype("float32")).to(getattr(torch, logits.dtype.name))
    y = torch.from_numpy(labels.astype("float32"))
    if cuda:
        x, y = x.cuda(), y.cuda()
    return x.requires_grad_(), y


def step(total: Any, tensors: tuple[Any, Any], gradient: bool) -> Callable[[], Any]:
    """A call of the loss, with its gradient where that is asked for; on a GPU it returns before it has ended."""
    torch = _torch()
    logits, labels = tensors

    def run() -> Any:
        if gradient:
            value = total(logits, labels)
            found = value.detach(), torch.autograd.grad(value, logits)[0]
        else:
            with torch.no_grad():
                found = total(logits, labels)
        return found

    return run


def wait(_: Any) -> None:
    _torch().cuda.synchronize()


def has_cuda() -> bool:
    return missing() is None and _torch().cuda.is_available()
