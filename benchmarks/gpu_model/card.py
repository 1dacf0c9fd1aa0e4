"""A card that is not there: every torch operation on it is counted, and computed on the meta device.

`Counting` sees what reaches torch's dispatcher. `Asked` sees calls before that, where the meta device would answer
otherwise than a card: attention's kernels, values as Python numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from . import cost
from .ledger import Ledger, line
from .tensors import CPU, CUDA, Pretended, changed, parts, tensors_in

aten = torch.ops.aten
# CPU tensors of more bytes than this have no values either: a model's weights are not there.
MOST_VALUES = 2**20
FREE = {"detach", "alias", "lift_fresh", "_unsafe_view", "lift_fresh_copy"}
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXERS = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Their results' sizes depend on values: the host waits.
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor", "bincount")
# Not deterministic on CUDA, or refused there when deterministic algorithms are asked for.
UNORDERED = ("index_add", "scatter_add", "scatter_reduce", "kthvalue", "cumsum", "put_", "histc", "median")


def is_unordered(name: str, args: Any) -> bool:
    """Whether an operation adds in an order that is not fixed, or may not be run deterministically."""
    if name.startswith("cumsum") and not args[0].dtype.is_floating_point:
        return False
    if name.startswith("bincount"):
        return len(args) > 1 and args[1] is not None
    if name.startswith(("index_put", "_index_put_impl")):
        return bool(len(args) > 3 and args[3])
    return name.startswith(UNORDERED) or "attention_backward" in name


@dataclass(frozen=True)
class _Call:
    """One operation as it reached the dispatcher, the device that its result lies on, and the project's line."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    ours: list[Pretended]
    said: torch.device
    where: str

    @property
    def name(self) -> str:
        return str(self.func).removeprefix("aten.")

    @property
    def packet(self) -> str:
        return self.name.split(".")[0]

    @property
    def on_card(self) -> list[Pretended]:
        return [x for x in self.ours if x.is_cuda]

    @property
    def is_free(self) -> bool:
        """Whether nothing is computed: a view, or memory without contents."""
        return self.func.is_view or self.packet in FREE or "empty" in self.packet

    def ends(self) -> tuple[torch.device, torch.device]:
        """Where a copy comes from and goes to."""

        def place(x: Any) -> torch.device:
            return CUDA if isinstance(x, Pretended) and x.is_cuda else CPU

        first = place(self.args[0])
        return (place(self.args[1]), first) if self.func is aten.copy_.default else (first, self.said)


