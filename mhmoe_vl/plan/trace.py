"""What a part of the model keeps, moves and computes, found by running the real code on tensors without memory.

Formulas for activations would have to know what autograd keeps of every module and backend, and would be wrong after
the next change of one. Instead one block of each kind (and embeddings, heads, visual codes) runs forward and backward
on fake tensors, and every operation is looked at: memory that is alive, and time as the larger of arithmetic at the
device's ceiling and traffic at its bandwidth.

What cannot be seen from here: memory that a GPU's kernels take as scratch, the allocator's fragmentation, caches.

Shape suffixes: B samples, L text tokens, N predictions, D width.
"""

from __future__ import annotations

import copy
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mhmoe_vl.models.attention import Rotation
from mhmoe_vl.models.config import ModelConfig
from mhmoe_vl.models.encoder import Block, MultiwayEncoder
from mhmoe_vl.models.heads import Nlvr2Head
from mhmoe_vl.models.streams import Streams
from mhmoe_vl.models.visual_tokenizer import AnyVisualTokenizer
from mhmoe_vl.moe import Experts
from mhmoe_vl.moe.cost import grouped_mm_flops
from mhmoe_vl.plan.devices import Device
from mhmoe_vl.plan.workload import Sample
from mhmoe_vl.tasks.base import at_least_float32


@dataclass(frozen=True)
class Work:
    """Forward or backward pass of a part.

    Attributes:
        flops: matrix products that are really executed, recomputation included.
        seconds: at the device's ceilings.
        num_calls: operations that the host issues.
    """

    flops: int = 0
    seconds: float = 0.0
    num_calls: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.seconds + other.seconds, self.num_calls + other.num_calls)

    def __mul__(self, factor: int) -> Work:
        return Work(factor * self.flops, factor * self.seconds, factor * self.num_calls)


@dataclass(frozen=True)
class Trace:
    """One part, forward and backward; bytes.

    Attributes:
        kept: alive between forward and backward pass, outputs included, inputs and copies of weights not.
        weight_copies: weights that autocast casts; it keeps them until the forward pass of the micro-batch ends.
        expert_copies: expert weights that the layer casts in every pass, alive as long as ``kept``.
        temporary: most that is alive on top of these, at any time.
    """

    kept: int
    weight_copies: int
    expert_copies: int
    temporary: int
    forward: Work
    backward: Work


