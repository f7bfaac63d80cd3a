"""Checkpoints as they lie on disk: one file, a model folder, or shards with an index.

Only headers are read until a tensor is asked for, and then only that tensor, with ``pread``.  A
memory map would keep every tensor touched in memory, hand out aliases of the file, and kill the
process when the file shrinks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import EFBIG
from functools import cached_property
from pathlib import Path
from typing import Any

from bulkedge._errors import CheckpointError, count, install
from bulkedge._globs import unwrapped

from .codec import Codec, weights_of
from .codec.gguf import gguf_weight
from .gguf import ENDING, read_gguf
from .gguf_names import gguf_config, heads_of, model_names
from .header import CAP_VARIABLE, TensorInfo, json_cap, parse_json, read_header, read_regular
from .hub import located
from .shard import shard_of

MAX_FILE_NAME_BYTES = 255
MAX_GGUF_PARTS = 999
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, by name, still on disk.

    Attributes:
        path: What the caller named.
        kind: ``file``, ``folder`` or ``sharded``.
        files: The files that hold tensors.
        tensors: ``{name: info}``, the names without the wrappers that training libraries leave in
            them; ``info.name`` is the one in the file.
        config: The content of ``config.json`` beside them, empty without one.
        beside: Weights files and indexes in the same folder that are not part of it.
        superseded: Copies of tensors in files that the index does not take them from, and why they
            are not read.
        codecs: What the tensors are, by name, if the file itself says so; None if names and dtypes
            decide.
        disagreements: Where names of a fine-tune do not go together, in sentences; filled in once
            both inputs are known.
        contradictions: Where its ``config.json`` contradicts that of the base, likewise.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    codecs: Mapping[str, Codec] | None = None
    superseded: Mapping[str, str] = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> dict[str, Codec]:
        """What the tensors are, by the names of the weights that they hold."""
        if self.codecs is not None:
            return dict(self.codecs)
        return weights_of(self.tensors, self.config)

    @property
    def quantised(self) -> str | None:
        """How weights were rounded when they were stored, and how many; None if none was."""
        methods = Counter(codec.quantised for codec in self.weights.values())
        named = (f"{name} ({count(n, 'weight')})" for name, n in methods.items() if name)
        return ", ".join(named) or None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a ``.safetensors`` file, a model folder or a sharded one.

    Args:
        path: The file, the folder, the ``….safetensors.index.json``, or the id of a model in the
            hub's cache, ``org/name[@revision]``.

    Returns:
        The checkpoint; no tensor has been read.

    Raises:
        CheckpointError: If there is nothing to read at ``path``, or it holds a pickle, or is
            damaged, hostile, or ambiguous.
    """
    if not str(path):
        raise CheckpointError("expected a path, got an empty one; is a variable unset?")
    path = Path(located(path))
    if not os.path.exists(path):  # Path.exists raises for an impossible name
        raise CheckpointError(f"{path}: no such file or folder; nothing is fetched, check the path")
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_shards(path, path)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {convert('model.safetensors')}")
    if path.suffix == ENDING:
        return _open_gguf(path, path)
    if path.suffix != ".safetensors":
        wanted = "expected a .safetensors file, a .gguf file or a model folder"
        raise CheckpointError(f"{path}: {wanted}")
    tensors, _ = read_header(path)
    return Checkpoint(path, "file", (path,), _plain(tensors, path), _read_config(path.parent))


def _open_gguf(file: Path, path: Path) -> Checkpoint:
    """A model in GGUF, with the names that its tensors have in the model it was converted from."""
    parts, settings = [file], read_gguf(file)[0]
    if type(count_ := settings.get("split.count")) is int and count_ > 1:
        parts = _parts_of_gguf(file, count_)
    stored = {name: (part, t) for part in parts for name, t in read_gguf(part)[1].items()}
    names = model_names_of(file, settings, list(stored))
    codecs = {
        names[name]: gguf_weight(tensor, part, names[name], heads_of(name, settings))
        for name, (part, tensor) in stored.items()
    }
    if len(codecs) != len(stored):
        raise CheckpointError(f"{file}: two tensors of it have one name in the model")
    infos = {name: codec.info for name, codec in codecs.items()}
    beside = weights_beside(path, parts) if path != file else ()
    config = gguf_config(settings, infos)
    return Checkpoint(path, "gguf", tuple(parts), infos, config, beside, codecs)


def _parts_of_gguf(file: Path, count_: int) -> list[Path]:
    """The files of a model that was split, beside one of them."""
    stem, dash, _ = file.name.rpartition(f"-of-{count_:05d}{ENDING}")
    if not dash or count_ > MAX_GGUF_PARTS or not stem[-5:].isdecimal():
        raise CheckpointError(f"{file}: one of {count_} parts; give it the name it was split with")
    ends = [f"{stem[:-5]}{i + 1:05d}-of-{count_:05d}{ENDING}" for i in range(count_)]
    parts = [confined(file.parent / name, file.parent) for name in ends]
    if missing := [part.name for part in parts if not os.path.lexists(part)]:
        raise CheckpointError(f"{file}: {missing[0]!r} is missing beside it; finish the download")
    return parts


