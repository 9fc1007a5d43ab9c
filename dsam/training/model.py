"""Builds the classifier and its tokenizer from a hub id, a local folder or an architecture; runs no code of theirs."""

import contextlib
import inspect
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (  # type: ignore[attr-defined]  # BertTokenizerFast is there; its stubs lack it
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ..config import Config, Model
from ..errors import UserError, did_you_mean
from ..files import write_atomically
from ..glue.builtin import VOCABULARY
from ..methods import METHODS, ExampleLosses
from ..text import described, first_line
from .dropout import configure_dropout, set_dropout
from .model_files import folder_of

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer, which marks the second sentence of a pair where the model takes such marks."""
    if model.architecture:
        return BertTokenizerFast(vocab=str(VOCABULARY), do_lower_case=True)
    tokenizer = _load(model, "tokenizer", AutoTokenizer.from_pretrained)
    if not tokenizer.is_fast:
        raise UserError(f"model {model.path or model.id} has no fast tokenizer (tokenizer.json)")
    _mark_sentences(tokenizer, _load(model, "configuration", AutoConfig.from_pretrained))
    return tokenizer


def _mark_sentences(tokenizer: PreTrainedTokenizerFast, architecture: PreTrainedConfig) -> None:
    """Has the tokenizer give token_type_ids to a model that tells a pair's sentences apart by them, and to no other:
    ALBERT's and XLNet's leave them out."""
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(architecture), None)
    if kind is None:
        return
    names = list(tokenizer.model_input_names)
    takes = "token_type_ids" in inspect.signature(kind.forward).parameters
    marks = set(tokenizer("one", "two", return_token_type_ids=True)["token_type_ids"])
    known = math.inf if architecture.model_type == "xlnet" else getattr(architecture, "type_vocab_size", None) or 0
    if "token_type_ids" in names:
        if not takes or (0 < known <= max(marks)):  # DeBERTa, with 0, looks none up; a RoBERTa may have but one
            tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
        return
    if takes and len(marks) > 1 and max(marks) < known:
        tokenizer.model_input_names = [*names, "token_type_ids"]


def build(
    config: Config, num_labels: int, tokenizer: PreTrainedTokenizerFast, notes: list[str] | None = None
) -> PreTrainedModel:
    """The classifier in float32 on the CPU, its head drawn from seeds.init unless one of as many labels came with the
    weights, which is then said in `notes`. Its configuration names the task's labels.

    Raises UserError where weights, configuration and tokenizer do not fit each other.
    """
    model, train = config.model, config.train
    torch.manual_seed(config.seeds.init)
    if model.architecture:
        architecture = _architecture(model.architecture, num_labels, tokenizer)
        if train.dropout is not None:
            configure_dropout(architecture, train.dropout)
        try:
            network = BertForSequenceClassification(architecture)
        except Exception as error:  # whatever sizes that do not fit each other, or memory, raise inside torch
            raise UserError(f"model.architecture={model.architecture}: {described(error)}") from None
    else:
        architecture = _load(model, "configuration", AutoConfig.from_pretrained)
        named = list((architecture.id2label or {}).values())
        architecture.num_labels = num_labels
        pad = tokenizer.pad_token_id
        if getattr(architecture, "pad_token_id", None) is None and pad is not None and pad < architecture.vocab_size:
            architecture.pad_token_id = pad  # by which a decoder finds each row's last word
        if train.dropout is not None:
            configure_dropout(architecture, train.dropout)
        network, loaded = _load(
            model,
            "weights",
            AutoModelForSequenceClassification.from_pretrained,
            config=architecture,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        prefix = f"{network.base_model_prefix}."
        missing = [n for n in loaded["missing_keys"] if n.startswith(prefix) and ".pooler." not in n]
        mismatched = [n for n in mismatched_of(loaded) if n.startswith(prefix)]
        # Heads and poolers that the classifier does not use are no mistake; layers are.
        surplus = _surplus(loaded["unexpected_keys"], network)
        for names, what in ((missing, "missing"), (mismatched, "of another shape"), (surplus, "of layers it has not")):
            if names:
                raise UserError(
                    f"model {model.path or model.id}: the weights do not fit the configuration: "
                    f"{len(names)} {what}, e.g. {min(names)}"
                )
        head = {n for n in network.state_dict() if not n.startswith(prefix)}
        given = head - {*loaded["missing_keys"], *mismatched_of(loaded)}
        if notes is not None and given == head:
            theirs = "" if named == list(config.task.labels) else f", for {', '.join(map(str, named))}"
            notes.append(
                f"the classifier came with the weights{theirs}: seeds.init draws none, and its outputs are taken for "
                f"{', '.join(config.task.labels) or 'the score'}"
            )
        elif notes is not None and given:
            notes.append(f"part of the classifier came with the weights, e.g. {min(given)}: seeds.init draws the rest")
        if notes is not None:
            notes += _read_otherwise(folder_of(model), network, tokenizer)
        for tensor in [*network.parameters(), *network.buffers()]:
            # Off the file's memory map: its alignment follows the file's layout, and alignment rounds differently.
            tensor.data = tensor.data.clone()
    if config.task.labels:
        network.config.id2label = dict(enumerate(config.task.labels))
        network.config.label2id = {label: number for number, label in enumerate(config.task.labels)}
    if train.dropout is not None:
        set_dropout(network, train.dropout)
    words: Any = network.get_input_embeddings()
    highest = max(tokenizer.get_vocab().values(), default=0)  # a vocabulary that was cut has gaps
    if max(len(tokenizer), highest + 1) > words.num_embeddings:
        more = f", up to the id {highest}," if highest >= len(tokenizer) else ""
        raise UserError(
            f"model {model.path or model.id or model.name}: the tokenizer has {len(tokenizer)} tokens{more} and the "
            f"model {words.num_embeddings} embeddings: they do not fit each other"
        )
    positions = _positions(network)
    if positions and train.max_length > positions:
        raise UserError(f"train.max_length={train.max_length} is above the model's {positions} positions")
    _try(config, network, tokenizer, num_labels)
    _require_same_padding(config, network, tokenizer)
    return network


def _surplus(names: Sequence[str], network: PreTrainedModel) -> list[str]:
    """Those of a file's weights that are of a stack of layers which the network has, and have no place in it.

    What a stack that it has not would take (a decoder's, that of Funnel's whole model) is no mistake.
    """
    stacks = {name: set(m._modules) for name, m in network.named_modules() if isinstance(m, nn.ModuleList)}
    found = []
    for name in names:
        for whole in (name, f"{network.base_model_prefix}.{name}"):
            if (first := re.search(r"(?<=\.)\d+(?=\.)", whole)) is None:
                continue
            stack = whole[: first.start() - 1]
            # Of a layer that is there only where it is called one: old files of GPT-2's kind have their masks there.
            if stack in stacks and (first.group() not in stacks[stack] or re.search(r"\blayers?$", stack)):
                found.append(name)
                break
    return found


PROBES = (("Hello World, it can't STOP at (1,000).", "A naïve café?"), ("Two  spaces", "and\ttabs"))
"""Pairs in which tokenizers that fold case, accents or blanks otherwise, or mark a pair otherwise, differ."""


def _read_otherwise(folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What is to be said of a folder that asks for something else than what transformers makes of it: code of its own,
    where a class of transformers has the model's type; a `tokenizer.json` whose normalizer or template for pairs the
    tokenizer's class replaces."""
    notes, files = [], ("config.json", "tokenizer_config.json")
    for name, taken in zip(files, (network, tokenizer), strict=True):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not there; no object
            if json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map"):
                notes.append(
                    f"{name} names code of the model's own (auto_map), which is never run here: transformers' "
                    f"{type(taken).__name__} is in its place"
                )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return notes
    try:
        alone = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no other kind; transformers has made one of another file
        return [*notes, f"tokenizer.json cannot be read by itself ({first_line(error)}), and is not what is used"]
    alone.no_truncation()
    alone.no_padding()
    for pair in PROBES:
        if alone.encode(*pair).ids != tokenizer(*pair)["input_ids"]:
            notes.append(
                f"{type(tokenizer).__name__}, which transformers makes of the folder, gives {pair} other tokens than "
                "tokenizer.json by itself would, and is what is used: tokenizer_config.json may lack what it goes by, "
                'e.g. "do_lower_case": false; "tokenizer_class": "PreTrainedTokenizerFast" there has the file alone '
                "decide"
            )
            break
    return notes


def mismatched_of(loaded: dict) -> list[str]:
    """The names of what has another shape in the file."""
    return [n[0] if isinstance(n, tuple) else n for n in loaded["mismatched_keys"]]


def save(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Keeps both as a model folder that transformers reads back by itself."""
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers leaves out what was said after loading: which inputs a pair's second sentence is marked by.
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": list(tokenizer.model_input_names)}
    write_atomically(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | names, indent=2) + "\n")
    given = network.config
    if AutoConfig.from_pretrained(folder, local_files_only=True).num_labels != given.num_labels:
        # transformers leaves out what it has as its default, two labels, though BART's own default is three.
        labels = {"id2label": given.id2label, "label2id": given.label2id}
        path = folder / "config.json"
        write_atomically(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | labels, indent=2) + "\n")


def start_from(network: PreTrainedModel, folder: Path) -> None:
    """Gives the encoder the weights of a classifier kept in `folder`; the head stays as it was drawn."""
    try:
        parent = type(network).from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        network.base_model.load_state_dict(parent.base_model.state_dict())
    except Exception as error:  # whatever a broken or foreign file raises inside transformers or safetensors
        raise UserError(f"initialise_from: {folder} cannot be used: {described(error)}") from None


def _positions(network: PreTrainedModel) -> int | None:
    """The most tokens of a row; None where there is no such limit."""
    limit = getattr(network.config, "max_position_embeddings", None)
    if not limit or limit < 0:  # XLNet has −1 of them
        return None
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return min(limit, module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from there
    return limit


ROWS = (["one", "one two three four five six seven"], ["two", "eight nine ten eleven twelve thirteen"])
"""Two pairs, a short one and one of about 16 tokens."""


@torch.no_grad()
def _try(config: Config, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_labels: int) -> None:
    """Two pairs of different lengths through the model, without dropout: what fails here would fail in a step."""
    model, was_training = config.model, network.training
    rows = ROWS if tokenizer.pad_token_id is not None else (["one"], ["two"])
    try:
        inputs = _padded(tokenizer, rows, config.train.max_length)
        logits = network.eval()(**inputs).logits
    except Exception as error:  # whatever sizes that do not fit each other raise inside torch
        raise UserError(f"model {model.path or model.id or model.name} cannot be used: {described(error)}") from None
    if logits.shape != (len(rows[0]), num_labels):
        raise UserError(f"model {model.path or model.id or model.name} gives outputs of shape {tuple(logits.shape)}")
    network.train(was_training)


@torch.no_grad()
def _require_same_padding(config: Config, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """That a head which finds a row's last word by `pad_token_id` knows the tokenizer's padding. Raises UserError."""
    own, tokenizers = getattr(network.config, "pad_token_id", None), tokenizer.pad_token_id
    if own is None or tokenizers is None or own == tokenizers:
        return
    inputs = _padded(tokenizer, ROWS, config.train.max_length)
    was_training = network.training
    logits = network.eval()(**inputs).logits
    network.config.pad_token_id = tokenizers
    try:
        others = network(**inputs).logits
    finally:
        network.config.pad_token_id = own
        network.train(was_training)
    if not torch.equal(logits, others):
        raise UserError(
            f"model {config.model.path or config.model.id}: its config.json has pad_token_id {own} and its tokenizer "
            f"pads with {tokenizers} ('{tokenizer.pad_token}'), by which {type(network).__name__} finds a row's last "
            f"word: write {tokenizers} into the config.json of a copy of it"
        )


@torch.no_grad()
def require_precision(config: Config, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The same in bfloat16 and where the network is, for a training in bfloat16, which some models' own code cannot
    (DeBERTa v1; FNet on a GPU). Raises UserError."""
    if config.train.precision != "bfloat16":
        return
    model, was_training = config.model, network.training
    rows = ROWS if tokenizer.pad_token_id is not None else (["one"], ["two"])
    inputs = _padded(tokenizer, rows, config.train.max_length).to(network.device)
    try:
        with torch.autocast(network.device.type, torch.bfloat16):
            network.eval()(**inputs)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise UserError(
            f"model {model.path or model.id or model.name} cannot be used with train.precision=bfloat16, its own code "
            f"fails ({described(error)}): take train.precision=float32"
        ) from None
    network.train(was_training)


@torch.no_grad()
def require_words(config: Config, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """That noise on the words reaches them, for a method that adds it. Raises UserError."""
    if not METHODS[config.optimizer.method].noisy:
        return
    rows = ROWS if tokenizer.pad_token_id is not None else (["one"], ["two"])
    inputs = _padded(tokenizer, rows, config.train.max_length).to(network.device)
    kind = torch.float32 if network.config.num_labels == 1 else torch.int64
    labels = torch.zeros(len(rows[0]), dtype=kind, device=network.device)
    was_training = network.training
    network.eval()
    try:
        losses = ExampleLosses(network, {**inputs, "labels": labels})
        losses.outputs(torch.zeros(losses.embedding_shape, device=network.device))
    except (ValueError, NotImplementedError, AttributeError) as error:  # no such table, or another lookup
        name = config.model.path or config.model.id or config.model.name
        raise UserError(f"optimizer={config.optimizer.name} with model {name}: {described(error)}") from None
    finally:
        network.train(was_training)


def _padded(tokenizer: PreTrainedTokenizerFast, rows: Sequence[list[str]], most: int, more: int = 0) -> BatchEncoding:
    """The rows' inputs, of at most `most` tokens, padded to the longest and as many tokens `more`."""
    options: dict[str, Any] = {"truncation": "longest_first", "max_length": most, "return_attention_mask": True}
    encoded = tokenizer(*rows, **options)
    width = max(map(len, encoded["input_ids"])) + more
    if len(rows[0]) == 1 and not more:
        return tokenizer(*rows, **options, return_tensors="pt")
    return tokenizer.pad(encoded, padding="max_length", max_length=width, return_tensors="pt")


WIDER = (1, 8)
"""Tokens of padding by which outputs may not change: one, where places are pooled in pairs, and more than a few."""


@torch.no_grad()
def depends_on_padding(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_length: int) -> bool:
    """Whether what the model gives for a row's tokens changes with its padding: it mixes or pools all places (FNet,
    Funnel), or convolves over them (ConvBERT, MobileBERT)."""
    most = max_length - max(WIDER)
    if tokenizer.pad_token_id is None or most <= tokenizer.num_special_tokens_to_add(pair=True):
        return False
    was_training = network.training
    network.eval()

    def given(more: int) -> list[Tensor]:
        """The logits, and the last hidden states at tokens: there it shows before it is diluted."""
        inputs, hidden = _padded(tokenizer, ROWS, most, more).to(network.device), []
        with network.base_model.register_forward_hook(lambda _, __, output: hidden.append(output[0])):
            logits = network(**inputs).logits
        mask = inputs["attention_mask"].bool()
        return [logits, *(h[mask] for h in hidden if h.shape[:2] == mask.shape)]

    usual = given(0)
    found = any(
        bool((one - other).abs().max() > 1e-4 * one.abs().max())
        for more in WIDER
        for one, other in zip(usual, given(more), strict=False)  # Funnel's last ones are at fewer places
    )
    network.train(was_training)
    return found


def _architecture(given: dict, num_labels: int, tokenizer: PreTrainedTokenizerFast) -> BertConfig:
    """The configuration that these settings of a BERT make. UserError for one that it does not have."""
    own = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    known = BertConfig().to_dict().keys() - {"num_labels", "id2label", "label2id"}  # the task says those
    for name in given:
        if name not in known:
            raise UserError(f"unknown key 'model.architecture.{name}'; {did_you_mean(name, known)}")
        if isinstance(given[name], int | float) and given[name] < 0:
            raise UserError(f"model.architecture.{name}={given[name]} must be at least 0")
    try:
        return BertConfig(**own | given | {"num_labels": num_labels})
    except Exception as error:  # whatever its checks of types raise
        raise UserError(f"model.architecture={given}: {described(error)}") from None


def _load(model: Model, what: str, load, **options):
    """`load` from the model's folder; a UserError of one line for what fails."""
    folder = folder_of(model)
    try:
        return load(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # whatever a broken file raises inside transformers, tokenizers or safetensors
        if "trust_remote_code" in str(error):
            raise UserError(
                f"model {model.path or model.id}: it has code of its own (trust_remote_code), which is never run here: "
                "take one whose classes transformers has"
            ) from None
        raise UserError(f"model {model.path or model.id}: cannot read the {what}: {first_line(error)}") from None
