"""The library under any sequence of calls.

After each step the model's logits are those of an oracle, or the call was refused and nothing has
changed. The oracle is plain arithmetic in float64: the plain model's tensors, and what the files of
the adapters in force say must be added to them or put in their place. Which calls must succeed and
which must be refused is written down beside each rule.
"""

import copy
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.func import functional_call
from transformers import BertForMaskedLM, BertForSequenceClassification, set_seed

import minilora
from minilora import LoraConfig, MiniloraError
from minilora.lora import adapters, merge, targets
from minilora.lora.merge import set_parameter
from minilora.lora.peft_files import adapter_files
from tests.conftest import tiny_config

IDS = torch.tensor([[1, 2, 3, 4], [5, 3, 1, 6], [2, 2, 7, 5]])
ALL = ["default", "a", "b"]
NAMES = st.sampled_from(ALL)
KINDS = [
    {},
    {"use_dora": True, "target_modules": ["query", "dense"]},
    {"use_rslora": True, "r": 2, "target_modules": ["key", "value"], "lora_dropout": 0.5},
    {"lora_bias": True},
    {"task_type": "SEQ_CLS"},
    {"task_type": "SEQ_CLS", "target_modules": "all-linear"},
    {"target_modules": "all-linear"},
    {"target_modules": ["word_embeddings", "query"]},
    {"target_modules": ["word_embeddings", "position_embeddings"], "use_dora": True},
    {"trainable_token_indices": [1, 3]},
    {"trainable_token_indices": [3, 5], "task_type": "SEQ_CLS"},
    {"trainable_token_indices": [2, 6]},
    {"modules_to_save": ["pooler"]},
    {"modules_to_save": ["pooler", "dense"]},
    {"modules_to_save": ["embeddings"]},
    {"init_lora_weights": "pissa", "r": 2},
    {"init_lora_weights": "olora", "target_modules": ["query", "intermediate.dense"]},
    {"bias": "lora_only", "lora_bias": True},
    {"bias": "all", "task_type": "SEQ_CLS"},
]
NEEDS_AN_ADAPTER = [
    lambda model, path: minilora.save_adapter(model, path),
    lambda model, path: minilora.set_adapter(model, "default"),
    lambda model, path: minilora.delete_adapter(model, "default"),
    lambda model, path: minilora.merge_adapter(model),
    lambda model, path: minilora.unmerge_adapter(model),
    lambda model, path: minilora.merge_and_unload(model),
    lambda model, path: minilora.unload(model),
    lambda model, path: minilora.adapter_names(model, ["default"] * 3).__enter__(),
    lambda model, path: minilora.disable_adapter(model).__enter__(),
]
PREFIX = "base_model.model."
TIED = "cls.predictions.decoder.weight"


def plain_model(auto_class):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = tiny_config(num_hidden_layers=1, vocab_size=9, max_position_embeddings=6, **sizes)
    set_seed(0)
    model = auto_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.bert.encoder.requires_grad_(False)
    return model.eval()


