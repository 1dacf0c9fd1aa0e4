"""Reading ahead changes no bit, reads no byte twice, is bounded, and hides no error."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reads import watch_reads

import babies
from onecard.checkpoint.model import Model, open_model
from onecard.core.errors import ResourceError
from onecard.core.tensors import pageable
from onecard.models.prefetch import ReadAhead, pinned_bytes
from onecard.models.slabs import dense_bytes, slabs_of
from onecard.models.walk import Walk
from walking import cpu_walk

ORDERS = {"forward": [0, 1, 2], "back": [2, 1, 0], "anew": [0, 1, 2, 0], "the same": [1, 1], "not as expected": [0, 2]}


def reading_ahead(model: Model, threads: int = 2) -> Walk:
    return replace(cpu_walk(model), ahead=ReadAhead(model.source, threads=threads))


def state(walk: Walk, index: int) -> dict[str, torch.Tensor]:
    return walk.load(index).layer.state_dict()


def until_read() -> None:
    """Waits for the threads."""
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join(60)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("family", ["scout", "maverick", "llama4-text", *babies.UNFUSED])
def test_a_block_read_ahead_is_the_block(baby: Callable[..., Path], family: str, threads: int) -> None:
    model = open_model(str(baby(family, 3)))
    plain, ahead = cpu_walk(model), reading_ahead(model, threads)
    for order in ORDERS.values():
        for index, then in zip(order, [*order[1:], -1], strict=True):
            ours = state(ahead, index)
            ahead.expect(then if order != ORDERS["not as expected"] else 1)
            theirs = state(plain, index)
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert torch.equal(ours[name], tensor), (index, name)
                assert ours[name].dtype == tensor.dtype


def test_nothing_is_read_twice(baby: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(str(baby("scout", 3)))
    reads, walk = watch_reads(monkeypatch), reading_ahead(model)
    for index in range(3):
        walk.load(index)
        walk.expect(index + 1)
        walk.expect(index + 1)  # it is expected already
        if index == 1:
            until_read()
    prefixes = tuple(model.adapter.block_prefix(index) for index in range(3))
    assert reads.times(model.folder) == {name: 1 for name in model.folder.names if name.startswith(prefixes)}


def test_no_more_than_a_block_waits(baby: Callable[..., Path]) -> None:
    """Of what is expected beyond it, each thread may hold one read."""
    model = open_model(str(baby("scout", 3)))
    names = [name for name in model.adapter.expected() if name.startswith(model.adapter.block_prefix(0))]
    slabs = slabs_of(model.adapter, model.source, names)
    block, largest = dense_bytes(model.source, slabs), max(dense_bytes(model.source, [slab]) for slab in slabs)
    given: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        given.append(nbytes)
        return pageable(nbytes)

    walk = replace(cpu_walk(model), ahead=ReadAhead(model.source, allocate, threads=2))
    walk.expect(0)
    walk.expect(1)
    until_read()
    assert block <= sum(given) <= block + 2 * largest
    walk.expect(2)  # block 0 is given up, and what was begun of block 1 is kept
    until_read()
    assert block < sum(given) <= 2 * (block + 2 * largest)
    walk.load(1)
    until_read()
    walk.load(2)
    assert sum(given) <= 3 * block


def test_pinned_memory_is_counted_as_torch_rounds_it() -> None:
    assert pinned_bytes([1, 3, 4, 5], threads=1) == 1 + 4 + 4 + 8 + 8
    assert pinned_bytes([], threads=2) == 0


def test_what_a_thread_cannot_read_the_load_raises(
    copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same error that the load itself meets, and later reads are not spoilt by it."""
    model = open_model(str(copied("llama4-text", 2)))
    walk = reading_ahead(model)
    walk.load(0)
    file = next(model.path.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 8])
    walk.expect(1)
    until_read()
    with pytest.raises(ResourceError) as ours:
        walk.load(1)
    with pytest.raises(ResourceError) as theirs:
        cpu_walk(model).load(1)
    assert str(ours.value) == str(theirs.value)
    file.write_bytes(whole)
    assert torch.equal(reading_ahead(model).load(1).weight("model.layers.1.self_attn.q_proj"), read_q(model))


def read_q(model: Model) -> torch.Tensor:
    return cpu_walk(model).read("model.layers.1.self_attn.q_proj.weight").float()


def test_threads_end_with_their_walk(baby: Callable[..., Path]) -> None:
    """Whatever ended it, an error or a signal: nothing waits for what was expected."""
    model = open_model(str(baby("scout", 2)))
    walk = reading_ahead(model)
    walk.expect(0)
    walk.expect(1)
    del walk
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]


SLOW = """
import os, signal, threading, time
from onecard.models import prefetch

class Slow:
    def stored(self, *_):
        time.sleep(600)

# A shell's job in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
prefetch.PATIENCE_SECONDS = 0.1
ahead = prefetch.ReadAhead(Slow())
ahead.expect(0, [("a", ()), ("b", ())], 1)
time.sleep(0.1)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
try:
    ahead.take(("a", ()))
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("blocked", ["[]", "[signal.SIGINT]"], ids=["", "the signal goes to another thread"])
def test_a_process_can_be_stopped_and_ends_although_a_disk_hangs(blocked: str) -> None:
    program = SLOW.replace("BLOCKED", blocked)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")