class Tracer:
    """Traces parts of one model for a device and a precision.

    Args:
        dtype: of matrix products; weights and residual stream are float32.
        device: its ceilings, and its kind, which decides the expert backend.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, device: Device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._known: dict[Any, Trace] = {}

    def block(self, layer: int, sample: Sample, num_samples: int, *, checkpointed: bool) -> Trace:
        """One block; blocks of the same kind are traced once."""
        model = self.model
        key = (model.is_sparse(layer), model.has_vl_ffn(layer), sample, num_samples, checkpointed)
        if key not in self._known:
            self._known[key] = self._trace_block(layer, sample, num_samples, checkpointed)
        return self._known[key]

    def backend(self) -> str:
        """Expert backend of the sparse blocks, ``-`` if there are none."""
        layers = [layer for layer in range(self.model.depth) if self.model.is_sparse(layer)]
        if not layers:
            return "-"
        with torch.device("meta"):
            experts = next(m for m in Block(self.model, layers[0]).modules() if isinstance(m, Experts))
        return experts.explain(self.device.kind, self.dtype).backend

    def _trace_block(self, layer: int, sample: Sample, num_samples: int, checkpointed: bool) -> Trace:
        with torch.device("meta"):
            block = Block(self.model, layer)
        num_sequences = num_samples * sample.num_sequences
        drops_paths = self.model.drop_path > 0

        def make() -> Callable[[], Any]:
            streams = Streams(
                *(
                    torch.empty(num_sequences, length, self.model.dim, requires_grad=True)
                    for length in (sample.num_image_tokens, sample.num_text_tokens)
                )
            )
            valid_BL = mask = None
            if sample.num_text_tokens:
                valid_BL = torch.ones(num_sequences, sample.num_text_tokens, dtype=torch.bool)
                length = sample.num_image_tokens + sample.num_text_tokens
                mask = torch.ones(num_sequences, 1, length if sample.is_packed else 1, length, dtype=torch.bool)
            is_pair = sample.num_image_tokens > 0 and sample.num_text_tokens > 0
            # Of packed rows every token has the factor of its document.
            of_samples = (num_sequences, sample.num_text_tokens) if sample.is_packed else (num_sequences,)
            keep = torch.ones(2, *of_samples) if drops_paths else None
            rotation = None
            if self.model.positions == "rotary":
                positions_BL = torch.zeros(num_sequences, sample.num_text_tokens, dtype=torch.long)
                rotation = Rotation.of_positions(positions_BL, self.model.dim // self.model.num_heads)
            arguments = (streams, mask, valid_BL, is_pair, keep, None, rotation)

            def run() -> Any:
                if checkpointed:
                    streams, routings, _ = checkpoint(block, *arguments, use_reentrant=False)
                else:
                    streams, routings, _ = block(*arguments)
                return [*streams], routings

            return run

        return self._trace(block, make)

    def embeddings(self, sample: Sample, num_samples: int) -> Trace:
        """Everything of the encoder that is no block: embeddings, masks, final norms."""
        with torch.device("meta"):
            encoder = MultiwayEncoder(self.model.model_copy(update={"depth": 1, "vl_ffn_layers": 0}))
        encoder.blocks = nn.ModuleList()  # type: ignore[assignment]
        num_sequences, model = num_samples * sample.num_sequences, self.model

        def make() -> Callable[[], Any]:
            image = ids_BL = valid_BL = mask_BP = positions_BL = None
            if sample.num_image_tokens:
                image = torch.empty(num_sequences, 3, model.image_size, model.image_size, dtype=torch.uint8)
                mask_BP = torch.zeros(num_sequences, model.num_patches, dtype=torch.bool)
            if sample.num_text_tokens:
                ids_BL = torch.zeros(num_sequences, sample.num_text_tokens, dtype=torch.long)
                valid_BL = torch.ones_like(ids_BL, dtype=torch.bool)
                positions_BL = torch.zeros_like(ids_BL) if sample.is_packed else None
            blind = sample.num_image_tokens == 1

            def run() -> Any:
                output = encoder(
                    image,
                    ids_BL,
                    text_valid=valid_BL,
                    text_positions=positions_BL,
                    image_mask=None if blind else mask_BP,
                    blind=blind,
                )
                return [output.vision, output.text], None

            return run

        return self._trace(encoder, make)

    def head(self, head: nn.Module, num_rows: int) -> Trace:
        """A head and its cross entropy; ``head`` is on the meta device."""
        parts = 2 if isinstance(head, Nlvr2Head) else 1

        def make() -> Callable[[], Any]:
            shape = (num_rows, 2, self.model.dim) if parts == 2 else (num_rows, self.model.dim)
            hidden = [torch.empty(shape, requires_grad=True) for _ in range(parts)]
            return lambda: ([at_least_float32(head(*hidden)).log_softmax(-1)], None)

        return self._trace(head, make)

    def visual_codes(self, tokenizer: AnyVisualTokenizer, num_images: int) -> Trace:
        """The targets of masked patches; no backward pass. ``tokenizer`` is on the meta device."""
        # A copy, as tracing puts fake weights in their place.
        own = copy.deepcopy(tokenizer)

        def make() -> Callable[[], Any]:
            image = torch.empty(num_images, 3, self.model.image_size, self.model.image_size, dtype=torch.uint8)
            return lambda: ([own.encode(image)], None)

        return self._trace(own, make)

    def _trace(self, module: nn.Module, make: Callable[[], Callable[[], Any]]) -> Trace:
        """Run ``make()()``, which gives differentiable outputs and whatever else the model holds on to, and back."""
        in_16_bits = self.dtype != torch.float32
        if in_16_bits and self.device.kind == "cuda":
            _normalize_in_float32(module)
        with FakeTensorMode(), self._backends(module):
            _replace_weights(module)
            run = make()
            meter = _Meter(self.device, module)
            with meter, torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_16_bits):
                outputs, others = run()
                kept, copies, expert_copies = meter.alive["data"], meter.alive["weights"], meter.alive["experts"]
            forward = meter.take_work()
            differentiable = [output for output in outputs if output.requires_grad]
            if differentiable:
                with meter:
                    torch.autograd.backward(differentiable, [torch.empty_like(output) for output in differentiable])
            del others
            temporary = meter.most_alive - kept - copies - expert_copies
            return Trace(kept, copies, expert_copies, max(0, temporary), forward, meter.take_work())

    @contextmanager
    def _backends(self, module: nn.Module) -> Iterator[None]:
        """Fix the experts' backend as the device would choose it, not as fake CPU tensors would."""
        chosen = set()
        for experts in module.modules():
            if isinstance(experts, Experts):
                experts.backend = experts.explain(self.device.kind, self.dtype).backend
                if experts.backend == "loop":
                    # The loop reads the counts, which fake tensors do not have. Grouped matmuls do the same products
                    # and keep the same tensors.
                    experts.backend = "grouped_mm"
                chosen.add(experts.backend)
        if "fused" not in chosen:
            yield
            return
        # Off a GPU the kernels insist on the interpreter. Nothing is interpreted: only shapes are passed on.
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            else:
                os.environ["TRITON_INTERPRET"] = before