def logits(model):
    """In eval mode, whatever the mode is."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    for module, mode in modes.items():
        module.training = mode
    return found


def values(model):
    parameters = model.named_parameters(remove_duplicate=False)  # tied ones under all their names
    return {name: p.detach().clone() for name, p in parameters}


def trainable(model):
    return {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}


def state_of(model):
    """All that a refused call must leave alone."""
    record = getattr(model, "minilora_adapters", None)
    return (
        {name: type(module) for name, module in model.named_modules()},
        {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        record and (list(record.configs), record.active),
        model.config.to_dict(),
    )


def tensors_of(model, name):
    files = adapter_files(model, name)
    config = json.loads(files["adapter_config.json"])
    return config, safetensors.torch.load(files["adapter_model.safetensors"])


def reduced(weight, config, r):
    """What pissa and olora leave in the base."""
    init = config["init_lora_weights"]
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return weight - U[:, :r] @ S[:r].diag() @ Vh[:r]
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        r_scale = scaling(config, r)
        return weight - r_scale * Q[:, :r] @ R[:r]
    return weight


def scaling(config, r):
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)


def with_adapter(plain, result, config, tensors):
    """`result` with one adapter's files applied; their updates are defined by `plain`."""
    tensors = {key.removeprefix(PREFIX): tensor.double() for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if "lora_" not in key and "trainable_tokens" not in key:
            result[key.replace(".base_layer", "")] = tensor.clone()
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            layer, B = key.removesuffix(".lora_A.weight"), tensors[key.replace("_A.", "_B.")]
        elif key.endswith(".lora_embedding_A"):
            layer, B = key.removesuffix(".lora_embedding_A"), tensors[key.replace("_A", "_B")]
        else:
            continue
        W, delta = plain[f"{layer}.weight"], scaling(config, len(A)) * B @ A
        is_embedding = "embedding" in key.rpartition(".")[2]
        W, delta = (W.T, delta) if is_embedding else (reduced(W, config, len(A)), delta)
        after, m = W + delta, tensors.get(f"{layer}.lora_magnitude_vector")
        if m is not None:
            after = m[:, None] * after / after.norm(dim=1, keepdim=True)
        change = (after.T if is_embedding else after) - plain[f"{layer}.weight"]
        result[f"{layer}.weight"] = result[f"{layer}.weight"] + change
        if (b := tensors.get(f"{layer}.lora_B.bias")) is not None:
            result[f"{layer}.bias"] = result[f"{layer}.bias"] + scaling(config, len(A)) * b
    end = ".token_adapter.trainable_tokens_delta"
    for key in [key for key in tensors if key.endswith(end)]:
        weight = f"{key.removesuffix(end)}.weight"
        places = torch.tensor(config["trainable_token_indices"])
        result[weight] = result[weight].index_copy(0, places, tensors[key])
        if TIED in plain and torch.equal(plain[TIED], plain[weight]):
            result[TIED] = result[weight]
    return result


class AnySequence(RuleBasedStateMachine):
    """A model, what it should be by now, and directories that adapters were saved to."""

    directory = None  # set by the test
    auto_class = BertForSequenceClassification

    def __init__(self):
        super().__init__()
        self.model = plain_model(self.auto_class)
        self.keys = list(self.model.state_dict())
        # The oracle's, in which tied parameters may go different ways.
        self.skeleton = copy.deepcopy(self.model).double()
        for name, value in values(self.skeleton).items():
            set_parameter(self.skeleton, name, torch.nn.Parameter(value))
        self.plain = {name: p.double() for name, p in values(self.model).items()}
        self.trainable = trainable(self.model)
        self.files, self.active, self.merged = {}, (), None
        self.saved = []  # (directory, name, files) of every save
        self.copies = []  # (model, its logits) left behind by deepcopy
        self.count = 0
        # Of its own: what an earlier sequence saved would be found by its adapter's name.
        self.directory = Path(tempfile.mkdtemp(dir=self.directory))

    # What must hold after every step.

    def expected(self, names):
        result = dict(self.plain)
        for name in names:
            result = with_adapter(self.plain, result, *self.files[name])
        return self.logits_of(result)

    def logits_of(self, tensors):
        with torch.no_grad():
            return functional_call(self.skeleton, tensors, kwargs={"input_ids": IDS}).logits

    def close(self, found, expected):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

    @invariant()
    def the_model_is_what_its_files_say(self):
        record = getattr(self.model, "minilora_adapters", None)
        assert (list(record.configs) if record else []) == list(self.files)
        if record and self.merged is None:
            assert record.active == self.active
            self.files = {name: tensors_of(self.model, name) for name in self.files}
        elif record:  # saving a merged model gives the same files
            for name, (config, tensors) in self.files.items():
                same = tensors_of(self.model, name)
                assert same[0] == config and same[1].keys() == tensors.keys()
                for key, tensor in tensors.items():
                    torch.testing.assert_close(same[1][key].double(), tensor.double())
                    assert same[1][key].dtype == next(self.model.parameters()).dtype
        else:
            assert trainable(self.model) == self.trainable
            assert [*self.model.state_dict()] == self.keys
        dtypes = {p.dtype for p in self.model.parameters()}
        assert len(dtypes) == 1, dtypes
        names = self.active if self.merged is None else self.merged
        self.close(logits(self.model), self.expected(names))

    def teardown(self):
        for model, before in self.copies:
            assert torch.equal(logits(model), before), "a copy shares something with its model"

    def attempt(self, call, legal):
        """Whether the call was done; one that is refused must have changed nothing."""
        state, before, output = state_of(self.model), values(self.model), logits(self.model)
        places = {name: id(p) for name, p in self.model.named_parameters()}
        try:
            call()
        except MiniloraError as error:
            assert legal is not True, f"refused: {error}"
            assert "\n" not in str(error)
            assert state_of(self.model) == state
            after = values(self.model)
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert {name: id(p) for name, p in self.model.named_parameters()} == places
            assert torch.equal(logits(self.model), output)
            return False
        assert legal is not False, "must be refused"
        return True

    # Which calls are legal.

    def is_plain(self):
        return not self.files

    def together(self, names):
        """Whether these adapters may be in force at once."""
        if not names or len(set(names)) < len(names) or not set(names) <= set(self.files):
            return False
        configs = [self.files[name][0] for name in names]
        rows = [set(c["trainable_token_indices"] or []) for c in configs]
        overlap = sum(map(len, rows)) > len(set().union(*rows))
        return sum(bool(c["modules_to_save"]) for c in configs) <= 1 and not overlap

    def has_company(self):
        """What empties the model waits until there is something to get wrong."""
        alone = any(self.changes_base(config) for config, _ in self.files.values())
        return len(self.files) > 1 or alone

    def mostly_known(self):
        return st.sampled_from([*self.files, *self.files, ALL[-1]])

    def changes_base(self, config):
        return config["bias"] != "none" or config["init_lora_weights"] in ("pissa", "olora")

    def shake(self, name):
        """As if trained."""
        draw = torch.Generator().manual_seed(self.count)
        self.count += 1
        own = f".adapters.{name}."
        bias = dict(self.model.minilora_adapters.configs)[name].bias
        with torch.no_grad():
            for key, p in self.model.named_parameters():
                changes = p.requires_grad and bias != "none" and key.endswith(".bias")
                if own in key or changes:
                    p += 0.2 * torch.randn(p.shape, generator=draw).to(p.dtype)

    def arrive(self, name):
        if not self.files:
            self.active = (name,)
        self.files[name] = tensors_of(self.model, name)

    # The calls.

    @initialize(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=2))
    def begin(self, kinds):
        """With company, where the two can be together: most of what goes wrong needs some."""
        for name, kind in zip(ALL, kinds, strict=False):
            self.add_as(name, kind)

    @rule(data=st.data(), kind=st.sampled_from(KINDS))
    def add(self, data, kind):
        new = [name for name in ALL if name not in self.files]
        self.add_as(data.draw(st.sampled_from(new + ALL[:1])), kind)

    def add_as(self, name, kind):
        there = self.auto_class is BertForSequenceClassification or "pooler" not in str(kind)
        legal = there if self.is_plain() else None
        if self.merged is not None or name in self.files:
            legal = False
        if self.attempt(lambda: minilora.add_adapter(self.model, LoraConfig(**kind), name), legal):
            self.arrive(name)
            self.shake(name)

    @precondition(is_plain)
    @rule(call=st.sampled_from(NEEDS_AN_ADAPTER))
    def nothing_there(self, call):
        self.attempt(lambda: call(self.model, self.directory / "nothing"), legal=False)

    @precondition(lambda self: self.files)
    @rule(name=NAMES)
    def save(self, name):
        path = self.directory / f"{self.count}"
        self.count += 1
        if self.attempt(lambda: minilora.save_adapter(self.model, path, name), name in self.files):
            self.saved.append((path, name, self.files[name]))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), damage=st.sampled_from([None, None, "missing", "shape", "cut"]))
    def load(self, data, damage):
        path, name, files = self.saved[data.draw(st.integers(0, len(self.saved) - 1))]
        path = path if name == "default" else path / name
        other = data.draw(NAMES)
        if damage:
            path = damaged(path, self.directory / f"damaged-{self.count}", damage)
            self.count += 1
        exists, was_plain = other in self.files, self.is_plain()
        legal = True if was_plain else (False if self.merged is not None else None)
        legal = False if damage else legal
        if exists and files[0] == self.files[other][0] and legal is None:
            legal = True
        trainable = data.draw(st.booleans())

        def call():
            minilora.load_adapter(self.model, path, other, is_trainable=trainable)

        if self.attempt(call, legal):
            if not exists:
                self.arrive(other)
            assert trainable or not self.model.training
            self.files[other] = tensors_of(self.model, other)
            for key, tensor in files[1].items():
                torch.testing.assert_close(self.files[other][1][key].double(), tensor.double())

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def set_adapter(self, data):
        names = data.draw(st.lists(self.mostly_known(), min_size=1, max_size=2))
        names = names[0] if len(names) == 1 else names
        several = [names] if isinstance(names, str) else names
        legal = self.together(several) and self.merged is None
        if self.attempt(lambda: minilora.set_adapter(self.model, names), legal):
            self.active = tuple(several)

    @precondition(lambda self: self.files)
    @rule(data=st.data(), name=NAMES)
    def disable(self, data, name):
        """And whatever is tried inside."""
        inside = data.draw(st.sampled_from([
            None,
            lambda: minilora.delete_adapter(self.model, name),
            lambda: minilora.set_adapter(self.model, name),
            lambda: minilora.merge_adapter(self.model, [name]),
            lambda: minilora.add_adapter(self.model, LoraConfig(), name),
            lambda: minilora.save_adapter(self.model, self.directory / "inside", name),
            lambda: minilora.unload(self.model),
            lambda: minilora.merge_and_unload(self.model),
        ]))  # fmt: skip

        def call():
            with minilora.disable_adapter(self.model):
                self.close(logits(self.model), self.logits_of(self.plain))
                if inside is not None:
                    self.attempt(inside, False)
                self.close(logits(self.model), self.logits_of(self.plain))

        self.attempt(call, self.merged is None)

    @precondition(lambda self: self.has_company())
    @rule(name=NAMES)
    def delete(self, name):
        legal = name in self.files and self.merged is None
        if self.attempt(lambda: minilora.delete_adapter(self.model, name), legal):
            del self.files[name]
            left = tuple(other for other in self.active if other != name)
            self.active = left or tuple(self.files)[:1]

    @precondition(lambda self: self.files)
    @rule(data=st.data(), safe=st.booleans())
    def merge(self, data, safe):
        names = data.draw(st.none() | st.lists(self.mostly_known(), max_size=2))
        chosen = self.active if names is None else tuple(names)
        legal = self.merged is None and self.together(chosen)
        if self.attempt(lambda: minilora.merge_adapter(self.model, names, safe), legal):
            self.merged = chosen

    @precondition(lambda self: self.files)
    @rule()
    def unmerge(self):
        legal = self.merged is not None
        if self.attempt(lambda: minilora.unmerge_adapter(self.model), legal):
            self.merged = None

    @precondition(lambda self: self.has_company())
    @rule(data=st.data())
    def merge_and_unload(self, data):
        names = data.draw(st.none() | st.lists(self.mostly_known(), min_size=1, max_size=2))
        chosen = self.active if names is None else tuple(names)
        legal = self.together(chosen)
        if self.merged is not None:
            legal = names is None or set(chosen) == set(self.merged)
            chosen = self.merged
        expected = self.expected(chosen) if legal else None
        if self.attempt(lambda: minilora.merge_and_unload(self.model, names), legal):
            self.close(logits(self.model), expected)
            self.became_plain()
            self.plain = {name: p.double() for name, p in values(self.model).items()}

    @precondition(lambda self: self.has_company())
    @rule()
    def unload(self):
        if self.attempt(lambda: minilora.unload(self.model), not self.is_plain()):
            self.became_plain()

    def became_plain(self):
        self.files, self.active, self.merged = {}, (), None

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), broken=st.booleans())
    def combine(self, data, broken):
        places = st.lists(st.integers(0, len(self.saved) - 1), min_size=1, max_size=2)
        some = [self.saved[place] for place in data.draw(places)]
        paths = [path if name == "default" else path / name for path, name, _ in some]
        paths += [self.directory / "nowhere"] if broken else []
        weights = [0.5, 0.25, 0.5][: len(paths)]
        legal = self.is_plain() and not broken
        if self.attempt(lambda: minilora.combine_adapters(self.model, paths, weights), legal):
            sums = {}
            for weight, (_, _, files) in zip(weights, some, strict=True):
                alone = with_adapter(self.plain, dict(self.plain), *files)
                for key, value in self.plain.items():
                    is_head = f"{PREFIX}{key}" in files[1] and files[0]["bias"] == "none"
                    is_head |= f"{PREFIX}{key}" in files[1] and key.startswith("classifier")
                    share = weight / sum(weights) if is_head else weight
                    sums[key] = sums.get(key, value) + share * (alone[key] - value)
            self.close(logits(self.model), self.logits_of(sums))
            self.plain = {name: p.double() for name, p in values(self.model).items()}

    @precondition(lambda self: self.files)
    @rule(data=st.data(), name=NAMES, kind=st.sampled_from(["cat", "svd", "linear", "prune"]))
    def add_weighted(self, data, name, kind):
        """Of full rank, where it is by svd, so that nothing is lost; linear of a single one."""
        some = data.draw(st.lists(self.mostly_known(), min_size=1, max_size=2))
        some = some[:1] if kind == "linear" else some
        weights, rank = [0.5, -0.25][: len(some)], 8 if kind == "svd" else None
        legal = self.merged is None and name not in self.files and kind != "prune"
        legal = legal and all(other in self.files and self.is_plain_sum(other) for other in some)

        def call():
            minilora.add_weighted_adapter(self.model, some, weights, name, kind, rank)

        if self.attempt(call, legal):
            self.arrive(name)
            sums = dict(self.plain)
            for weight, other in zip(weights, some, strict=True):
                config, tensors = self.files[other]
                alone = with_adapter(self.plain, dict(self.plain), config, tensors)
                for key, value in self.plain.items():
                    share = weight / sum(weights) if f"{PREFIX}{key}" in tensors else weight
                    sums[key] = sums[key] + share * (alone[key] - value)
            self.close(self.expected((name,)), self.logits_of(sums))

    def is_plain_sum(self, name):
        config, tensors = self.files[name]
        extra = ("magnitude", "lora_B.bias", "trainable_tokens")
        return not self.changes_base(config) and not any(e in key for key in tensors for e in extra)

    @precondition(lambda self: self.files)
    @rule(names=st.lists(NAMES | st.just("__base__"), min_size=3, max_size=3))
    def mixed(self, names):
        there = all(name in self.files or name == "__base__" for name in names)
        alone = any(self.changes_base(config) for config, _ in self.files.values())
        rows = []

        def call():
            with minilora.adapter_names(self.model, names):
                rows.append(logits(self.model))

        if self.attempt(call, there and not alone and self.merged is None):
            for row, name in enumerate(names):
                own = () if name == "__base__" else (name,)
                self.close(rows[0][row], self.expected(own)[row])

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to(self, dtype):
        self.model.to(dtype)

    @rule(mode=st.booleans())
    def train(self, mode):
        self.model.train(mode)

    @rule()
    def deepcopy(self):
        self.copies.append((self.model, logits(self.model)))
        self.model = copy.deepcopy(self.model)


