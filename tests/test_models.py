"""Classifiers of many families as a run builds them: their lengths, padding, marks of a pair's sentences."""

import json
import re
from functools import partial
from pathlib import Path

import encoders
import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_config import composed
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AlbertTokenizer, PreTrainedTokenizerFast, XLNetTokenizer

from dsam.config import CONF, Config
from dsam.errors import UserError
from dsam.glue import Tokenised
from dsam.overrides import compose_config
from dsam.runs.identity import identify
from dsam.runs.run import prepare, run
from dsam.training.loop import parameter_groups
from dsam.training.model import build, load_tokenizer, save, start_from

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"]
WORDS += ["the", "a", "is", "of", "and", "to", "in"]
SPECIAL = ["<unk>", "<pad>", "</s>", "<s>", "<mask>"]  # padding is 1 and the end 2, as `encoders` has them


def plain_tokenizer(**options) -> PreTrainedTokenizerFast:
    """A word a token; pairs as BART and RoBERTa have them, all of the type 0."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 3), ("</s>", 2)]
    )
    named = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **named | options
    )


def unigram(kind, pad: str, cls: str, sep: str):
    names = dict.fromkeys([pad, "<unk>", cls, sep, "[MASK]", *(f"▁{word}" for word in WORDS)])
    return kind(vocab=[(name, -1.0) for name in names], unk_token="<unk>", pad_token=pad, cls_token=cls, sep_token=sep)


def folder_of(place: Path, family: str, tokenizer=None, spoil=lambda network: None, **settings) -> Path:
    """A model's folder, in float32, its tokenizer beside it."""
    kind, sizes = encoders.FAMILIES[family]
    tokenizer = tokenizer or plain_tokenizer(padding_side="left" if family == "xlnet" else "right")
    torch.manual_seed(0)
    given = getattr(transformers, f"{kind}Config")(**sizes | settings, num_labels=2)
    network = getattr(transformers, f"{kind}ForSequenceClassification")(given)
    spoil(network)
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def of(folder: Path, *more: str) -> Config:
    """The configuration of a run of that model, its runs and its cache beside it. Composed once for all folders."""
    given = OmegaConf.create(composed("model=encoder", "model.path=/model", *more))
    given.model.path, given.paths.runs, given.paths.cache = str(folder), f"{folder}/runs", f"{folder}/cache"
    return Config.load(given)


PLACES = dict.fromkeys(["bert", "distilbert", "modernbert", "bart", "gpt2", "opt", "xlm", "llama"], encoders.P)
PLACES |= dict.fromkeys(["roberta", "xlm_roberta", "camembert", "mpnet"], encoders.P - 2)  # they count from padding on
PLACES |= dict.fromkeys(["xlnet", "t5", "funnel"], None)


@pytest.mark.parametrize("family", PLACES)
def test_rows_are_at_most_as_long_as_a_model_has_places(family, tmp_path):
    limit = PLACES[family]
    folder = folder_of(tmp_path, family)
    tokenizer = plain_tokenizer()
    network = build(of(folder, f"train.max_length={limit or 200}"), 2, tokenizer).eval()
    row = tokenizer("one " * (limit or 200), truncation=True, max_length=limit or 200, return_tensors="pt")
    assert row["input_ids"].shape[1] == (limit or 200)
    assert torch.isfinite(network(**row).logits).all()
    if limit is not None:
        with pytest.raises(UserError, match=f"max_length={limit + 1} is above the model's {limit} positions"):
            build(of(folder, f"train.max_length={limit + 1}"), 2, tokenizer)


def test_a_decoder_without_a_word_for_padding_takes_its_tokenizers(tmp_path):
    folder = folder_of(tmp_path, "gpt2", pad_token_id=None)
    given = of(folder, "train.max_length=32")
    tokenizer = load_tokenizer(given.model)
    network = build(given, 2, tokenizer).eval()
    assert network.config.pad_token_id == tokenizer.pad_token_id == 1
    rows = ["one two three", "one two three four five six"]
    both = network(**tokenizer(rows, padding=True, return_tensors="pt")).logits
    each = torch.cat([network(**tokenizer(row, return_tensors="pt")).logits for row in rows])
    torch.testing.assert_close(both, each, rtol=1e-4, atol=1e-5)


