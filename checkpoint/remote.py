"""A checkpoint on the hub, read as headers only: config.json, the index, and the beginning of every shard; no weights.

huggingface_hub's own `get_safetensors_metadata` downloads a whole shard when a server does not support ranges, reads no
header over 25 MB, does not check a file's length, follows a branch that may move meanwhile, and gives no offsets. So
this module reads the byte ranges, all of one commit, through the hub client's session (endpoint, proxies, token,
retries), and checks headers in the same way as those of files on disk.

Some formats store a weight's shape in a small tensor beside it, thousands of them in a large model. Weights whose names
differ only in numbers (blocks, experts) share one such read. A weight that is unlike the others is found later, when
every shape is compared with config.json.
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
from ..core.tensors import TORCH_DTYPES, Allocate, Index, Stored, TensorInfo, pageable
from .safetensors_header import LENGTH_BYTES, Header, header_bytes, parse_header
from .source import INDEX_NAME, Folder, join_headers, leaves_folder, shards_of

SIDE_FILES = ("config.json", INDEX_NAME, "quantize_config.json")
# The first request for a shard: longer than most headers (Scout's fused shards: 10 kB), tiny compared with weights.
FIRST_BYTES = 2**16
# Tensors that are read besides headers: shapes and quant states, of 16 to 200 bytes.
SMALL_BYTES, SMALL_DTYPES = 4096, ("I64", "U8")
# Parallel requests. The hub allows thousands in five minutes, and a model has at most hundreds of shards.
AT_ONCE = 16
TIMEOUT_SECONDS, RETRIES = 20.0, 3


@dataclass(frozen=True)
class RemoteFolder(Folder):
    """A Folder whose shards are on the hub; `path` holds SIDE_FILES only. Reading other than small tensors, or the
    digest, fails an assertion."""

    # Bytes of each shard.
    sizes: tuple[int, ...]
    # Content of small tensors, one entry for all that `_like` treats as equal.
    small: dict[tuple[str, TensorInfo], bytes]

    def stored(self, name: str, index: Index = (), allocate: Allocate = pageable) -> Stored:
        data = self.small.get(_like(name, self.infos[name]))
        assert data is not None, f"{name}: a caller that reads headers only asked for a weight"
        info = self.infos[name]
        tensor = torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[info.dtype]).view(info.shape)
        return Stored({name: tensor[index] if index else tensor}, lambda parts: parts[name])

    @property
    def file_bytes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def digest(self) -> str:
        raise AssertionError("a caller that reads headers only asked for a digest of weights")


def open_remote(name: str) -> RemoteFolder:
    """The headers of the hub model `name` (owner/name) at its newest commit. Raises InputError or ResourceError."""
    try:
        api = HfApi()
        found = api.model_info(name, timeout=TIMEOUT_SECONDS)
        present = {entry.rfilename for entry in found.siblings or ()}
        if "config.json" not in present:
            raise InputError(f"{name} on the hub has no config.json: name a checkpoint in the layout of transformers")
        # They land in the hub's cache, where a later download finds them.
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
    except Exception as error:  # the hub client raises its own errors and those of its HTTP library
        raise hub_error(name, error) from error
    return RemoteFolder(place, infos, offsets, shards, tuple(size for _, size in read.values()), small)


def _unsound(name: str, problems: Iterable[str]) -> InputError:
    return input_error(f"{name} on the hub cannot be read:", problems, "Tell its owner, or name another checkpoint.")


def hub_error(name: str, error: Exception) -> OnecardError:
    """The user's error for a failure of the hub client."""
    # The client's GatedRepoError is a RepositoryNotFoundError, so it is tested first.
    if isinstance(error, GatedRepoError):
        return InputError(
            f"{name} is gated: accept its terms on its hub page and log in with `hf auth login`, or name a local folder"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return InputError(
            f"{name} is no local folder, and the hub shows no such model: check the name; for a private model log in "
            "with `hf auth login`"
        )
    # A FileNotFoundError is about the client's own cache and means that there is no network.
    if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        return InputError(f"{name} on the hub lacks a file that it names ({error}): name another checkpoint")
    return ResourceError(
        f"{name} is no local folder, and the hub could not give it ({type(error).__name__}). On a machine without "
        "network copy the checkpoint's folder here and name that; for a gated model log in with `hf auth login`"
    )


def _header(url: str) -> tuple[Header | str, int]:
    """A shard's header, or what is wrong with it; and the shard's size in bytes."""
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
    """At most `count` bytes of a file from `begin` on, and the file's length.

    It never downloads more: when a server ignores ranges, reading stops at the end of the range. Raises the hub
    client's errors.
    """
    # A range of a compressed response would hold other bytes.
    headers = build_hf_headers() | {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, max_retries=RETRIES, timeout=TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        if not partial and begin:
            raise OSError("the server does not support byte ranges")
        length = response.headers["Content-Range"].rpartition("/")[2] if partial else response.headers["Content-Length"]
        data = b""
        for chunk in response.iter_raw():
            data += chunk
            if len(data) >= count:
                break
    return data[:count], int(length)


def _like(name: str, info: TensorInfo) -> tuple[str, TensorInfo]:
    """A key that is equal for tensors whose names differ only in numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name), info


def _small(infos: dict[str, TensorInfo]) -> dict[tuple[str, TensorInfo], str]:
    """One name of each kind of small tensor."""
    found: dict[tuple[str, TensorInfo], str] = {}
    for name, info in infos.items():
        if info.dtype in SMALL_DTYPES and info.nbytes <= SMALL_BYTES:
            found.setdefault(_like(name, info), name)
    return found
