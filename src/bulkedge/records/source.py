"""What a record says of its inputs: which files, with what content."""

from __future__ import annotations

from pydantic import Field

from bulkedge.checkpoint.shard import shard_of

from .ranges import Bytes, Digest, Kind, Positive
from .row import Row


class File(Row):
    """One input file."""

    name: str = Field(description="File name.")
    bytes: Bytes = Field(description="Size.")
    sha256: Digest = Field(description="Digest of its content.")


class Source(Row):
    """One of the two inputs."""

    path: str = Field(description="As the caller gave it.")
    kind: Kind = Field(
        description="`file`, `folder` or `sharded`; of an adapter its method: `lora`."
    )
    files: list[File] = Field(description="The files that were read.")
    trained_on: str | None = Field(
        None, description="What an adapter names as its base; not checked."
    )
    known_as: list[str] = Field(
        [],
        description="Of a base that an adapter was given with: its id in the hub's cache, "
        "`_name_or_path` of its `config.json`, the title of its card.",
    )
    quantised: str | None = Field(
        None,
        description="How weights were rounded when they were stored, such as `bitsandbytes nf4`, "
        "and how many; they are judged as the numbers that they are read back as.",
    )
    disagreements: list[str] = Field(
        [],
        description="Where an adapter's configuration and its tensors name different modules, or "
        "tensors of a full fine-tune have another prefix than the others.",
    )

    contradictions: list[str] = Field(
        [],
        description="Where `config.json` of a full fine-tune contradicts that of the base in what "
        "the model computes, or is missing.",
    )
    base_class: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9_]{0,99}$",
        description="The class of transformers that PEFT loads an adapter's base with, such as "
        "`AutoModelForCausalLM`; null where its configuration does not say.",
    )
    labels: Positive | None = Field(
        None, description="How many labels the head has that is stored beside an adapter."
    )

    @property
    def part(self) -> str | None:
        """Which part of a model the input is, such as ``"1 of 2"``: a shard without the others."""
        found = shard_of(self.files[0].name) if self.kind == "file" and self.files else None
        return None if found is None else f"{found[0]} of {found[1]}"


class Inputs(Row):
    """What was compared."""

    base: Source
    tuned: Source
    moments: Source | None = Field(
        None, description="The second moments that drift was measured with; null without."
    )