def test_the_page_s_copy_of_a_model_without_padding_is_taken(tmp_path):
    """GPT-2: no word for padding in its tokenizer, none in its configuration."""
    page = (Path(__file__).parent.parent / "docs" / "own-model.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    bare = folder_of(tmp_path / "bare", "gpt2", plain_tokenizer(pad_token=None), pad_token_id=None)
    exec(code, {"NAME": str(bare), "DIR": str(tmp_path / "copy")})
    given = of(tmp_path / "copy", "train.max_length=32")
    tokenizer = load_tokenizer(given.model)
    network = build(given, 3, tokenizer)
    assert tokenizer.pad_token_id == network.config.pad_token_id == tokenizer.eos_token_id == 2
    there = load_file(bare / "model.safetensors")
    kept = {name: value for name, value in network.state_dict().items() if name in there and "score" not in name}
    assert len(kept) > 10 and all(torch.equal(value, there[name]) for name, value in kept.items())


def test_the_page_s_model_of_one_s_own_composes(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "own-model.md").read_text(encoding="utf-8")
    (file,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "deberta.yaml").write_text(file)
    given = Config.load(compose_config(["model=deberta"], CONF, more=tmp_path))
    assert (given.model.name, given.model.path, given.model.rho) == ("deberta", "/models/deberta", 0.02)
    assert (given.train.lr, given.train.epochs, given.train.batch_size) == (3e-5, 5, 16)


def test_a_decoder_whose_padding_is_not_its_tokenizers_is_refused(tmp_path):
    """It would take a padding token of the shorter row for its last word. An encoder does not look."""
    folder = folder_of(tmp_path / "llama", "llama", pad_token_id=0)
    given = of(folder, "train.max_length=32")
    message = r"config.json has pad_token_id 0 and its tokenizer pads with 1 \('<pad>'\), .* write 1 into"
    with pytest.raises(UserError, match=message):
        build(given, 2, load_tokenizer(given.model))
    bert = of(folder_of(tmp_path / "bert", "bert", pad_token_id=0), "train.max_length=32")
    assert build(bert, 2, load_tokenizer(bert.model)).config.pad_token_id == 0


@pytest.mark.parametrize(("family", "key"), [("bert", "num_hidden_layers"), ("gpt2", "n_layer"), ("xlm", "n_layers")])
def test_more_layers_than_the_configuration_has_are_refused(family, key, tmp_path):
    folder = folder_of(tmp_path, family)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {key: 1}))
    given = of(folder, "train.max_length=24")
    with pytest.raises(UserError, match=r"do not fit the configuration: \d+ of layers it has not"):
        build(given, 2, load_tokenizer(given.model))


def test_a_decoder_that_a_classifier_has_not_is_no_mistake(tmp_path):
    folder = folder_of(tmp_path, "funnel")
    whole = transformers.FunnelModel(transformers.AutoConfig.from_pretrained(folder))
    transformers.FunnelForMaskedLM(whole.config).save_pretrained(folder)
    given = of(folder, "train.max_length=24")
    assert build(given, 2, load_tokenizer(given.model)).config.num_labels == 2


def test_a_head_of_another_make_is_no_mistake(tmp_path):
    folder = folder_of(tmp_path, "bert")
    weights = {
        name.replace("classifier.", "classifier.0."): w for name, w in load_file(folder / "model.safetensors").items()
    }
    assert "classifier.0.weight" in weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    given = of(folder, "train.max_length=24")
    assert build(given, 2, load_tokenizer(given.model)).config.num_labels == 2


