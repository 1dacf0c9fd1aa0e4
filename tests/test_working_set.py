"""What `working_bytes` says a batch takes, against the tensors that are alive while it is quantized."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onecard.core.method import PRESETS, Method
from onecard.core.scheme import Scheme
from onecard.quantize import card, gptq
from onecard.quantize.site import quantize_batch, working_bytes

pytest.importorskip("triton")


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that live at a time, and the most so far."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set[int]()
        for tensor in given:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self.known:
            return
        self.known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return result


class Idle:
    """Stands for a kernel: it leaves what it is given, but for scales, which must be numbers."""

    def __init__(self, fills: int | None = None) -> None:
        self.fills = fills

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *tensors: Any, **constants: Any) -> None:
        if self.fills is not None:
            tensors[self.fills].fill_(1)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take no time and no memory, and matrices of any size are factored one by one."""
    monkeypatch.setattr(card, "CPU_TOO", True)
    kernels = card.kernels_for(torch.zeros(1))
    assert kernels is not None
    for name in ("product", "gptq", "refine", "restart", "tabu"):
        monkeypatch.setattr(kernels.kernels, f"{name}_kernel", Idle(0 if name == "gptq" else None))
    monkeypatch.setattr(kernels.kernels, "scale_kernel", Idle(3))
    monkeypatch.setattr(gptq, "FACTORED_TOGETHER", 128)


@pytest.mark.parametrize(
    ("name", "batch", "outputs", "inputs"),
    [
        ("fast", 3, 256, 2048),
        ("balanced", 3, 1024, 640),
        ("balanced", 4, 384, 896),
        ("best", 3, 1024, 640),
        ("best", 1, 512, 896),
    ],
)
def test_it_is_no_less_and_not_much_more_than_what_lives(
    name: str, batch: int, outputs: int, inputs: int, on_a_card: None
) -> None:
    method = Method(method=name, **{k: v for k, v in PRESETS[name].items() if k in Method.model_fields})
    w = torch.randn(batch, outputs, inputs)
    moment = torch.eye(inputs).repeat(batch, 1, 1)
    metric = torch.eye(outputs).repeat(batch, 1, 1) if method.output_metric else None
    with LiveBytes(w, moment, *([] if metric is None else [metric])) as counted:
        quantize_batch(w, moment, Scheme(4, 128, True), method, torch.bfloat16, metric)
    said = working_bytes(batch, outputs, inputs, metric is not None, method)
    assert counted.peak <= said <= 1.15 * counted.peak