def model_names_of(file: Path, settings: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """The names that tensors of a GGUF file have in the model.

    Args:
        file: The file.
        settings: What it says.
        names: Of its tensors.

    Returns:
        Names in the model by names in the file.

    Raises:
        CheckpointError: Without the library that has the table.
    """
    try:
        return model_names(str(settings.get("general.architecture")), names)
    except ImportError:
        raise CheckpointError(f"{file}: to read GGUF: {install('gguf')}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file beside the weights.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        CheckpointError: If it is too large, unreadable, or not one JSON object.
    """
    try:
        text = read_regular(path, json_cap())
    except OSError as error:
        advice = f"; is it a config? ({CAP_VARIABLE} raises that)" if error.errno == EFBIG else ""
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}){advice}") from None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def convert(name: str) -> str:
    """What to do about a pickle that should be the safetensors file ``name``."""
    return (
        "it is a pickle, which can run code when it is read; convert it where you trust it: "
        "safetensors.torch.save_file({k: v.clone() for k, v in "
        f"torch.load(FILE, weights_only=True).items()}}, {name!r})"
    )


def _convert_model(folder: Path) -> str:
    """What to do about a folder of pickles: transformers converts shards and tied weights, too."""
    return (
        "pickles, which can run code when they are read; convert the model where you trust it: "
        f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained(OTHER)"
    )


def confined(file: Path, folder: Path) -> Path:
    """``file``, once it is known to lie in ``folder`` whatever links it is made of.

    The Hugging Face cache keeps ``models--*/snapshots/REV/x`` as links into ``models--*/blobs``:
    those are followed, and no others that leave the folder.

    Args:
        file: A file named by something inside ``folder``.
        folder: The folder that was opened.

    Returns:
        ``file`` unchanged.

    Raises:
        CheckpointError: If a link leads elsewhere.
    """
    try:
        home, target = folder.resolve(), file.resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise CheckpointError(f"{file}: is a broken link; fetch it again") from None
    if target.is_relative_to(home) or target.parent == _blobs(home):
        return file
    raise CheckpointError(
        f"{file}: is a link that leaves {folder}; name the file itself if you trust it"
    )


def _blobs(folder: Path) -> Path | None:
    """The store of the hub cache that ``folder`` is a snapshot in, None if it is in none."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and parent.parents[1].name.startswith("models--"):
            blobs = parent.parents[1] / "blobs"
            return blobs if blobs.is_dir() and not blobs.is_symlink() else None
    return None


def _read_config(folder: Path) -> Mapping[str, Any]:
    """The ``config.json`` of a model's folder, empty without one."""
    path = folder / "config.json"
    # lexists: a dangling link is an error, not a missing file
    return read_json(confined(path, folder)) if os.path.lexists(path) else {}


def _open_folder(folder: Path) -> Checkpoint:
    """A model folder: one file, or shards and their index."""
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    alone = len(files) == 1 and not indexes
    if alone and shard_of(files[0].name) is None:
        tensors, _ = read_header(confined(files[0], folder))
        beside = weights_beside(folder, files)
        named = _plain(tensors, folder)
        return Checkpoint(folder, "folder", (files[0],), named, _read_config(folder), beside)
    if len(indexes) == 1 and not os.path.lexists(single):  # not even a dangling link
        return _open_shards(indexes[0], folder)
    if not files and not indexes and (gguf := _only_gguf(folder)) is not None:
        return _open_gguf(confined(gguf, folder), folder)
    raise CheckpointError(f"{folder}: {_why_not_a_model(folder, files, indexes)}")


def _only_gguf(folder: Path) -> Path | None:
    """The one model in GGUF in a folder, or the first part of it."""
    found = sorted(folder.glob(f"*{ENDING}"))
    stems = {file.name.partition("-00001-of-")[0].partition("-of-")[0] for file in found}
    first = [file for file in found if "-00001-of-" in file.name]
    if len(first) == 1 and len({stem.rpartition("-")[0] or stem for stem in stems}) <= 2:
        return first[0]
    return found[0] if len(found) == 1 else None


def _why_not_a_model(folder: Path, files: list[Path], indexes: list[Path]) -> str:
    """What to do about a folder that holds no one checkpoint."""
    stems = {file.name.rpartition("-of-")[0].rpartition("-")[0] for file in files}
    if not indexes and len(stems) == 1 and (stem := stems.pop()):
        missing = f"{stem}.safetensors.index.json"
        if (part := shard_of(files[0].name)) is not None and len(files) < part[1]:
            return (
                f"{count(len(files), 'shard')} of {part[1]}, without the index; download "
                f"{missing} and the others, or name one file to judge that part alone"
            )
        return f"{len(files)} shards without their index; download {missing}, or save again"
    if files or indexes:
        names = ", ".join(path.name for path in [*indexes, *files][:5])
        return f"several checkpoints, and nothing says which to read ({names}); name the file"
    if several := sorted(p.name for p in folder.glob(f"*{ENDING}")):
        names = ", ".join(several[:5])
        return f"several GGUF files, and nothing says which to read ({names}); name the file"
    if remedy := _training_state(folder):
        return remedy
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and os.path.lexists(folder / "config.json"):
        return f"found only {pickles[0]!r}: {_convert_model(folder)}"
    if pickles:
        return f"found only {pickles[0]!r}: {convert('model.safetensors')}"
    below = {p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/*.safetensors*")}
    below |= {p.parent for p in folder.glob("*/adapter_config.json")}
    if below:
        names = ", ".join(repr(str(p.relative_to(folder))) for p in sorted(below)[:5])
        return f"no .safetensors file in this folder itself, but below it: name one of {names}"
    return "no .safetensors file in this folder; is it the model's folder?"


def _training_state(folder: Path) -> str | None:
    """What to do about the state of a training run in pieces; None of any other folder."""
    if (script := folder / "zero_to_fp32.py").exists() or list(folder.glob("global_step*")):
        run = f"python {script}" if script.exists() else "python zero_to_fp32.py of DeepSpeed"
        return (
            "the state of DeepSpeed's ZeRO in pieces, not a model; merge it where you trust "
            f"it: {run} {folder} OTHER --safe_serialization"
        )
    for pieces in (folder, *(p for p in folder.glob("pytorch_model_fsdp*") if p.is_dir())):
        if any(pieces.glob("*.distcp")):
            return (
                "the state of FSDP in pieces (.distcp), not a model; merge it where you trust "
                f"it: accelerate merge-weights {pieces} OTHER"
            )
    if models := sorted(p.name for p in folder.glob("models--*") if p.is_dir()):
        name = models[0].removeprefix("models--").replace("--", "/", 1)
        return f"the cache of the hub, not a model; name a model in it by its id, such as {name}"
    return None


def _open_shards(index: Path, path: Path) -> Checkpoint:
    """Shards listed in ``index``; its map and the shards' headers must agree both ways."""
    folder = index.parent
    weight_map = read_json(confined(index, folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty weight_map; fetch the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{index}: tensor {name!r:.100} points to {shard!r:.100}; a shard must be "
                "a .safetensors file beside the index"
            )
    files = tuple(folder / shard for shard in sorted(set(weight_map.values())))
    if missing := [file.name for file in files if not os.path.lexists(file)]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(files)} shards missing, first {missing[0]!r}; "
            "finish the download"
        )
    tensors: dict[str, TensorInfo] = {}
    superseded: dict[str, str] = {}
    for file in files:
        shard_tensors, _ = read_header(confined(file, folder))
        for name, info in shard_tensors.items():
            if name in weight_map and weight_map[name] != file.name:
                chosen = weight_map[name]
                superseded[f"{name} in {file.name}"] = f"superseded: the index takes {chosen!r}"
                continue
            if name not in weight_map:
                raise CheckpointError(
                    f"{index}: tensor {name!r} is in {file.name!r}, but not in the index; "
                    "the folder mixes two checkpoints"
                )
            tensors[name] = info
    if absent := [name for name in weight_map if name not in tensors]:
        raise CheckpointError(
            f"{index}: tensor {absent[0]!r:.100} is not in {weight_map[absent[0]]!r}; "
            "the folder mixes two checkpoints"
        )
    beside = weights_beside(folder, (*files, index)) if path == folder else ()
    named = _plain(tensors, path)
    config = _read_config(folder)
    return Checkpoint(path, "sharded", files, named, config, beside, superseded=superseded)


def _plain(tensors: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """The tensors by their names without wrappers, of which each may occur once."""
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if other := found.get(plain := unwrapped(name)):
            raise CheckpointError(
                f"{path}: tensors {other.name!r} and {name!r} are the same but for wrappers of "
                "training libraries; remove one"
            )
        found[plain] = info
    return found


def weights_beside(folder: Path, taken: Sequence[Path]) -> tuple[str, ...]:
    """The other weights files of a folder, and the indexes of such files."""
    found = [p for ending in ("", ".index.json") for p in folder.glob(f"*.safetensors{ending}")]
    return tuple(sorted(p.name for p in found if p not in taken))


def _is_plain_file_name(name: str) -> bool:
    """A name without any path in it, for any operating system."""
    plain = name.isprintable() and not set("/\\:") & set(name)
    return plain and name.endswith(".safetensors") and len(name.encode()) <= MAX_FILE_NAME_BYTES
