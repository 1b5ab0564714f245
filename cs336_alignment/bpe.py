"""A byte-level BPE tokenizer trained on the course's own texts, in Hugging Face's clothes.

Any UTF-8 text encodes and decodes back to itself: the 256 bytes are in the vocabulary before the first
merge, so there is no unknown token. The result is a `PreTrainedTokenizerFast` with four special tokens and a
chat template; it saves and loads like any other (`save_pretrained`, `AutoTokenizer`). A text that spells a
special token out ("<|end|>") is read as that token, as in most tokenizers: the markers are no security.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

# Without the generation prompt a finished conversation: what chat_format, the response and END give.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% else %}"
    "" + USER + "{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int = 4096) -> "PreTrainedTokenizerFast":
    """Learn byte-pair merges (Sennrich et al., 2016, arXiv 1508.07909) on bytes, as GPT-2 does.

    Args:
        texts: what the model will read and write; the same texts give the same tokenizer.
        vocab_size: an upper bound; short texts run out of pairs that occur twice before it.

    Raises:
        ValueError: no text, or a vocabulary too small for 256 bytes and 4 special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = list(texts)
    if not any(text.strip() for text in texts):
        raise ValueError("no text to train a tokenizer on")
    if vocab_size < 260:
        raise ValueError(f"vocab_size is at least 260 (256 bytes and 4 special tokens), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
