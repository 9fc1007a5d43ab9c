"""Dropout that draws its masks four times as fast on a CPU, the same random variable as PyTorch's; and its rate."""

from contextlib import suppress

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

LEVELS = 2**16  # a mask's element is one 16-bit draw below or above a threshold


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zeroed with probability p, rounded to a multiple of 1/65536, and the others scaled so that
    the expectation is x. Srivastava et al. 2014, Dropout, JMLR 15.

    Draws from PyTorch's default CPU generator, as `torch.dropout` does, but four elements from one 64-bit number
    where `bernoulli_` takes a double for each. The draws do not depend on the number of threads.
    """
    zeroed = round(p * LEVELS)
    if zeroed == 0:
        return x
    if zeroed == LEVELS:
        return x * 0
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(draws, zeroed - LEVELS // 2, out=kept)  # 0 or 1 already as a float: a boolean mask multiplies slowly
    return x * kept.mul_(LEVELS / (LEVELS - zeroed))


_dropout = dropout  # `attention` has an argument of that name


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options,
) -> tuple[Tensor, Tensor | None]:
    """Attention in plain operators, with this module's dropout: what transformers calls for each layer.

    Its default, SDPA, takes plain operators too while there is dropout, which no fused CPU kernel has. It still does
    what is not BERT's attention: relative positions (T5), several queries to a key (Llama). In evaluation its kernel
    would be faster, by less than a hundredth of a run, in which scores would then round otherwise.
    """
    if key.shape[1] != query.shape[1] or any(options.get(name) is not None for name in BEYOND):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = nn.functional.softmax(scores, dim=-1)
    if module.training:
        shares = _dropout(shares, dropout)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), shares


NAME = "dsam"
BEYOND = ("position_bias", "softcap", "s_aux")  # what some models add to the scores
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def use_fast_dropout(network: PreTrainedModel) -> None:
    """Gives every Dropout of the network, and its attention where it is the usual one, the draws of `dropout`."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and not child.inplace:
                setattr(module, name, Dropout(child.p).train(child.training))
    if network.config._attn_implementation == "sdpa":  # others are a model's own
        network.set_attn_implementation(NAME)


def configure_dropout(config: PreTrainedConfig, p: float) -> None:
    """Has a network that is built from this configuration drop with probability p wherever it can drop.

    Each family has names of its own for its dropouts, and builds some of them only where p is above 0.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            configure_dropout(value, p)
        elif _is_rate(name, value, p) or (_is_rate(name, 0.0, p) and value is None):
            with suppress(StrictDataclassFieldValidationError):  # MPT's must be whole: `set_dropout` sets it
                setattr(config, name, p)


def set_dropout(network: nn.Module, p: float) -> None:
    """The same in a network that is built, for what does not follow its configuration."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = p
        for name, value in vars(module).items():
            if _is_rate(name, value, p):
                setattr(module, name, p)


def _is_rate(name: str, value: object, p: float) -> bool:
    """Whether it is a dropout's probability. To leave whole layers out is none, but no dropout means that no less."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return p == 0 if "layerdrop" in name else "dropout" in name or name.endswith("pdrop")
