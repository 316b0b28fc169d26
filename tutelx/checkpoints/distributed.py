"""Folders of torch.distributed.checkpoint, read and written by one process without a process group."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from tutelx.checkpoints.state import State
from tutelx.errors import InvalidValueError

METADATA = ".metadata"

_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 writes it
    ("collections", "OrderedDict"),
    *(
        (metadata.__name__, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


def is_checkpoint(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read(folder: Path) -> State:
    """The whole state, in this process's memory.

    Raises:
        InvalidValueError: the folder holds no checkpoint, or its metadata asks for more than data.
    """
    if not is_checkpoint(folder):
        raise InvalidValueError(f"{str(folder)!r} holds no checkpoint: it has no file {METADATA!r}")
    state: State = {}
    _load_state_dict(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    return state


def write(state: State, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what no_dist asks for
        save(state, storage_writer=FileSystemWriter(folder), planner=DefaultSavePlanner(), no_dist=True)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a checkpoint's metadata and no others: a pickle may name any function, and call it."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise InvalidValueError(f"the checkpoint's metadata asks for {module}.{name}, which is no data")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, metadata.Metadata):
            raise InvalidValueError(f"{METADATA!r} holds a {type(found).__name__}, expected Metadata")
        for entry in (found.storage_data or {}).values():
            if PurePath(entry.relative_path).name != entry.relative_path:
                raise InvalidValueError(f"the checkpoint points to {entry.relative_path!r}, outside its folder")
        if found.storage_meta is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(_EmptyStateDictLoadPlanner):
    """Builds the state from what the checkpoint says of itself; values that are no tensors are read as data too."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))
