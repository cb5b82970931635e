"""The learned visual tokenizer (VQ-KD of BEiT v2, arXiv 2208.06366): an image's patches as numbers of codes.

Shape suffixes: B images, P patches, D width, K codes, C width of a code, M values of a patch (3 * patch_size^2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from mhmoe_vl.config import validate_config
from mhmoe_vl.errors import ConfigError, DataError
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.ema_codebook import nearest_codes
from mhmoe_vl.models.encoder import MultiwayEncoder, initial_std
from mhmoe_vl.models.tensor_bytes import tensor_bytes
from mhmoe_vl.models.visual_codebook import FORMAT as CODEBOOK_FORMAT
from mhmoe_vl.models.visual_codebook import VisualCodebook, patches_to_image

FORMAT = "mhmoe_vl/visual-tokenizer/1"


class CodeHead(nn.Module):
    """Hidden state of a patch to a place on the unit sphere: linear, tanh, linear, length 1; in float32 at least.

    ``center_C`` is taken away before the vector is normalised; :meth:`center_on` sets it once, before the first step
    (not in BEiT v2). What a fresh encoder gives has most of its length in common: on the sphere all patches would begin
    in one corner, and a small model on few steps may never leave it.
    """

    center_C: Tensor

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.register_buffer("center_C", torch.zeros(code_dim))
        for module in self.layers:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=initial_std(dim))
                nn.init.zeros_(module.bias)

    def forward(self, hidden_BPD: Tensor) -> Tensor:
        """``[B, P, C]`` of length 1."""
        return F.normalize(self.raw(hidden_BPD) - self.center_C, dim=-1)

    def raw(self, hidden_BPD: Tensor) -> Tensor:
        """What is centred and normalised then, ``[B, P, C]``."""
        with torch.autocast(hidden_BPD.device.type, enabled=False):
            return self.layers(hidden_BPD.to(torch.promote_types(hidden_BPD.dtype, torch.float32)))

    @torch.no_grad()
    def center_on(self, mean_C: Tensor) -> None:
        """Let ``mean_C``, the mean of what :meth:`raw` gives, be the centre."""
        self.center_C.copy_(mean_C)


class VisualTokenizer(nn.Module):
    """Assigns each patch the code nearest to what an encoder makes of it, all of the image seen.

    Images may have another size than the encoder was trained with: positions are resized.

    Args:
        encoder: of images.
        codes_KC: float32 unit vectors.
        mean_patches_KM: for each code the mean of the patches that have it, in [-1, 1].
        origin: what people may want to know of where it comes from (teacher, ...); JSON.
    """

    codes_KC: Tensor
    mean_patches_KM: Tensor

    def __init__(
        self,
        encoder: MultiwayEncoder,
        head: CodeHead,
        codes_KC: Tensor,
        mean_patches_KM: Tensor,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.code_head, self.origin = encoder, head, dict(origin or {})
        self.register_buffer("codes_KC", codes_KC)
        self.register_buffer("mean_patches_KM", mean_patches_KM)

    @property
    def num_codes(self) -> int:
        return self.codes_KC.shape[0]

    @property
    def patch_size(self) -> int:
        return self.encoder.config.patch_size

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Codes of every patch, int64 ``[B, P]``, row by row; ``image`` is uint8 ``[B, 3, H, W]``.

        In float32 whatever the precision of the training around it, so that codes that were written to shards are
        those that a run computes.
        """
        with torch.autocast(image.device.type, enabled=False):
            vectors_BPC = self.code_head(self.encoder(image).vision[:, 1:])
            return nearest_codes(vectors_BPC.flatten(0, 1), self.codes_KC).unflatten(0, vectors_BPC.shape[:2])

    @torch.no_grad()
    def decode(self, codes_BP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Image of mean patches, float in [-1, 1], ``[B, 3, H, W]``."""
        return patches_to_image(self.mean_patches_KM[codes_BP], self.patch_size, grid)

    def serialized(self) -> bytes:
        """Content of the safetensors file that :func:`load_visual_tokenizer` reads; the same bytes at every call."""
        config = {
            "model": self.encoder.config.model_dump(mode="json"),
            "origin": self.origin,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return tensor_bytes(tensors, {"format": FORMAT, "config": json.dumps(config)})


#: What gives the targets of masked patches: both have ``num_codes``, ``patch_size``, ``encode``, ``decode`` and
#: ``serialized``.
AnyVisualTokenizer: TypeAlias = VisualCodebook | VisualTokenizer


def load_visual_tokenizer(path: str | Path) -> AnyVisualTokenizer:
    """Read a visual tokenizer, of whichever kind its file says, in evaluation mode and on the CPU.

    Raises:
        DataError: no such file, or no visual tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such visual tokenizer; make one with python -m data_prep.fit_visual_codebook, or train one "
            "with a configuration of configs/tokenizer"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == CODEBOOK_FORMAT:
                return VisualCodebook.load(path)
            if metadata.get("format") != FORMAT:
                raise DataError(f"{path}: is not a visual tokenizer ({FORMAT} or {CODEBOOK_FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(metadata["config"])
        return build_visual_tokenizer(validate_config(ModelConfig, config["model"]), tensors, config["origin"])
    except SafetensorError as error:
        raise DataError(f"{path}: not readable as safetensors: {error}") from None
    except (ConfigError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged ({type(error).__name__}: {reason}); export the tokenizer again") from None


def build_visual_tokenizer(
    model: ModelConfig, tensors: Mapping[str, Tensor], origin: Mapping[str, Any]
) -> VisualTokenizer:
    """A tokenizer of given tensors, in evaluation mode; it makes no copies.

    Args:
        model: of the encoder.
        tensors: by name, as in the state dict.

    Raises:
        KeyError, RuntimeError: tensors that do not fit the model.
    """
    codes_KC = tensors["codes_KC"]
    # Whoever loads a tokenizer keeps the random numbers that come next.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        tokenizer = VisualTokenizer(
            MultiwayEncoder(model),
            CodeHead(model.dim, codes_KC.shape[1]),
            torch.empty(codes_KC.shape),
            torch.empty(codes_KC.shape[0], 3 * model.patch_size**2),
            origin,
        )
    tokenizer.load_state_dict(tensors, assign=True)
    return tokenizer.eval().requires_grad_(False)