def test_weights_in_several_old_files_are_read(tmp_path):
    folder = folder_of(tmp_path, "bert")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, own in parts.items():
        torch.save({name: weights[name] for name in own}, folder / file)
    places = {name: file for file, own in parts.items() for name in own}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "model.safetensors").unlink()
    given = of(folder, "train.max_length=24")
    assert torch.equal(build(given, 2, load_tokenizer(given.model)).state_dict()[names[0]], weights[names[0]])


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = folder_of(tmp_path, "bert")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has an adapter beside its weights \(adapter_config.json\): merge it"):
        prepare(of(folder, "train.max_length=24"))


def test_a_model_with_code_of_its_own_is_refused_in_one_line(tmp_path):
    folder = folder_of(tmp_path, "bert")
    written = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(written | own))
    with pytest.raises(
        UserError, match=r"it has code of its own \(trust_remote_code\), which is never run here: take"
    ) as e:
        prepare(of(folder, "train.max_length=24"))
    assert "\n" not in str(e.value)


def test_code_of_its_own_that_a_class_of_transformers_stands_in_for_is_said(tmp_path):
    folder = folder_of(tmp_path, "bert")
    assert not any("auto_map" in note for note in prepare(of(folder, "train.max_length=24")).notes)
    for file, taken in (
        ("config.json", "BertForSequenceClassification"),
        ("tokenizer_config.json", PreTrainedTokenizerFast.__name__),
    ):
        before = (folder / file).read_text()
        own = {"auto_map": {"AutoModel": "modeling_alibi.AlibiModel", "AutoTokenizer": [None, "mine.Tokenizer"]}}
        (folder / file).write_text(json.dumps(json.loads(before) | own))
        (said,) = (note for note in prepare(of(folder, "train.max_length=24")).notes if "auto_map" in note)
        assert said.startswith(f"{file} names code of the model's own") and taken in said
        (folder / file).write_text(before)


