"""A tuned model → a Hugging Face folder, whole and proven, or nothing."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tunesmith.config import ConvertConfig, ModelRef
from tunesmith.errors import ConfigError
from tunesmith.export.adapter import open_adapter, prove_copy, write_adapter_folder
from tunesmith.export.again import find_record, record_of
from tunesmith.export.card import Library, rename_card, write_card
from tunesmith.export.folder import check_space, new_folder
from tunesmith.export.merge import open_merge
from tunesmith.export.model_files import write_model_files
from tunesmith.export.origin import write_origin
from tunesmith.export.proof import Proof
from tunesmith.export.shards import count_bytes, write_shards
from tunesmith.export.verify import prove
from tunesmith.model.adapters.folder import find_adapter_weights
from tunesmith.model.files.tensor_files import TensorFile
from tunesmith.model.files.tokenizer_files import holds_tokenizer
from tunesmith.model.load import load_tokenizer
from tunesmith.paths import expand_user
from tunesmith.runs.tuned import TunedModel
from tunesmith.view.units import format_bytes

logger = logging.getLogger(__name__)

# The tokenizer, configurations and headers beside the weights.
_OTHER_FILES_BYTES = 64 << 20
_LIBRARIES: dict[str, Library] = {"model": "transformers", "adapter": "peft"}


@dataclass(frozen=True)
class Exported:
    """What an export has written. `num_bytes` counts its weights; `proof` is None where none was asked for.

    `proved` is what an earlier conversion told of the proof, of an export that lay there already. `pushed` is its
    address on the hub, if it was put there.
    """

    folder: Path
    form: Literal["model", "adapter"]
    num_files: int
    num_bytes: int
    dtypes: tuple[str, ...]
    proof: Proof | None
    proved: str | None = None
    pushed: str | None = None

    def describe(self) -> str:
        """Return in two lines what lies where, and what proves it; in a third one where it was pushed to."""
        files = f"{self.num_files} weight file" + ("" if self.num_files == 1 else "s")
        of_type = f" in {' and '.join(self.dtypes)}" if self.dtypes else ""
        size = format_bytes(self.num_bytes)
        proved = self.proof.describe() if self.proof else self.proved
        lines = [
            f"the {self.form}{of_type} lies in `{self.folder}`: {files}, {size}",
            proved or "not compared with what it was made from",
        ]
        return "\n".join([*lines, f"pushed to {self.pushed}"] if self.pushed else lines)


def choose_output(tuned: TunedModel, config: ConvertConfig) -> Path:
    """Return the folder that an export of `tuned` goes to: absolute, and as asked for, else beside the results."""
    beside = tuned.run.export_path if tuned.run else tuned.folder.with_name("hf_format")
    return (expand_user(config.output_dir) if config.output_dir else beside).absolute()


def export(tuned: TunedModel, config: ConvertConfig, output: Path) -> Exported:
    """Write `tuned` as a Hugging Face folder, or as a PEFT folder with `no_merge`, to `output`.

    The folder appears whole, and proven equal unless `verify` is off.

    Raises:
        ConfigError: `no_merge` was asked for and there is no adapter.
        RunError: `output` exists, or another process is writing it.
        ResourceError: the disk has no room for it.
        ModelError: the base model is absent, or isn't the one that was tuned.
        CheckpointError: the checkpoint can't be read.
        ExportError: it can't be written, or isn't equal.
    """
    return _export_adapter(tuned, config, output) if config.no_merge else _export_model(tuned, config, output)


def find_finished(tuned: TunedModel, config: ConvertConfig, output: Path) -> Exported | None:
    """Return the export in `output` if it is just what these settings ask for, so that it can be pushed as it is.

    Its model card names what it is pushed to from now on, unless a person has changed it.
    """
    if config.push_to_hub is None or config.overwrite:
        return None
    record = find_record(output, tuned, config)
    if record is None:
        return None
    logger.info(
        "taking the export that lies in `%s`: it was made from the same weights, in the same way", output
    )
    form: Literal["model", "adapter"] = "adapter" if config.no_merge else "model"
    rows = open_adapter(tuned.folder, _model_files(tuned, config)).rows if form == "adapter" else None
    rename_card(tuned, _LIBRARIES[form], (output.name, config.push_to_hub), output, rows)
    paths = sorted(path for path in output.glob("*.safetensors"))
    dtypes = {tensor.dtype for path in paths for tensor in TensorFile(path).tensors.values()}
    names = tuple(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) if form == "model" else ()
    paths = paths or [find_adapter_weights(output)]
    num_bytes = sum(path.stat().st_size for path in paths)
    return Exported(output, form, len(paths), num_bytes, names, None, record["proof"])


def export_elsewhere(tuned: TunedModel, config: ConvertConfig, output: Path, mark: Path) -> Exported:
    """Do what `export` does on a machine that may not see its folders; `mark` is a file beside `output`.

    Raises:
        ConfigError: this machine sees other disks.
        Else as `export`.
    """
    for path in (mark, tuned.folder):
        if not path.exists():
            raise ConfigError(
                f"the node {socket.gethostname()} can't see `{path.parent}`",
                "give --home and --output_dir on a disk that every node of the cluster mounts at the same path",
            )
    logger.info("converting on %s", socket.gethostname())
    return export(tuned, config, output)


def _export_model(tuned: TunedModel, config: ConvertConfig, output: Path) -> Exported:
    files = _model_files(tuned, config)
    has_own = tuned.kind != "model" and holds_tokenizer(tuned.folder)
    load_tokenizer(files, tuned.folder if has_own else None)  # before anything is written
    dtype: torch.dtype | None = None if config.dtype == "auto" else getattr(torch, config.dtype)
    sources = [tuned.folder] + ([files.folder] if files.folder else [])
    with new_folder(output, config.overwrite, sources) as folder:
        merge = open_merge(tuned, files, dtype)
        num_bytes = count_bytes(merge)
        check_space(folder, num_bytes + _OTHER_FILES_BYTES)
        num_files = write_shards(merge, folder, config.max_shard_size)
        write_model_files(merge, files, tuned, folder)
        write_card(tuned, _LIBRARIES["model"], config.push_to_hub or output.name, folder)
        proof = prove(merge, tuned, files, folder) if config.verify else None
        write_origin(tuned, folder, record_of(tuned, config, proof.describe() if proof else None))
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in merge.tensors.values()}
    return Exported(output, "model", num_files, num_bytes, tuple(sorted(dtypes)), proof)


def _export_adapter(tuned: TunedModel, config: ConvertConfig, output: Path) -> Exported:
    if tuned.kind != "adapter":
        raise ConfigError(
            f"`no_merge` exports an adapter, and `{tuned.folder}` is a whole model",
            "leave --no_merge out",
        )
    if config.dtype != "auto":
        raise ConfigError(
            f"`dtype` is {config.dtype}, but with `no_merge` the adapter is copied as it is",
            "leave one of the two out",
        )
    with new_folder(output, config.overwrite, [tuned.folder]) as folder:
        adapter = open_adapter(tuned.folder, _model_files(tuned, config))
        num_bytes = adapter.weights.stat().st_size
        check_space(folder, num_bytes + _OTHER_FILES_BYTES)
        write_adapter_folder(adapter, tuned, folder)
        write_card(tuned, _LIBRARIES["adapter"], config.push_to_hub or output.name, folder, adapter.rows)
        proof = prove_copy(adapter, folder) if config.verify else None
        write_origin(tuned, folder, record_of(tuned, config, proof.describe() if proof else None))
    return Exported(output, "adapter", 1, num_bytes, (), proof)


def _model_files(tuned: TunedModel, config: ConvertConfig) -> ModelRef:
    """Return the model whose files the weights are made from: the base model, or a whole tuned one."""
    if tuned.kind == "model":
        return ModelRef(tuned.folder, None, config.trust_remote_code)
    assert tuned.base is not None, "only a whole model has no base"
    return tuned.base
