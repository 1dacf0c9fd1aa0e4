"""Rows between blocks are what was put, wherever they lie: in memory, on their way to a file, or in one."""

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.checkpoint import activations
from onecard.checkpoint.activations import Activations, Room
from onecard.core.errors import ResourceError
from onecard.core.lane import Lane, pinned_size

BATCH_BYTES = 2 * 3 * 4 * 4
ROOMS = {"memory": Room(0, 10**9), "files": Room(0, 0), "both": Room(0, 3 * BATCH_BYTES)}


def rows(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


KEYS = st.tuples(st.integers(0, 2), st.sampled_from(["a", "b"]), st.integers(0, 3))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS),
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("drop"), st.integers(0, 2)),
        st.tuples(st.just("drop stream"), st.integers(0, 2)),
        st.tuples(st.just("settle"), st.integers(0, 2)),
    ),
    max_size=30,
)


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@settings(max_examples=25)
@given(steps=STEPS)
def test_a_store_is_a_dictionary(tmp_path_factory: pytest.TempPathFactory, room: Room, steps: list) -> None:
    store, held = Activations(tmp_path_factory.mktemp("acts"), room=room), {}
    for number, (what, where) in enumerate(steps):
        match what:
            case "put":
                held[where] = rows(number)
                store.put(*where, held[where])
            case "get" if where in held:
                assert torch.equal(store.get(*where), held[where])
            case "drop":
                store.drop(where)
                held = {key: value for key, value in held.items() if key[0] != where}
            case "drop stream":
                store.drop(where, "a")
                held = {key: value for key, value in held.items() if key[:2] != (where, "a")}
            case "settle":
                store.settle(where)
    for key, value in held.items():
        assert torch.equal(store.get(*key), value)
    assert store.bytes_entering(0) == sum(BATCH_BYTES for key in held if key[0] == 0)
    store.close()


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_rows_are_copies_that_gradients_can_use(tmp_path: Path, room: Room) -> None:
    store = Activations(tmp_path, room=room)
    with torch.inference_mode():
        mine = rows(0)
        store.put(0, "a", 0, mine)
        mine.zero_()
    found = store.get(0, "a", 0)
    assert torch.equal(found, rows(0))
    assert not found.is_inference()
    found.requires_grad_().square().sum().backward()
    again = store.get(0, "a", 0)
    assert not again.requires_grad


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_what_is_settled_is_read_by_another_process(tmp_path: Path, room: Room) -> None:
    store = Activations(tmp_path, room=room)
    for batch in range(4):
        store.put(1, "a", batch, rows(batch))
        store.put(2, "a", batch, rows(10 + batch))
    store.settle(1)
    store.release(1)
    other = Activations(tmp_path)
    other.remove_files_but(1)
    assert all(torch.equal(other.get(1, "a", batch), rows(batch)) for batch in range(4))
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


def test_a_commit_comes_after_the_rows_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread writes, the rows are released and others are put under their keys."""
    store, began, go_on = Activations(tmp_path), threading.Event(), threading.Event()
    real = activations.files.write_tensors

    def slowly(*args: object, **kwargs: object) -> None:
        began.set()
        assert go_on.wait(10)
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(activations.files, "write_tensors", slowly)
    for batch in range(3):
        store.put(1, "a", batch, rows(batch))
    found = []
    future = store.keep(1, commit=lambda: found.extend(Activations(tmp_path).get(1, "a", n) for n in range(3)))
    assert began.wait(10)
    store.release(1)
    store.put(1, "a", 0, rows(99))
    assert not found
    go_on.set()
    future.result(10)
    assert all(torch.equal(one, rows(batch)) for batch, one in enumerate(found))
    assert torch.equal(store.get(1, "a", 0), rows(99))
    store.close()


def test_rows_are_settled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop of the walk back settles every place below it, again and again: only what is new is written."""
    written: list[Path] = []
    real = activations.files.write_tensors

    def noted(path: Path, *args: object, **kwargs: object) -> None:
        written.append(path)
        real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(activations.files, "write_tensors", noted)
    store = Activations(tmp_path)
    store.put(1, "a", 0, rows(0))
    store.settle(0, 1)
    store.put(1, "b", 0, rows(1))
    store.settle(0, 1)
    assert [path.name for path in written] == ["a-00000.safetensors", "b-00000.safetensors"]
    store.put(1, "a", 0, rows(2))
    store.settle(1)
    assert torch.equal(Activations(tmp_path).get(1, "a", 0), rows(2))
    assert torch.equal(Activations(tmp_path).get(1, "b", 0), rows(1))


def test_a_disk_that_fails_behind_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise ResourceError("the disk is full")

    monkeypatch.setattr(activations.files, "write_tensors", full)
    store = Activations(tmp_path, room=ROOMS["files"])

    def put_many() -> None:
        for batch in range(10):
            store.put(0, "a", batch, rows(batch))

    with pytest.raises(ResourceError, match="full"):
        put_many()
    store.close()


def test_pinned_memory_counts_as_torch_rounds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 96 bytes takes 128 of pinned memory, so a room of 300 holds two, and two again once they are gone."""
    assert [pinned_size(n) for n in (0, 1, 96, 128, 129)] == [0, 1, 128, 128, 256]
    monkeypatch.setattr(Lane, "ram_bytes", lambda self, nbytes: pinned_size(nbytes))
    store = Activations(tmp_path, room=Room(0, 300))
    for block in (0, 1):
        for batch in range(3):
            store.put(block, "a", batch, rows(batch))
        deadline = time.monotonic() + 30
        while not (written := list(tmp_path.glob(f"{block:04d}/*.safetensors"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [path.name for path in written] == ["a-00002.safetensors"]
        store.drop(block)
    store.close()