@pytest.mark.parametrize("spoil", ["none", "cased", "accents", "template"])
def test_a_tokenizer_s_file_that_its_class_does_not_follow_is_said(spoil, tmp_path):
    """The class, and not the file, says whether letters are folded: beside what `tokenizers` makes of the file."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "world", "World", "naive", "naïve", "a"]
    own = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    folder = folder_of(tmp_path, "bert", own)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    given = json.loads(file.read_text())
    if spoil == "cased":
        given["normalizer"]["lowercase"] = False
    if spoil == "accents":
        given["normalizer"]["strip_accents"] = False
    if spoil == "template":
        given["post_processor"]["pair"] = given["post_processor"]["pair"][:-1]
    file.write_text(json.dumps(given))
    pair, alone = ("Hello World", "a naïve"), Tokenizer.from_file(str(file))
    used = load_tokenizer(of(folder).model)
    differ = alone.encode(*pair).ids != used(*pair)["input_ids"]
    assert differ == (spoil != "none")

    def said():
        return any("tokenizer.json" in note for note in prepare(of(folder, "train.max_length=24")).notes)

    assert said() == differ
    cure = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | cure))
    assert load_tokenizer(of(folder).model)(*pair)["input_ids"] == alone.encode(*pair).ids and not said()


def test_a_vocabulary_with_gaps_that_goes_beyond_the_embeddings_is_refused(tmp_path):
    numbers = {word: i for i, word in enumerate([*SPECIAL, *WORDS])} | {"two": 99}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    folder = folder_of(tmp_path, "bert", gaps)
    with pytest.raises(UserError, match=r"has 25 tokens, up to the id 99, and the model 60 embeddings: they do not"):
        prepare(of(folder, "train.max_length=24"))


def test_sentences_without_a_mark_between_them_are_said(tmp_path):
    bare = plain_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    said = "puts no mark between the two sentences"
    for name, tokenizer, task, expected in (
        ("bare", bare, "entailment", True),
        ("single", bare, "agreement", False),
        ("marked", plain_tokenizer(), "entailment", False),
    ):
        folder = folder_of(tmp_path / name, "llama", tokenizer)
        assert (
            any(said in note for note in prepare(of(folder, "train.max_length=32", f"task={task}")).notes) == expected
        )


def test_what_fails_with_two_rows_only_fails_before_the_run(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "gpt2")
    given = of(folder, "train.max_length=32")
    tokenizer = load_tokenizer(given.model)
    monkeypatch.setattr(transformers.GPT2Config, "pad_token_id", property(lambda self: None, lambda self, value: None))
    with pytest.raises(UserError, match="cannot be used: ValueError: Cannot handle batch sizes > 1"):
        build(given, 2, tokenizer)


@pytest.mark.parametrize("family", ["albert", "xlnet"])
def test_the_second_sentence_of_a_pair_is_marked(family, tmp_path):
    kind = {"albert": AlbertTokenizer, "xlnet": XLNetTokenizer}[family]
    pad, cls, sep = {"albert": ("<pad>", "[CLS]", "[SEP]"), "xlnet": ("<pad>", "<cls>", "<sep>")}[family]
    tokenizer = load_tokenizer(of(folder_of(tmp_path, family, unigram(kind, pad, cls, sep))).model)
    encoded = tokenizer("one two", "three")
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    types = dict(zip(words, encoded["token_type_ids"], strict=True))
    assert (types["▁one"], types["▁two"], types["▁three"]) == (0, 0, 1)
    data = prepare(of(tmp_path, "task=entailment", "train.max_length=32")).data
    pairs = next(iter(data.values()))
    assert {0, 1} <= set(np.unique(pairs.token_type_ids).tolist())


def test_marks_go_to_no_model_that_has_none_for_them(tmp_path):
    """RoBERTa has one type, MPNet none, GPT-2 would look them up as words; BERT's own tokenizer stays as it is,
    and serves a RoBERTa of two types."""
    for family in ("roberta", "mpnet", "gpt2", "modernbert"):
        types = {"type_vocab_size": 1} if family == "roberta" else {}
        folder = folder_of(tmp_path / family, family, unigram(AlbertTokenizer, "<pad>", "[CLS]", "[SEP]"), **types)
        assert load_tokenizer(of(folder).model).model_input_names == ["input_ids", "attention_mask"]
    bert = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])})
    names = ["input_ids", "token_type_ids", "attention_mask"]
    assert load_tokenizer(of(folder_of(tmp_path / "bert", "bert", bert)).model).model_input_names == names
    for types, expected in ((2, names), (1, ["input_ids", "attention_mask"])):
        roberta = folder_of(tmp_path / f"roberta-{types}", "roberta", bert, type_vocab_size=types)
        assert load_tokenizer(of(roberta).model).model_input_names == expected
    without = load_tokenizer(of(folder_of(tmp_path / "distilbert", "distilbert", bert)).model).model_input_names
    assert without == ["input_ids", "attention_mask"]


def heavy_padding(network):
    network.get_input_embeddings().weight.data[1] = 1.0


MIXED = {"fnet", "funnel", "convbert", "mobilebert"}


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_models_whose_outputs_depend_on_padding_are_known(family, tmp_path):
    """A trained MobileBERT's word for padding is not zero."""
    ready = prepare(of(folder_of(tmp_path, family, spoil=heavy_padding), "task=agreement", "train.max_length=32"))
    assert ready.whole == (family in MIXED)
    assert [note.endswith("batches are not cut by length") for note in ready.otherwise] == [True] * ready.whole


