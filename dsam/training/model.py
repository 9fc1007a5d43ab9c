"""Builds the classifier and its tokenizer from a hub id, a local folder or an architecture; runs no code of theirs."""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (  # type: ignore[attr-defined]  # BertTokenizerFast is there; its stubs lack it
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ..config import Config, Model
from ..errors import UserError, did_you_mean
from ..glue.builtin import VOCABULARY
from ..text import described, first_line
from .dropout import configure_dropout, set_dropout
from .model_files import folder_of

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer."""
    if model.architecture and not (model.path or model.id):
        return BertTokenizerFast(vocab=str(VOCABULARY), do_lower_case=True)
    tokenizer = _load(model, "tokenizer", AutoTokenizer.from_pretrained)
    if not tokenizer.is_fast:
        raise UserError(f"model {model.path or model.id} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def build(config: Config, num_labels: int, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The classifier in float32 on the CPU, its head drawn from seeds.init.

    Raises UserError where weights, configuration and tokenizer do not fit each other.
    """
    model, train = config.model, config.train
    torch.manual_seed(config.seeds.init)
    if model.architecture and not (model.path or model.id):
        architecture = _architecture(model.architecture, num_labels, tokenizer)
        if train.dropout is not None:
            configure_dropout(architecture, train.dropout)
        try:
            network = BertForSequenceClassification(architecture)
        except Exception as error:  # whatever sizes that do not fit each other, or memory, raise inside torch
            raise UserError(f"model.architecture={model.architecture}: {described(error)}") from None
    else:
        architecture = _load(model, "configuration", AutoConfig.from_pretrained)
        architecture.num_labels = num_labels
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
        mismatched = [n[0] if isinstance(n, tuple) else n for n in loaded["mismatched_keys"]]
        mismatched = [n for n in mismatched if n.startswith(prefix)]
        # Heads and poolers that the classifier does not use are no mistake; layers are.
        surplus = [n for n in loaded["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", n)]
        for names, what in ((missing, "missing"), (mismatched, "of another shape"), (surplus, "of layers it has not")):
            if names:
                raise UserError(
                    f"model {model.path or model.id}: the weights do not fit the configuration: "
                    f"{len(names)} {what}, e.g. {min(names)}"
                )
        for tensor in [*network.parameters(), *network.buffers()]:
            # Off the file's memory map: its alignment follows the file's layout, and alignment rounds differently.
            tensor.data = tensor.data.clone()
    if train.dropout is not None:
        set_dropout(network, train.dropout)
    words: Any = network.get_input_embeddings()
    if len(tokenizer) > words.num_embeddings:
        raise UserError(
            f"model {model.path or model.name}: the tokenizer has {len(tokenizer)} tokens and the model "
            f"{words.num_embeddings} embeddings: they do not fit each other"
        )
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions and train.max_length > positions:
        raise UserError(f"train.max_length={train.max_length} is above the model's {positions} positions")
    _try(model, network, tokenizer, num_labels)
    return network


def start_from(network: PreTrainedModel, folder: Path) -> None:
    """Gives the encoder the weights of a classifier kept in `folder`; the head stays as it was drawn."""
    try:
        parent = type(network).from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        network.base_model.load_state_dict(parent.base_model.state_dict())
    except Exception as error:  # whatever a broken or foreign file raises inside transformers or safetensors
        raise UserError(f"initialise_from: {folder} cannot be used: {described(error)}") from None


@torch.no_grad()
def _try(model: Model, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, num_labels: int) -> None:
    """One short pair through the model, without dropout: what fails here would fail in the first step."""
    was_training = network.training
    try:
        logits = network.eval()(**tokenizer("one", "two", return_tensors="pt")).logits
    except Exception as error:  # whatever sizes that do not fit each other raise inside torch
        raise UserError(f"model {model.path or model.id or model.name} cannot be used: {described(error)}") from None
    if logits.shape != (1, num_labels):
        raise UserError(f"model {model.path or model.id or model.name} gives outputs of shape {tuple(logits.shape)}")
    network.train(was_training)


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
        raise UserError(f"model {model.path or model.id}: cannot read the {what}: {first_line(error)}") from None