class Counting(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        ours = [x for x in parts((args, kwargs)) if isinstance(x, Pretended)]
        wanted = kwargs.get("device")
        if not ours and (wanted is None or torch.device(wanted).type != "cuda"):
            return self._on_the_host(func, args, kwargs)
        on_card = any(x.is_cuda for x in ours)
        if wanted is None or (torch.device(wanted).type == "meta" and ours):
            said = CUDA if on_card else CPU
        else:
            said = CUDA if torch.device(wanted).type == "cuda" else CPU
        where = line() if on_card or said is CUDA or not self.ledger.is_main else "?"
        call = _Call(func, args, kwargs, ours, said, where)
        special = self._answered(call)
        if special is not NotImplemented:
            return special
        self._flag_mixing(call)
        out, inner = self._computed(call)
        if on_card or said is CUDA:
            self._count(call, inner, out)
        elif not call.is_free:
            self._count_host(call, inner, out)
        return self._wrapped(call, out)

    # --- what is computed

    def _on_the_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(("empty", "zeros", "ones", "full")) and kwargs.get("device", CPU) in (None, CPU):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            pinned = bool(kwargs.get("pin_memory"))
            size = args[0] if isinstance(args[0], list | tuple | torch.Size) else ()
            large = torch.Size(size).numel() * dtype.itemsize > MOST_VALUES
            if large or pinned:
                return self._allocated(torch.empty(size, dtype=dtype, device="meta" if large else "cpu"), pinned)
        return func(*args, **kwargs)

    def _allocated(self, inner: torch.Tensor, pinned: bool) -> Pretended:
        """Memory of the host."""
        return Pretended(inner, CPU, self.ledger, pinned)

    def _answered(self, call: _Call) -> Any:
        """Operations that give Python values, or nothing new."""
        match call.name:
            case "_local_scalar_dense.default":
                return self._number(call.args[0])
            case "equal.default":
                if call.on_card:
                    self.ledger.launch(cost.seconds_of_bytes(sum(map(cost.held, call.ours))), line())
                    self.ledger.sync("equal", line())
                return False
            case "_fused_sdp_choice.default":
                return 2
            case "_has_compatible_shallow_copy_type.default":
                return True
            case "_pin_memory.default":
                return self._allocated(call.ours[0].inner, True)
            case "is_pinned.default":
                return call.ours[0].pinned
            case "_to_copy.default" if call.ours:
                x, given = call.args[0], call.kwargs
                same = given.get("device") is not None and call.said is x.said and given.get("memory_format") is None
                if same and given.get("dtype") in (None, x.dtype):
                    return Pretended(x.inner, x.said, self.ledger, x.pinned)
        return NotImplemented

    def _number(self, x: Pretended) -> Any:
        if x.is_cuda:
            self.ledger.sync("item", line())
        if x.dtype == torch.bool and (x.truth is not None or x.inner.is_meta):
            return bool(x.truth)
        if not x.inner.is_meta:
            return x.inner.item()
        if x.truth is False:
            return 0
        return 1.0 if x.dtype.is_floating_point else 1

    def _flag_mixing(self, call: _Call) -> None:
        """Tensors of two devices in one operation. An index may lie on the CPU: it is copied, and the host waits."""
        flat = tensors_in((call.args, call.kwargs))
        others = [x for x in flat if not (isinstance(x, Pretended) and x.is_cuda) and x.dim()]
        if not call.on_card or not others or call.func in COPIES:
            return
        if call.func in INDEXERS and call.on_card[0] is flat[0]:
            self.ledger.sync("index from the CPU", call.where)
            return
        self.ledger.add(f"flag mixes devices: {call.name}", 1, call.where)

    def _computed(self, call: _Call) -> tuple[Any, Any]:
        """The result without wrappers, and the arguments that gave it."""

        func = call.func
        a, k = changed((call.args, call.kwargs), lambda x: x.inner if isinstance(x, Pretended) else x)
        tensors = tensors_in((a, k))
        made = not tensors and call.said is CUDA and call.packet != "arange"  # numbers in a row have values
        no_values = made or any(x.device.type == "meta" for x in tensors)
        no_values |= func is aten._to_copy.default and sum(map(cost.held, tensors)) > MOST_VALUES
        if no_values:
            a, k = changed((a, k), lambda x: x if x.is_meta else x.to("meta"))
        if k.get("device") is not None:
            k["device"] = torch.device("meta" if no_values else "cpu")
        k.pop("pin_memory", None)
        k.pop("non_blocking", None)
        if k.get("generator") is not None and no_values:
            k["generator"] = None
        if no_values and func in INDEXERS:
            a = self._chosen(call, a)
        if call.packet in cost.PRODUCTS and ".dtype" in call.name:
            return _wide_product(call.packet, a, k), (a, k)
        if no_values and func is aten.bincount.default:
            return self._even_counts(call.args, call.kwargs), (a, k)
        return func(*a, **k), (a, k)

    def _chosen(self, call: _Call, bare: Any) -> Any:
        """Masks as indices: all rows, or none where the mask is known to be false."""
        indices = []
        for given, index in zip(call.args[1], bare[1], strict=True):
            if index is None or index.dtype != torch.bool:
                indices.append(index)
                continue
            if call.on_card:
                self.ledger.sync("mask", call.where)
            rows = 0 if getattr(given, "truth", None) is False else index.shape[0]
            assert index.dim() == 1, "a mask of several axes"
            indices.append(torch.empty(rows, dtype=torch.long, device="meta"))
        return (bare[0], indices, *bare[2:])

    def _even_counts(self, args: Any, kwargs: Any) -> torch.Tensor:
        """Rows are spread evenly over the experts."""
        least = kwargs.get("minlength", args[2] if len(args) > 2 else 0) or 1
        rows = args[0].numel()
        counts = torch.full((least,), rows // least, dtype=torch.long)
        counts[: rows % least] += 1
        return counts

    # --- what is counted

    def _count(self, call: _Call, inner: Any, out: Any) -> None:
        ledger, where = self.ledger, call.where
        if call.func in COPIES and call.ends()[0] is not call.ends()[1]:
            outs = tensors_in(out)
            self._count_copy(call, cost.held(inner[0][1] if call.func is aten.copy_.default else outs[0]))
            return
        if any(call.name.startswith(op) for op in SIZED_BY_VALUES):
            ledger.sync(call.name, where)
        if call.is_free:
            ledger.view(where)
            return
        found = cost.of(call.func, call.name, inner, out)
        ledger.launch(found.seconds, where)
        ledger.add("bytes", found.nbytes, where)
        if found.flops:
            ledger.add(f"flops {found.kind}", found.flops, where)
        if is_unordered(call.packet, call.args):
            ledger.add(f"flag not deterministic: {call.name}", 1, where)

    def _count_copy(self, call: _Call, nbytes: int) -> None:
        """Between host and card: the host goes on only if it asks to, and its memory is pinned."""
        args = call.args
        on_host = [x for x in args[:2] if isinstance(x, torch.Tensor) and not (isinstance(x, Pretended) and x.is_cuda)]
        pinned = bool(on_host) and all(isinstance(x, Pretended) and x.pinned for x in on_host)
        asked = bool(call.kwargs.get("non_blocking") or (call.func is aten.copy_.default and args[2:3] == (True,)))
        self.ledger.copy(nbytes, "to card" if call.ends()[1] is CUDA else "from card", pinned and asked, call.where)

    def _count_host(self, call: "_Call", inner: Any, out: Any) -> None:
        """A CPU's operation on much data, which the host computes meanwhile."""
        nbytes = cost.moved(call.name, tensors_in(inner), tensors_in(out))
        if nbytes > MOST_VALUES:
            self.ledger.compute(nbytes)

    # --- what is given back

    def _wrapped(self, call: _Call, out: Any) -> Any:
        schema = call.func._schema
        written = [
            i for i, arg in enumerate(schema.arguments) if arg.alias_info is not None and arg.alias_info.is_write
        ]
        if written:
            args, kwargs = call.args, call.kwargs
            given = [args[i] if i < len(args) else kwargs.get(schema.arguments[i].name) for i in written]
            if not schema.returns:
                return None
            return given[0] if len(schema.returns) == 1 else tuple(given)
        truth = known(call.packet, call.ours)
        views = call.ours[0] if call.func.is_view and call.ours else None

        def wrap(x: torch.Tensor) -> torch.Tensor:
            if isinstance(x, Pretended):
                return x
            if call.said is CPU and x.device.type == "cpu":
                return x
            made = Pretended(x, call.said, self.ledger, views is not None and views.pinned)
            made.truth = truth
            return made

        return changed(out, wrap)


def _wide_product(packet: str, args: Any, kwargs: Any) -> torch.Tensor:
    """A product with sums wider than its factors, which only CUDA computes."""
    if "out" in kwargs:
        return kwargs["out"]  # type: ignore[no-any-return]
    first, second = args[:2] if packet in ("mm", "bmm") else args[1:3]
    dtype = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype))
    return torch.empty(*first.shape[:-1], second.shape[-1], dtype=dtype, device="meta")