class _Meter(TorchDispatchMode):
    """Looks at every operation: work, and memory that is alive, in three classes (copies of expert weights, of other
    weights, and data). Weights and buffers themselves, and gradients once they are accumulated, do not count."""

    def __init__(self, device: Device, module: nn.Module) -> None:
        super().__init__()
        self.device = device
        self.alive = {"data": 0, "weights": 0, "experts": 0}
        self.most_alive = 0
        self._work = Work()
        self._seen = WeakIdKeyDictionary()
        self._weights = WeakIdKeyDictionary()
        for owner in module.modules():
            for buffer in owner.buffers(recurse=False):
                self._weights[buffer.untyped_storage()] = "weights"
            for parameter in owner.parameters(recurse=False):
                self._weights[parameter.untyped_storage()] = "experts" if isinstance(owner, Experts) else "weights"
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def take_work(self) -> Work:
        """The work since the last call."""
        work, self._work = self._work, Work()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _tensors((args, list((kwargs or {}).values())))
        outputs = _tensors(result)
        known = {id(tensor.untyped_storage()) for tensor in inputs}
        moves_data = func._schema.is_mutable or any(id(t.untyped_storage()) not in known for t in outputs)
        if moves_data:
            self._count(func, args, kwargs or {}, result, inputs, outputs)
        of_weights = "data"
        if func is torch.ops.aten._to_copy.default:
            of_weights = self._weights.get(args[0].untyped_storage(), "data")
        for tensor in outputs:
            self._note(tensor.untyped_storage(), of_weights)
        return result

    def _count(
        self, func: Any, args: Any, kwargs: Any, result: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        packet, device = func.overloadpacket, self.device
        formula = _FLOP_FORMULAS.get(packet) or flop_registry.get(packet)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
        floating = next((tensor.dtype for tensor in inputs if tensor.is_floating_point()), torch.float32)
        is_attention = "attention" in str(packet)
        ceilings = device.attention_flops if is_attention else device.matmul_flops
        arithmetic = flops / ceilings.get(str(floating).removeprefix("torch."), ceilings["float32"])
        if flops and not is_attention:
            # The CPU engine and the kernels take weights and biases of the experts too, which are no side of a product.
            is_whole_layer = str(packet).startswith("mhmoe_vl.")
            sides = [tensor for tensor in inputs if tensor.ndim == 3] if is_whole_layer else inputs
            arithmetic *= 1 + device.half_speed_width / _narrowest(sides)
        traffic = sum(map(_num_bytes, inputs)) + sum(map(_num_bytes, outputs))
        bandwidth = device.function_bandwidth if packet in _FUNCTIONS else device.memory_bandwidth
        seconds = traffic / bandwidth
        if packet in _HIDDEN_FUNCTIONS:
            seconds += _HIDDEN_FUNCTIONS[packet](*args) / device.function_bandwidth
        # A GPU computes while it loads. A CPU's products are blocked for its caches: what they stream adds up.
        seconds = arithmetic + seconds if device.kind == "cpu" else max(arithmetic, seconds)
        self._work += Work(flops, seconds, 1)

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        if storage in self._seen or storage in self._weights:
            return
        self._seen[storage] = True
        self._change(kind, storage.nbytes())
        weakref.finalize(storage, self._change, kind, -storage.nbytes())

    def _change(self, kind: str, num_bytes: int) -> None:
        self.alive[kind] += num_bytes
        self.most_alive = max(self.most_alive, sum(self.alive.values()))


def _normalize_in_float32(module: nn.Module) -> None:
    """As CUDA's autocast does; that of CPUs, which fake tensors get, normalises in 16 bits."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products of every query with every key; torch counts them for GPU attention only."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores again, then the gradients of scores, queries, keys and values."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return grouped_mm_flops(a.shape, b.shape)


_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten._grouped_mm: _grouped_mm,
}


aten = torch.ops.aten

#: Bound by exponentials and error functions where memory is faster than these.
_FUNCTIONS = {
    aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward, aten._softmax, aten._log_softmax,
}  # fmt: skip

#: Bytes that functions inside an operation read and write, in cache: the activations of the CPU engine, one pass
#: forward and two backward, where they are made again.
_HIDDEN_FUNCTIONS: dict[Any, Callable[..., int]] = {
    torch.ops.mhmoe_vl.segment_moe: lambda x, order, counts, weights, w1, *_: _activation_bytes(order, w1),
    torch.ops.mhmoe_vl.segment_moe_backward: lambda dy, x, order, counts, weights, w1, *_: (
        2 * _activation_bytes(order, w1)
    ),
}


def _activation_bytes(order_A: Tensor, w1_EDH: Tensor) -> int:
    return 2 * order_A.shape[0] * w1_EDH.shape[-1] * w1_EDH.element_size()


def _replace_weights(module: nn.Module) -> None:
    """Fake weights in place of those on the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _narrowest(inputs: Sequence[Tensor]) -> float:
    """Shortest side of a product of matrices or of stacks of them; infinite for convolutions."""
    return min((size for tensor in inputs if tensor.ndim in (2, 3) for size in tensor.shape[-2:]), default=math.inf)


def _num_bytes(tensor: Tensor) -> int:
    """What an operation touches: expanded tensors are no larger than their memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