def damaged(path, target, damage):
    """A copy of an adapter's directory that nothing may accept."""
    target.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((path / name).read_bytes())
    weights = target / "adapter_model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    last = max(tensors)
    if damage == "missing":
        del tensors[last]
    elif damage == "shape":
        tensors[last] = torch.zeros(3, 1, 2)
    weights.write_bytes(safetensors.torch.save(tensors)[: -1 if damage == "cut" else None])
    return target


class AnySequenceOfATiedModel(AnySequence):
    """A masked language model: its output layer shares the embeddings' weight."""

    auto_class = BertForMaskedLM


def run(machine, path, examples, steps):
    machine = type(machine.__name__, (machine,), {"directory": path})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


MACHINES = [AnySequence, AnySequenceOfATiedModel]


@pytest.mark.parametrize("machine", MACHINES)
def test_any_sequence_of_calls_is_right_or_refused(machine, tmp_path):
    run(machine, tmp_path, examples=10, steps=15)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_any_longer_sequence_of_calls_is_right_or_refused(machine, tmp_path):
    run(machine, tmp_path, examples=200, steps=40)


def _only_known(_, configs, names):
    targets.check_known(configs, names)


def _heads_stay_behind(model, names, _):
    for layer in dict(adapters.adapter_layers(model)).values():
        layer.active_adapters = names


def _whatever_the_state(model, *_, **__):
    if not hasattr(model, "minilora_adapters"):
        raise MiniloraError("no adapter")
    return model.minilora_adapters


ROOT = Path(__file__).parents[2]

FAULTS = {
    "adapters that exclude each other are let through": (merge, "check_together", _only_known),
    "a merged adapter's head": (merge, "_compute_updates_of", _heads_stay_behind),
    "what is merged or disabled is not refused": (adapters, "adapters_of", _whatever_the_state),
}


# In an interpreter of its own: what hypothesis draws depends on the modules that are imported, and
# so would on the tests that were run before.
SEARCH = """
import sys
from pathlib import Path
from tests.lora.test_any_sequence import FAULTS, AnySequence, run

if sys.argv[1] in FAULTS:
    setattr(*FAULTS[sys.argv[1]])
try:
    run(AnySequence, Path(sys.argv[2]), examples=100, steps=25)
    print("nothing")
except (AssertionError, KeyError):
    print("found")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_the_machine_finds_a_fault_where_there_is_one(fault, tmp_path):
    command = [sys.executable, "-c", SEARCH, fault, tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = "nothing" if fault == "none" else "found"
    assert result.returncode == 0 and result.stdout.split() == [expected], result.stderr[-2000:]
