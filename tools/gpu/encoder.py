"""encoder.py DIR: a model folder of BERT-base's shape with random weights and the carried tokenizer."""

import os
import sys

from transformers import AutoTokenizer, BertConfig, BertModel

AutoTokenizer.from_pretrained(os.path.join(os.environ["CARRIED"], "encoder")).save_pretrained(sys.argv[1])
shape = (
    {}
    if os.environ["GPU_CHECK_DEVICE"] == "cuda"
    else dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
)
BertModel(BertConfig(vocab_size=30522, **shape)).save_pretrained(sys.argv[1])
