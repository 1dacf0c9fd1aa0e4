"""Copies between a card and RAM beside the computation: pinned memory, and a stream of their own.

The card's copy engine and its kernels work at the same time if the copies are on another stream. Events say who waits
for whom, so the host waits for nothing until it reads a copy itself. On a CPU there is nothing to copy.

A tensor that a store keeps is read again by passes with gradients, which refuse tensors of torch's inference mode. So
whatever comes out of here is an ordinary tensor.
"""

from dataclasses import dataclass

import torch


def pinned_size(nbytes: int) -> int:
    """What torch takes for so many bytes of pinned memory: it rounds up to a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


@dataclass(frozen=True)
class InRam:
    """A copy in RAM that the card may still be writing."""

    _tensor: torch.Tensor
    _done: torch.cuda.Event | None = None

    def read(self) -> torch.Tensor:
        """The tensor, once it is complete. Not to be written to."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor.detach()


@dataclass(frozen=True)
class OnItsWay:
    """A copy on the device that may not be complete yet."""

    _tensor: torch.Tensor
    _done: torch.cuda.Event | None = None

    def arrived(self) -> torch.Tensor:
        """The tensor. Kernels that are started from now on wait for it; the host does not. Not to be written to."""
        if self._done is not None:
            computing = torch.cuda.current_stream(self._tensor.device)
            computing.wait_event(self._done)
            self._tensor.record_stream(computing)
        return self._tensor.detach()


class Lane:
    """The copies of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy where the tensor is, in memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)

    def ram_bytes(self, nbytes: int) -> int:
        """What `to_ram` takes for so many bytes."""
        return nbytes if self._stream is None else pinned_size(nbytes)

    def to_ram(self, tensor: torch.Tensor) -> InRam:
        """A copy in RAM; pinned, if the tensor is on a card."""
        if self._stream is None or tensor.device.type == "cpu":
            return InRam(self.copy(tensor))
        with torch.inference_mode(False), torch.no_grad():
            ram = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                ram.copy_(tensor, non_blocking=True)
                done = self._stream.record_event()
            tensor.record_stream(self._stream)
        return InRam(ram, done)

    def to_device(self, ram: InRam) -> OnItsWay:
        """Back to the device. What `to_ram` still writes is waited for: both are on one stream."""
        if self._stream is None:
            return OnItsWay(ram.read())
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            tensor = ram._tensor.to(self.device, non_blocking=True)
            return OnItsWay(tensor, self._stream.record_event())

    def pinned(self, tensor: torch.Tensor) -> InRam:
        """A CPU tensor in memory that the card can read by itself. On a CPU it is the tensor."""
        return InRam(tensor if self._stream is None else tensor.pin_memory())
