"""What the JSON of a journal's header and of a checkpoint's manifest must be like, whoever wrote it.

Schemas for ``untrusted.check_shape``. Keys that are not named here are let through: a later release may add some.
"""

import math
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..errors import shown
from ..files.companions import check_companion
from ..files.safetensors_io import dtype_from_name
from ..files.untrusted import check_file_name
from ..rules.options import MAX_STEP
from .base_model import INDEX_NAMES

MAX_COUNT = 2**63 - 1


def _check_numel(shape: list[int]) -> list[int]:
    if math.prod(shape) > MAX_COUNT:
        raise ValueError(f"{shown(shape)} has more elements than a tensor can")
    return shape


def _check_dtype(name: str) -> str:
    dtype_from_name(name)
    return name


def _check_weight_file(name: str) -> str:
    if not check_file_name(name).endswith(".safetensors") and name not in INDEX_NAMES:
        raise ValueError(f"{shown(name)} is no file of weights: a replay fetches those that are named here")
    return name


Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=500)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{7,64}$")]
FileName = Annotated[str, AfterValidator(check_file_name)]
WeightFileName = Annotated[str, AfterValidator(_check_weight_file)]
CompanionName = Annotated[str, AfterValidator(check_companion)]
Shape = Annotated[list[Count], Field(max_length=64), AfterValidator(_check_numel)]
Dtype = Annotated[str, AfterValidator(_check_dtype)]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]
Position = Range


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Parameter(_Schema):
    name: Text
    shape: Shape
    dtype: Dtype
    group: Count


class _TrainedParameter(_Parameter):
    sha256: Sha256


class _Group(_Schema):
    weight_decay: Finite


class Identity(_Schema):
    """``identity.run_identity``."""

    noise_version: Count
    optimizer: Text
    options: dict[str, Any]
    groups: Annotated[list[_Group], Field(min_length=1)]
    micro_batch_size: Positive
    micro_batches_a_step: Positive
    data: dict[str, Any] | None
    parameters: list[_Parameter]
    frozen_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> "Identity":
        seen: set[str] = set()
        for parameter in self.parameters:
            if parameter.name in seen:
                raise ValueError(f"parameter {shown(parameter.name)} comes twice")
            seen.add(parameter.name)
            if parameter.group >= len(self.groups):
                raise ValueError(
                    f"parameter {shown(parameter.name)} is in group {parameter.group}, there are {len(self.groups)} groups"
                )
        return self


class _Base(_Schema):
    """``base_model.base_identity``."""

    name: str | None
    revision: Commit | None
    sha256: Sha256 | None
    files: dict[WeightFileName, Sha256] | None
    companions: dict[CompanionName, Sha256] | None = None
    note: str = ""

    @model_validator(mode="after")
    def _check_both(self) -> "_Base":
        if (self.sha256 is None) != (self.files is None):
            raise ValueError("one of sha256 and files is null, the other is not")
        return self


class Header(Identity):
    """The first line of a journal, without format, version and checksum."""

    parameters: list[_TrainedParameter]
    tied: dict[Text, list[Text]]
    untrained: list[Annotated[list[Text], Field(min_length=2, max_length=3)]]
    model_class: Annotated[str, Field(max_length=255)] | None = None
    base: _Base
    rule_from: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    task: dict[Text, str | int | None] | None = None


class _Counters(_Schema):
    model_config = ConfigDict(extra="forbid")

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class _Scheduler(_Schema):
    type: Text
    state: Any


class _File(_Schema):
    file: FileName
    size: Count
    sha256: Sha256
    ranges: dict[Text, Range]


class Manifest(_Schema):
    """A checkpoint's manifest, without format, version and checksum."""

    step: Annotated[int, Field(ge=0, le=MAX_STEP)]
    identity: Identity
    world_size: Positive
    counters: _Counters
    skipped_in_a_row: Count
    rule_scalars: list[float] = []
    lrs: list[Finite]
    lr_scheduler: _Scheduler | None
    data_position: Position | None
    client_state: Any
    journal_checksum: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None
    files: list[_File]
    data_state: list[Any] | None

    @model_validator(mode="after")
    def _check_lengths(self) -> "Manifest":
        if len(self.lrs) != len(self.identity.groups):
            raise ValueError(f"{len(self.lrs)} lrs for {len(self.identity.groups)} parameter groups")
        if len(self.files) != self.world_size or len({entry.file for entry in self.files}) < len(self.files):
            raise ValueError(f"{len(self.files)} files, or fewer of different names, of {self.world_size} ranks")
        if self.data_state is not None and len(self.data_state) != self.world_size:
            raise ValueError(f"{len(self.data_state)} states of data iterators, of {self.world_size} ranks")
        return self

    @model_validator(mode="after")
    def _check_ranges(self) -> "Manifest":
        """The ranges of a parameter follow each other without a gap, from its first element to its last."""
        numels = {p.name: math.prod(p.shape) for p in self.identity.parameters}
        ranges: dict[str, list[list[int]]] = {name: [] for name in numels}
        for entry in self.files:
            for name, bounds in entry.ranges.items():
                if name not in ranges:
                    raise ValueError(f"{entry.file} holds {shown(name)}, which is none of the parameters")
                ranges[name].append(bounds)
        for name, found in ranges.items():
            ordered = [[0, 0], *sorted(found), [numels[name], numels[name]]]
            if any(a[1] != b[0] for a, b in pairwise(ordered)) or any(a[0] > a[1] for a in ordered):
                raise ValueError(f"the ranges of {shown(name)} are not its {numels[name]} elements, each once")
        return self
