# ruff: noqa: E501
"""Tiny classifiers with random weights of the families of encoders that people fine-tune."""

import copy
import functools

import torch
import transformers as t

V, H, L, F, P = 60, 16, 3, 24, 40
USUAL = dict(
    vocab_size=V, hidden_size=H, num_hidden_layers=L, num_attention_heads=2, intermediate_size=F, pad_token_id=1
)
PLACES = USUAL | dict(max_position_embeddings=P)
DROPPED = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
DECODER = USUAL | dict(num_key_value_heads=1, max_position_embeddings=P, attention_dropout=0.1)
SEQ2SEQ = dict(
    vocab_size=V, d_model=H, encoder_layers=L, decoder_layers=L, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=F, decoder_ffn_dim=F, max_position_embeddings=P, pad_token_id=1, eos_token_id=2,
)  # fmt: skip

FAMILIES = {
    "bert": ("Bert", PLACES | DROPPED),
    "roberta": ("Roberta", PLACES | DROPPED),
    "xlm_roberta": ("XLMRoberta", PLACES | DROPPED),
    "camembert": ("Camembert", PLACES | DROPPED),
    "electra": ("Electra", PLACES | DROPPED | dict(embedding_size=8)),
    "distilbert": ("DistilBert", dict(vocab_size=V, dim=H, n_layers=L, n_heads=2, hidden_dim=F, max_position_embeddings=P)),
    "albert": ("Albert", PLACES | DROPPED | dict(embedding_size=8)),
    "mpnet": ("MPNet", PLACES | DROPPED),
    "deberta": ("Deberta", PLACES | DROPPED | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0)),
    "deberta_v2": ("DebertaV2", PLACES | DROPPED | dict(
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, share_att_key=True,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0)),
    "modernbert": ("ModernBert", USUAL | dict(
        max_position_embeddings=P, attention_dropout=0.1, mlp_dropout=0.1, embedding_dropout=0.1, local_attention=8,
        global_attn_every_n_layers=2, cls_token_id=3, sep_token_id=2, bos_token_id=3, eos_token_id=2)),
    "xlnet": ("XLNet", dict(vocab_size=V, d_model=H, n_layer=L, n_head=2, d_inner=F, pad_token_id=1)),
    "fnet": ("FNet", dict(vocab_size=V, hidden_size=H, num_hidden_layers=L, intermediate_size=F, pad_token_id=1,
                          max_position_embeddings=P)),
    "funnel": ("Funnel", dict(vocab_size=V, block_sizes=[1, 1, 1], d_model=H, n_head=2, d_head=8, d_inner=F, pad_token_id=1)),
    "t5": ("T5", dict(vocab_size=V, d_model=H, d_kv=8, d_ff=F, num_layers=L, num_heads=2, pad_token_id=1, eos_token_id=2,
                      decoder_start_token_id=1)),
    "bart": ("Bart", SEQ2SEQ | dict(decoder_start_token_id=2)),
    "xlm": ("XLM", dict(vocab_size=V, emb_dim=H, n_layers=L, n_heads=2, max_position_embeddings=P, pad_index=1)),
    "gpt2": ("GPT2", dict(vocab_size=V, n_embd=H, n_layer=L, n_head=2, n_positions=P, pad_token_id=1)),
    "qwen2": ("Qwen2", DECODER),
    "llama": ("Llama", DECODER),
    "opt": ("OPT", dict(vocab_size=V, hidden_size=H, num_hidden_layers=L, num_attention_heads=2, ffn_dim=F, pad_token_id=1,
                        max_position_embeddings=P, word_embed_proj_dim=H)),
    "convbert": ("ConvBert", PLACES | DROPPED | dict(embedding_size=H, num_groups=1)),
    "mobilebert": ("MobileBert", PLACES | dict(embedding_size=H, true_hidden_size=H, intra_bottleneck_size=H,
                                               num_feedforward_networks=1)),
    "squeezebert": ("SqueezeBert", PLACES | DROPPED | dict(embedding_size=H, q_groups=1, k_groups=1, v_groups=1,
                                                          post_attention_groups=1, intermediate_groups=1, output_groups=1)),
}  # fmt: skip


@functools.cache
def _config(family: str, **others):
    name, settings = FAMILIES[family]
    return getattr(t, f"{name}Config")(**settings | others, num_labels=2)


def model(family: str, dtype: torch.dtype = torch.float64, **others):
    """In training mode, from a fixed seed; `others`: other settings than the family's."""
    torch.manual_seed(0)
    name = FAMILIES[family][0]
    config = copy.deepcopy(_config(family, **others))  # a model's attention is chosen in its configuration
    return getattr(t, f"{name}ForSequenceClassification")(config).to(dtype).train()


def batch(examples: int = 5, tokens: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Padded on the right; each example ends, before its padding, in the token of the end that BART looks for."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, V, (examples, tokens), generator=g)
    lengths = torch.randint(tokens - 3, tokens + 1, (examples,), generator=g)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids[torch.arange(examples), lengths - 1] = 2
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask, "labels": torch.arange(examples) % 2}