@pytest.mark.parametrize("micro", ["null", "5"])
def test_their_batches_are_padded_alike(micro, tmp_path, monkeypatch):
    """Micro-batches, which bound the memory, are as wide as the whole batch is."""
    seen = []
    folder = folder_of(tmp_path / "model", "fnet")
    options = ["task=agreement", "train.max_length=32", "train.piece_overhead=0"]
    options += ["train.max_steps=2", "train.batch_size=16", f"train.micro_batch_size={micro}"]
    given = of(folder, *options)
    batch = Tokenised.batch

    def noted(self, indices, *widths):
        found = batch(self, indices, *widths)
        if widths:
            seen.append((found["input_ids"].shape, int(self.lengths[indices].max())))
        return found

    monkeypatch.setattr(Tokenised, "batch", noted)
    result = run(given)
    assert result["notes"] == [
        "FNetForSequenceClassification's outputs depend on padding: batches are not cut by length"
    ]
    sizes = [16] * 2 if micro == "null" else [5, 5, 5, 1] * 2
    assert [shape[0] for shape, _ in seen] == sizes
    half = len(seen) // 2
    for step in (seen[:half], seen[half:]):
        assert {shape[1] for shape, _ in step} == {max(longest for _, longest in step)}


@pytest.mark.parametrize(("family", "task"), [("bert", "entailment"), ("bart", "entailment"), ("bart", "agreement")])
def test_a_kept_folder_is_read_back_by_transformers_and_by_a_run_that_starts_from_it(family, task, tmp_path):
    """Two labels and more: BART has three where its configuration does not say."""
    options = [f"task={task}", "train.max_steps=1", "train.max_train_examples=16", "train.max_length=24"]
    options += ["tracking=disabled"]
    given = of(folder_of(tmp_path / "model", family), *options, "checkpoint.keep_weights=true")
    run(given)
    kept = identify(given).folder / "best"
    written = load_file(kept / "model.safetensors")
    reader = transformers.AutoModelForSequenceClassification
    named = dict(enumerate(given.task.labels))
    for network in (reader.from_pretrained(kept), prepare(of(kept, *options)).network):
        assert network.config.num_labels == given.task.num_labels and network.config.id2label == named
        assert network.config.label2id == {label: number for number, label in named.items()}
        assert all(torch.equal(network.state_dict()[name], value) for name, value in written.items())
    network = build(of(tmp_path / "model", "train.max_length=24"), 1, plain_tokenizer())
    start_from(network, kept)
    started = network.base_model.state_dict()
    found = network.base_model.__class__.from_pretrained(kept).state_dict()
    assert all(torch.equal(started[name], found[name]) for name in started)


def test_a_classifier_that_came_with_the_weights_is_said_with_what_it_was_for(tmp_path):
    """Nothing of it is drawn from seeds.init, and its labels may be others in another order."""
    options = ["task=agreement", "train.max_length=24"]
    plain, theirs = folder_of(tmp_path / "plain", "bert"), tmp_path / "theirs"
    transformers.AutoModel.from_pretrained(plain).save_pretrained(plain)  # the encoder alone
    given = of(plain, *options)
    network = prepare(given).network
    assert not any("the classifier came" in note for note in prepare(given).notes)
    save(network, load_tokenizer(given.model), theirs)
    for names, said in (
        (given.task.labels, "the classifier came with the weights: seeds.init"),
        (
            ("POSITIVE", "NEGATIVE"),
            "the classifier came with the weights, for POSITIVE, NEGATIVE: seeds.init draws none",
        ),
    ):
        written = json.loads((theirs / "config.json").read_text())
        (theirs / "config.json").write_text(json.dumps(written | {"id2label": dict(enumerate(names))}))
        ready = [prepare(of(theirs, *options, f"seed={seed}")) for seed in (0, 1)]
        assert [sum(note.startswith(said) for note in one.notes) for one in ready] == [1, 1]
        assert all(torch.equal(one.network.classifier.weight, network.classifier.weight) for one in ready)
        assert ready[0].network.config.id2label == dict(enumerate(given.task.labels))


