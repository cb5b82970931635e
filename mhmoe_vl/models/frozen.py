"""A network beside the model: it makes targets, and is neither trained, saved, sharded nor counted."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Frozen(Generic[ModuleT]):
    """Holds a module in evaluation mode and without gradients.

    No ``nn.Module`` itself, so that a module which has it as an attribute does not take it for a part: it is in no
    state dict, optimizer or shard unit, and ``train()`` does not reach it.
    """

    def __init__(self, module: ModuleT) -> None:
        self._module = module.eval().requires_grad_(False)
        self._device: torch.device | None = None

    def on(self, device: torch.device) -> ModuleT:
        """The module, moved to ``device`` when that changes."""
        if device != self._device:
            self._module.to(device)
            self._device = device
        return self._module
