"""Whether the files of a pipeline hold each of its models, no more and no less, before one of them is loaded."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusers import tensors
from dmquant.diffusers.bounds import bounded, check_sizes
from dmquant.diffusers.quantizer import QuantConfig, QuantMethod, empty_layers_
from dmquant.errors import UserError
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.models.weights import weight_files

AGAIN = "get the model again"


def check_models(folder: Path, leave_out: Collection[str] = (), variant: str | None = None) -> None:
    """UserError, in one line, for a part of a pipeline whose tensors are not those of the model its config describes.

    Missing, unexpected and misshapen tensors, and dtypes that cannot be: diffusers and transformers would run such a
    model, with random weights or without some of its layers. Reads no weights and allocates none; within a second it
    also refuses configurations of models far larger than their files. What a library renames, ties or ignores while it
    loads is not a fault. Parts that others quantized are left to them.
    """
    for name, (library, kind) in folders.classes(folder).items():
        if name not in leave_out:
            check_model(folder / name, library, kind, variant)


def check_model(part: Path, library: str, kind: str, variant: str | None = None) -> None:
    """`check_models` of one part, by its folder, library and class."""
    model = model_class(library, kind)
    fault = None if model is None else _fault(part, model, variant)
    if fault is not None:
        raise UserError(f"{part} {fault}: {AGAIN}")


def model_class(library: str, kind: str) -> type[nn.Module] | None:
    """The class of a part that has weights, None for one without or one that is not known."""
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    with contextlib.suppress(AttributeError, ValueError, ImportError):  # what loads it says so
        found = simple_get_class_obj(library, kind)
        if inspect.isclass(found) and issubclass(found, nn.Module):
            return found
    return None


def _fault(part: Path, kind: type[nn.Module], variant: str | None) -> str | None:
    import diffusers
    import transformers

    config, files = folders.read_json(part / "config.json"), weight_files(part, variant)
    method = folders.quantization(part.parent, part.name)
    if method not in (None, QuantMethod.DMQUANT.value) or not files:
        return None
    found = tensors.of_files(files, str(part))
    if issubclass(kind, diffusers.ModelMixin):
        return _fault_of_diffusers(part, kind, config, found, len(files))
    if issubclass(kind, transformers.PreTrainedModel):
        check_sizes(config, found.values(), str(part / "config.json"))
        return _fault_of_transformers(part, kind, config, found)
    return None


def _fault_of_diffusers(
    part: Path, kind: type[nn.Module], config: Mapping[str, Any], found: dict[str, Tensor], files: int
) -> str | None:
    model = skeleton(part, kind)
    if "quantization_config" in config:
        empty_layers_(model, QuantConfig.from_dict(config["quantization_config"]))
    elif files == 1:  # shards are younger than what it renames
        model._fix_state_dict_keys_on_load(found)
    return tensors.misfit(model, found)


def _fault_of_transformers(
    part: Path, kind: type[nn.Module], config: Mapping[str, Any], found: dict[str, Tensor]
) -> str | None:
    """What transformers itself misses, or does not use, where it loads tensors on the meta device."""
    where = str(part / "config.json")
    try:
        with bounded(len(found), where), _silent():
            model, info = kind.from_pretrained(
                None,
                config=kind.config_class.from_pretrained(part, local_files_only=True),
                state_dict=dict(found),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map="meta",
                dtype=torch.float32,
            )
    except UserError:
        raise
    except Exception as error:  # configurations have checks of their own, each with an error of its own
        reason = " ".join(str(error).split())
        raise UserError(f"transformers cannot build the {kind.__name__} of {where}: {reason}") from error
    expected = model.state_dict()
    older = {name: name.partition(".")[2] for name in found.keys() - expected.keys()}  # as in text_model.encoder
    expected |= {name: expected[today] for name, today in older.items() if today in expected}
    extra = {name for name in info["unexpected_keys"] if not tensors.UNUSED.search(name)}
    if kind.__name__ not in (config.get("architectures") or [kind.__name__]):
        # The file is of a larger model, of which this class takes a part.
        extra = {name for name in extra if hasattr(model, name.partition(".")[0])}
    # Before transformers 5 these are names without their shapes.
    mismatched = {each if isinstance(each, str) else each[0] for each in info["mismatched_keys"]}
    misshapen = {
        name: (tuple(tensor.shape), tuple(expected[name].shape))
        for name, tensor in found.items()
        if name in mismatched or older.get(name) in mismatched
    }
    return tensors.described(info["missing_keys"], extra, misshapen) or tensors.wrong_kind(expected, found)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the reports and the bar of transformers' loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