def test_a_part_of_a_classifier_that_came_with_the_weights_is_said(tmp_path):
    """RoBERTa's has two layers, of which another number of labels changes the last."""
    folder = folder_of(tmp_path, "roberta")
    classifier = transformers.AutoModelForSequenceClassification
    classifier.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True).save_pretrained(folder)
    first, second = (prepare(of(folder, "task=agreement", "train.max_length=24", f"seed={seed}")) for seed in (0, 1))
    said = "part of the classifier came with the weights, e.g. classifier.dense.bias: seeds.init draws the rest"
    assert said in first.notes
    one, other = first.network.classifier, second.network.classifier
    assert torch.equal(one.dense.weight, other.dense.weight)
    assert not torch.equal(one.out_proj.weight, other.out_proj.weight)


def test_texts_that_are_cut_are_said(tmp_path):
    folder = folder_of(tmp_path, "bert")
    whole = prepare(of(folder, "task=agreement", "train.max_length=24"))
    assert not any("is cut off" in note for note in whole.notes)
    lengths = whole.data["train"].lengths
    most = int(np.quantile(lengths, 0.7))
    cut = prepare(of(folder, "task=agreement", f"train.max_length={most}"))
    share = 100 * (lengths >= most).mean()
    assert (
        f"{share:.0f} % of the train texts reach train.max_length={most} tokens; what is beyond is cut off" in cut.notes
    )


def test_transformers_marks_the_pairs_of_a_kept_folder_as_the_run_did(tmp_path):
    tokenizer = unigram(AlbertTokenizer, "<pad>", "[CLS]", "[SEP]")
    options = ["task=entailment", "train.max_steps=1", "train.max_length=24", "tracking=disabled"]
    given = of(folder_of(tmp_path / "model", "albert", tokenizer), *options, "checkpoint.keep_weights=true")
    run(given)
    kept = identify(given).folder / "best"
    pair = ("one two", "three")
    plain = transformers.AutoTokenizer.from_pretrained(kept)(*pair)
    assert dict(plain) == dict(load_tokenizer(given.model)(*pair)) and 1 in plain["token_type_ids"]


BIASES = {"xlnet": ("r_w_bias", "r_r_bias", "r_s_bias"), "funnel": ("r_w_bias", "r_r_bias", "r_s_bias")}
BIASES |= {"convbert": ("conv_attn_layer.bias", "key_conv_attn_layer.bias")}


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_biases_and_norms_do_not_decay_and_all_else_does(family):
    """By the modules that own them: what is called a bias, and what belongs to a norm; biases of two axes too."""
    network = encoders.model(family)
    decayed, others = ({id(p) for p in group["params"]} for group in parameter_groups(network, 0.1))
    names = {id(p): name for name, p in network.named_parameters()}
    norms = {id(p) for m in network.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
    expected = {key for key, name in names.items() if key in norms or re.search(r"(^|[._])bias$", name)}
    assert (others, decayed) == (expected, names.keys() - expected)
    wide = {names[id(p)] for p in network.parameters() if p.ndim > 1 and id(p) in others}
    assert {name for name in BIASES.get(family, ()) if not any(one.endswith(name) for one in wide)} == set()
    assert bool(wide) == (family in BIASES)


@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_each_family_finishes_a_run_in_bfloat16_with_dropout(family, tmp_path):
    folder = folder_of(tmp_path / "model", family)
    few = ["train.max_steps=2", "train.batch_size=8", "train.max_length=24", "train.max_train_examples=16"]
    given = [*few, "train.precision=bfloat16", "train.dropout=0.1", "device.threads=1"]
    weights = set()
    for method in ("dsam", "per_instance"):
        run_it = partial(run, of(folder, "task=agreement", f"optimizer={method}", *given))
        if family == "deberta":  # the value of its mask does not fit into bfloat16
            with pytest.raises(UserError, match="cannot be used with train.precision=bfloat16.*take .*float32"):
                run_it()
            continue
        result = run_it()
        assert result["status"] == "finished" and np.isfinite(result["evaluations"][-1]["loss"])
        assert result["train"]["steps"] == 2
        weights.add(result["weights_sha256"])
    assert len(weights) == (0 if family == "deberta" else 2)  # each method did something else
