"""A checkpoint on the hub as its headers alone: config.json, the index, and the beginning of every shard; no weights.

huggingface_hub has the like (`get_safetensors_metadata`), but takes a shard whole when a server knows no ranges, reads
no header over 25 MB, looks at no file's length, follows a branch that may move under it, and gives no offsets. So the
ranges are read here, through its session (its endpoint, proxies, token, retries), all of one commit, and what a header
says is checked as that of a file on disk is.

Some formats keep a weight's shape in a tensor of a few bytes beside it, thousands of them in a large model. Weights
whose names differ in numbers alone (blocks, experts) share one reading of them; config.json's shapes, which every
weight is held against afterwards, are what finds out the one that is not like the others.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from ..core.errors import InputError, OnecardError, ResourceError, input_error
from ..core.tensors import TORCH_DTYPES, Index, TensorInfo
from .safetensors_header import LENGTH_BYTES, Header, header_bytes, parse_header
from .source import INDEX_NAME, Folder, join_headers, leaves_folder, shards_of

SIDE_FILES = ("config.json", INDEX_NAME, "quantize_config.json")
# Asked for at once of every shard: longer than most headers (Scout's fused shards: 10 kB), short beside any weights.
FIRST_BYTES = 2**16
# What may be read beside headers: a shape or a quant state. They have 16 to 200 bytes.
SMALL_BYTES, SMALL_DTYPES = 4096, ("I64", "U8")
# Requests at a time. The hub allows a client some thousands in five minutes; a model has at most hundreds of shards.
AT_ONCE = 16
TIMEOUT_SECONDS, RETRIES = 20.0, 3


@dataclass(frozen=True)
class RemoteFolder(Folder):
    """A Folder whose shards are on the hub. `path` holds SIDE_FILES alone; `sizes`: bytes of each shard; `small`: what
    was read of small tensors, by what they are like. Any other tensor must not be asked for, nor a digest."""

    sizes: tuple[int, ...]
    small: dict[tuple[str, TensorInfo], bytes]

    def get(self, name: str, index: Index = ()) -> torch.Tensor:
        data = self.small.get(_like(name, self.infos[name]))
        assert data is not None, f"{name}: what reads headers alone asked for a weight"
        info = self.infos[name]
        tensor = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).view(info.shape)
        return tensor[index] if index else tensor

    @property
    def file_bytes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        raise AssertionError("what reads headers alone asked for a digest of weights")


def open_remote(name: str) -> RemoteFolder:
    """The headers of the hub's model `name` (owner/name), of its newest commit. Raises InputError or ResourceError."""
    try:
        api = HfApi()
        found = api.model_info(name, timeout=TIMEOUT_SECONDS)
        present = {entry.rfilename for entry in found.siblings or ()}
        if "config.json" not in present:
            raise InputError(f"{name} on the hub has no config.json: name a checkpoint in the layout of transformers")
        # Into the hub's cache, where a later download finds them.
        place, *_ = [
            Path(api.hf_hub_download(name, file, revision=found.sha)).parent for file in SIDE_FILES if file in present
        ]
        shard_names, weight_map = shards_of(place, present, f"{name} on the hub")
        problems = [
            f"{INDEX_NAME} names {shard!r}, which is not beside it" for shard in shard_names if leaves_folder(shard)
        ]
        problems += [f"the shard {shard} is missing" for shard in shard_names if shard not in present]
        if problems:
            raise _unsound(name, problems)
        urls = {shard: hf_hub_url(name, shard, revision=found.sha, endpoint=api.endpoint) for shard in shard_names}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            read = dict(zip(urls, pool.map(_header, urls.values()), strict=True))
            problems = [f"{shard} {header}" for shard, (header, _) in read.items() if isinstance(header, str)]
            if problems:
                raise _unsound(name, problems)
            headers = {shard: header for shard, (header, _) in read.items() if not isinstance(header, str)}
            infos, offsets, shards = join_headers(place, headers, weight_map, [])
            wanted = _small(infos)
            spans = [(urls[offsets[t][0].name], offsets[t][1], infos[t].nbytes) for t in wanted.values()]
            small = dict(zip(wanted, pool.map(lambda span: read_range(*span)[0], spans), strict=True))
    except OnecardError:
        raise
    except Exception as error:  # the hub client raises its own and its HTTP library's kinds
        raise hub_error(name, error) from error
    return RemoteFolder(place, infos, offsets, shards, tuple(size for _, size in read.values()), small)


def _unsound(name: str, problems: Iterable[str]) -> InputError:
    return input_error(f"{name} on the hub cannot be read:", problems, "Tell its owner, or name another checkpoint.")


def hub_error(name: str, error: Exception) -> OnecardError:
    """What a failure of the hub client means to a user."""
    # A gated repository is, to the client, one that was not found as well.
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{name} is gated, and the hub gives it to nobody whom it does not know: accept its terms on its page, and "
            "log in with `hf auth login`; or name a local folder"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return InputError(
            f"{name} is no local folder, and the hub shows no such model: check the name; for a private model log in "
            "with `hf auth login`"
        )
    # The client's own file that is not there (FileNotFoundError) means that there is no network.
    if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        return InputError(f"{name} on the hub lacks a file that it names ({error}): name another checkpoint")
    return ResourceError(
        f"{name} is no local folder, and the hub could not give it ({type(error).__name__}). On a machine without "
        "network copy the checkpoint's folder here and name that; for a gated model log in with `hf auth login`"
    )


def _header(url: str) -> tuple[Header | str, int]:
    """A shard's header, or what is wrong with it; and the shard's bytes."""
    first, size = read_range(url, 0, FIRST_BYTES)
    try:
        length = header_bytes(first[:LENGTH_BYTES], size)
        text = first[LENGTH_BYTES:][:length]
        if len(text) < length:
            text += read_range(url, LENGTH_BYTES + len(text), length - len(text))[0]
        return parse_header(text, size), size
    except ValueError as error:
        return str(error), size


def read_range(url: str, begin: int, count: int) -> tuple[bytes, int]:
    """At most `count` bytes of a file from `begin` on, and the whole file's length. Never takes more than it was asked
    for: a server that knows no ranges is read to the end of the range, and not to the end of the file."""
    # Compressed, a range would be one of other bytes.
    headers = build_hf_headers() | {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, max_retries=RETRIES, timeout=TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        if not partial and begin:
            raise OSError("the server knows no byte ranges")
        told = response.headers["Content-Range"].rpartition("/")[2] if partial else response.headers["Content-Length"]
        data = b""
        for chunk in response.iter_raw():
            data += chunk
            if len(data) >= count:
                break
    return data[:count], int(told)


def _like(name: str, info: TensorInfo) -> tuple[str, TensorInfo]:
    """The same for tensors whose names differ in numbers alone."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name), info


def _small(infos: dict[str, TensorInfo]) -> dict[tuple[str, TensorInfo], str]:
    """One name of each kind of small tensor."""
    found: dict[tuple[str, TensorInfo], str] = {}
    for name, info in infos.items():
        if info.dtype in SMALL_DTYPES and info.nbytes <= SMALL_BYTES:
            found.setdefault(_like(name, info), name)
    return found