def known(packet: str, ours: list[Pretended]) -> bool | None:
    """What is known of a result's truth."""
    truths = [x.truth for x in ours]
    match packet:
        case "all":
            return truths[0] is not False
        case "any":  # of numbers, some are not zero
            return truths[0] is True or ours[0].dtype != torch.bool
        case "ne":
            return True
        case "bitwise_not" | "logical_not":
            return truths[0] is False
        case "bitwise_and" | "logical_and":
            return False if False in truths else True if True in truths else None
        case "stack" | "cat":
            return False if False in truths else True if truths and all(truths) else None
    return truths[0] if len(truths) == 1 and packet in PASSED_ON else None


PASSED_ON = {
    "view",
    "sum",
    "_to_copy",
    "index",
    "slice",
    "select",
    "reshape",
    "expand",
    "unsqueeze",
    "squeeze",
    "clone",
    "detach",
}


# torch makes several operations of these.
KNOWN = {
    torch.isfinite: True,
    torch.Tensor.isfinite: True,
    torch.isnan: False,
    torch.Tensor.isnan: False,
    torch.isinf: False,
    torch.Tensor.isinf: False,
}


class Asked(TorchFunctionMode):
    """Calls that the meta device would answer otherwise than a card."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return func(*args, **kwargs).to(device)
        if func in KNOWN:
            out = func(*args, **kwargs)
            if isinstance(out, Pretended):
                out.truth = KNOWN[func]
            return out
        if func is torch.where and len(args) == 3:
            args = _as_tensors(*args)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], Pretended):
            return args[0].to(args[1].device, args[1].dtype)
        ours = [x for x in args if isinstance(x, Pretended)]
        if func is torch.Tensor.tolist and ours:
            return self._list(ours[0])
        if func is torch.Tensor.pin_memory and ours:
            return Pretended(ours[0].inner, CPU, self.ledger, pinned=True)
        if func is torch.nn.functional.scaled_dot_product_attention and ours:
            return attention(*args, **kwargs)
        if func is torch.nn.functional.rms_norm and ours:
            # A card's kernel is the one of layer_norm (ATen's layer_norm_kernel.cu); others take it apart.
            return aten.native_layer_norm(*args[:2], None, None, kwargs["eps"])[0]
        if func is torch.Tensor.numpy and ours:
            if ours[0].is_cuda:
                self.ledger.add("flag numpy() of a card's tensor")
            return ours[0].inner.numpy()
        return func(*args, **kwargs)

    def _list(self, x: Pretended) -> Any:
        if x.is_cuda:
            self.ledger.copy(cost.held(x), "from card", False, line())
        inner = x.inner
        return (torch.ones(inner.shape, dtype=inner.dtype) if inner.device.type == "meta" else inner).tolist()


def _as_tensors(condition: Any, one: Any, other: Any) -> tuple[Any, Any, Any]:
    """Numbers as scalars on the card's side, so that `where` stays there."""
    place = next((x for x in (condition, one, other) if isinstance(x, Pretended)), None)
    if place is None:
        return condition, one, other
    like = next((x for x in (one, other) if isinstance(x, torch.Tensor)), None)
    dtype = torch.float32 if like is None else like.dtype
    values = (
        x if isinstance(x, torch.Tensor) else torch.scalar_tensor(x, dtype=dtype, device=place.device)
        for x in (one, other)
    )
    return (condition, *values)  # type: ignore[return-value]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernels that a card takes: flash attention, or the memory-efficient one where there is a mask."""
    if enable_gqa:
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, 1, output_size=q.shape[1]) for x in (k, v))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    mask = attn_mask.expand(q.shape[0], q.shape[1], -1, -1).to(q.dtype)
    found = aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, torch.is_grad_enabled(), 0.0, is_causal, scale=scale
    )
    return found[0]  # type: ignore[no-any-return]
