"""Models: our Llama is transformers' Llama, padding never matters, and files go both ways."""

import json
import os

import pytest
import torch

from cs336_alignment import models
from cs336_alignment.models import (
    HFCausalLM,
    Llama,
    ModelConfig,
    RestrictedVocabulary,
    RewardModel,
    ValueModel,
    autocast,
    count_parameters,
    frozen_copy,
    load_model,
    load_progress,
    resolve_device,
    save_model,
    save_progress,
)

SHAPE = dict(vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
# Large random weights: attention far from uniform and logits of size 1, so that a wrong detail shows.
SHAPE |= dict(max_position_embeddings=32, initializer_range=0.25)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]


def llama(seed: int = 0, **changes) -> Llama:
    torch.manual_seed(seed)
    model = Llama(ModelConfig(**(SHAPE | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # they start at one, where a forgotten weight would not be seen
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def transformers_llama(model: Llama):
    """transformers' Llama with the weights of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def pad(rows: list[list[int]], side: str, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        real = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, real], mask[i, real] = torch.tensor(row), True
    return ids, mask


def close(a, b, atol: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------- the same as transformers'


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1}, {"head_dim": 8}])
def test_logits_equal_transformers(tied, changes):
    model = llama(tie_word_embeddings=tied, rope_theta=500.0, **changes)
    theirs = transformers_llama(model)
    ids = torch.randint(0, 41, (3, 20))
    logits = model(ids)
    assert logits.std() > 0.5
    assert close(logits, theirs(ids).logits)


def test_gradients_equal_transformers():
    model = llama(num_key_value_heads=2)
    theirs = transformers_llama(model)
    ids = torch.randint(0, 41, (3, 20))
    for logits in (model(ids), theirs(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert close(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_state_dicts_go_both_ways(tied):
    model = llama(tie_word_embeddings=tied)
    theirs = transformers_llama(model)  # strict: every name must be known
    back = llama(seed=1, tie_word_embeddings=tied)
    back.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 41, (2, 9))
    assert torch.equal(back(ids), model(ids))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


def test_a_tied_embedding_counts_once():
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 41 * 24


# ------------------------------------------------------------------------------------------ padding and masks


def both_kinds() -> list:
    model = llama(num_key_value_heads=2)
    return [model, HFCausalLM(transformers_llama(model))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [0, 1], ids=["Llama", "HFCausalLM"])
def test_a_padded_row_has_the_logits_it_has_alone(kind, side):
    model = both_kinds()[kind]
    ids, mask = pad(PROMPTS, side)
    logits = model(ids, mask)
    assert torch.isfinite(logits).all()
    for row, row_mask, prompt in zip(logits, mask, PROMPTS, strict=True):
        assert close(row[row_mask], model(torch.tensor([prompt]))[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_never_matters(side):
    model = llama()
    results = []
    for padding in (0, 33):
        ids, mask = pad(PROMPTS, side, padding)
        logits = model(ids, mask)[mask]
        model.zero_grad()
        logits.square().sum().backward()
        results.append((logits, [p.grad.clone() for p in model.parameters()]))
    (logits, gradients), (other_logits, other_gradients) = results
    assert torch.equal(logits, other_logits)
    assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def test_every_query_sees_itself_and_else_only_real_keys_before_it():
    mask = torch.tensor([[False, False, True, True]])
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert models.visible_keys(mask, 0, 4, mask.device)[0, 0].int().tolist() == expected
    assert models.visible_keys(mask, 2, 2, mask.device)[0, 0].int().tolist() == expected[2:]


def test_right_padding_needs_no_mask():
    model = llama()
    ids, mask = pad(PROMPTS, "right")
    assert close(model(ids)[mask], model(ids, mask)[mask])


def test_a_row_of_padding_alone_is_finite_with_finite_gradients():
    model = llama()
    ids, mask = pad([[3, 4, 5], []], "left")
    logits = model(ids, mask)
    logits[mask].sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", [0, 1], ids=["Llama", "HFCausalLM"])
def test_a_tree_mask_gives_every_branch_the_logits_of_its_own_sequence(kind):
    """Tokens a b | c d | e: two branches behind one prefix, in one row. Positions are depths in the tree."""
    model = both_kinds()[kind]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    sees = torch.eye(5, dtype=torch.bool)
    for node, ancestors in {1: [0], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1]}.items():
        sees[node, ancestors] = True
    logits = model(ids, sees[None, None])[0]
    assert close(logits[:4], model(torch.tensor([[5, 6, 7, 8]]))[0])
    assert close(logits[4], model(torch.tensor([[5, 6, 9]]))[0, -1])
    wide = torch.full((1, 40), 9)  # more nodes than the model has positions, none deep
    assert close(model(wide, torch.eye(40, dtype=torch.bool)[None, None])[0, 39], model(wide[:, :1])[0, 0])


def test_given_positions_are_used():
    model = llama()
    ids = torch.randint(0, 41, (1, 6))
    shifted, reversed_ = torch.arange(6)[None] + 7, torch.arange(6).flip(0)[None]
    assert close(model(ids, position_ids=shifted), model(ids))  # rotary positions are relative
    assert not close(model(ids, position_ids=reversed_), model(ids), atol=1e-2)


# ----------------------------------------------------------------------------------------------- the KV cache


@pytest.mark.parametrize("pieces", [[7, 1, 1, 1], [3, 4, 2, 1], [1, 9], [10]])
@pytest.mark.parametrize("kind", [0, 1], ids=["Llama", "HFCausalLM"])
@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_sequence_read_in_pieces_has_the_logits_of_the_whole(padded, kind, pieces):
    model = both_kinds()[kind]
    ids = torch.randint(0, 41, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    if padded:
        mask[0, :2] = mask[1, :5] = False
    cache, parts, seen = model.new_cache(3, 10), [], 0
    for piece in pieces:
        covered = mask[:, : seen + piece] if padded else None
        parts.append(model(ids[:, seen : seen + piece], covered, cache=cache))
        seen += piece
    assert close(torch.cat(parts, dim=1)[mask], model(ids, mask)[mask])


@torch.no_grad()
def test_the_cache_is_written_in_place():
    model = llama()
    cache = model.new_cache(2, 8)
    before = [x.data_ptr() for x in cache.keys + cache.values]
    for token in torch.randint(0, 41, (8, 2, 1)):
        model(token, cache=cache)
    assert cache.length == 8
    assert [x.data_ptr() for x in cache.keys + cache.values] == before


@torch.no_grad()
def test_under_autocast_the_cache_takes_half_the_memory():
    model = llama()
    ids = torch.randint(0, 41, (3, 10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.new_cache(3, 10)
        assert {x.dtype for x in cache.keys + cache.values} == {torch.bfloat16}
        parts = torch.cat([model(ids[:, :6], cache=cache), model(ids[:, 6:], cache=cache)], dim=1)
    assert (parts - model(ids)).abs().mean() < 0.03 * model(ids).abs().mean()


@torch.no_grad()
def test_a_cache_can_drop_rows():
    model = llama()
    ids = torch.randint(0, 41, (3, 6))
    cache = model.new_cache(3, 6)
    model(ids[:, :5], cache=cache)
    keep = torch.tensor([2, 0])
    cache.batch_select_indices(keep)
    assert close(model(ids[keep, 5:], cache=cache)[:, 0], model(ids[keep])[:, -1])


def test_too_many_positions_are_refused():
    for model in both_kinds():
        with pytest.raises(ValueError, match="33 tokens is longer than the model's 32 positions"):
            model(torch.zeros(1, 33, dtype=torch.long))
    model = llama()
    with pytest.raises(ValueError, match="5 positions do not fit a cache made for 4"):
        model(torch.zeros(1, 5, dtype=torch.long), cache=model.new_cache(1, 4))


# --------------------------------------------------------------------------------- any transformers causal LM


def family(name: str):
    import transformers as hf

    small = dict(vocab_size=41, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    small |= dict(num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.25)
    small |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = {
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=41, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.25
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**small),
        "qwen2": lambda: hf.Qwen2Config(**small),
        "gemma2": lambda: hf.Gemma2Config(**small, head_dim=6, final_logit_softcapping=0.5, sliding_window=4),
        "cohere": lambda: hf.CohereConfig(**small, logit_scale=0.25),
        "granite": lambda: hf.GraniteConfig(**small, logits_scaling=4.0),
    }[name]()
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "qwen2", "gemma2", "cohere", "granite"])
@torch.no_grad()
def test_a_wrapped_model_has_its_own_logits_and_ignores_left_padding(name):
    """Learned positions, partial rotation, biases, sliding windows, capped and scaled logits."""
    theirs = family(name)
    model = HFCausalLM(theirs)
    ids, mask = pad(PROMPTS, "left")
    alone = [theirs(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    logits = model(ids, mask)
    assert (model.vocab_size, model.hidden_size, model.max_positions) == (41, 24, 32)
    assert close(model(torch.tensor([PROMPTS[0]]))[0], alone[0])
    for row, row_mask, expected in zip(logits, mask, alone, strict=True):
        assert close(row[row_mask], expected)


# -------------------------------------------------------------------------------------------------- the heads


def with_random_head(model):
    torch.manual_seed(7)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("kind", [0, 1], ids=["Llama", "HFCausalLM"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_reward_is_read_at_the_last_real_token(side, kind):
    model = with_random_head(RewardModel(both_kinds()[kind]))
    ids, mask = pad(PROMPTS, side)
    expected = torch.stack([model(torch.tensor([prompt]))[0] for prompt in PROMPTS])
    assert expected.std() > 0.1
    assert close(model(ids, mask), expected)


def test_the_reward_sees_an_eos_that_is_also_the_padding():
    """transformers' own head looks for the padding id and would score the token before EOS."""
    eos = 2
    model = with_random_head(RewardModel(llama()))
    rows = [[5, 6, 7, eos], [8, 9, eos]]
    ids, mask = pad(rows, "right", padding=eos)
    scores = model(ids, mask)
    assert close(scores, torch.stack([model(torch.tensor([row]))[0] for row in rows]))
    without_eos = torch.stack([model(torch.tensor([row[:-1]]))[0] for row in rows])
    assert (scores - without_eos).abs().min() > 0.1


def test_a_row_without_tokens_has_no_reward():
    model = RewardModel(llama())
    with pytest.raises(ValueError, match="no real token"):
        model(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[True] * 3, [False] * 3]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_value_stands_at_every_position(side):
    model = with_random_head(ValueModel(llama()))
    ids, mask = pad(PROMPTS, side)
    values = model(ids, mask)
    assert values.shape == ids.shape
    for row, row_mask, prompt in zip(values, mask, PROMPTS, strict=True):
        assert close(row[row_mask], model(torch.tensor([prompt]))[0])


def test_rewards_and_values_start_at_zero_and_learn():
    for model in (RewardModel(llama()), ValueModel(llama())):
        output = model(torch.randint(0, 41, (2, 5)))
        assert (output == 0).all()
        (output - 1).square().sum().backward()
        assert model.head.weight.grad.abs().sum() > 0


def test_a_wrapper_is_in_the_mode_of_what_it_wraps():
    """Otherwise `model.train(model.training)` would switch dropout on."""
    for mode in (True, False):
        theirs = family("gpt2").train(mode)
        model = HFCausalLM(theirs)
        wrappers = [model, RewardModel(model), ValueModel(model), RestrictedVocabulary(model, [3])]
        assert [wrapper.training for wrapper in wrappers] == [mode] * 4 and theirs.training == mode


def test_a_frozen_copy_stays_when_the_original_learns():
    model = llama().train()
    reference = frozen_copy(model)
    ids = torch.randint(0, 41, (2, 5))
    before = reference(ids)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.equal(reference(ids), before) and not torch.equal(model(ids), before)
    assert not reference.training and not before.requires_grad
    assert model.training and model(ids).requires_grad


def test_scores_are_float32_under_autocast():
    ids = torch.randint(0, 41, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for model in (RewardModel(llama()), ValueModel(llama())):
            assert model(ids).dtype == torch.float32


def test_a_restricted_vocabulary_renormalises_the_allowed_tokens():
    model = llama()
    allowed = [3, 5, 40]
    restricted = RestrictedVocabulary(model, allowed)
    ids = torch.randint(0, 41, (2, 6))
    probabilities, restricted_ones = model(ids).softmax(-1), restricted(ids).softmax(-1)
    conditional = probabilities[..., allowed] / probabilities[..., allowed].sum(-1, keepdim=True)
    assert close(restricted_ones[..., allowed], conditional)
    assert restricted_ones.sum(-1).allclose(torch.ones(2, 6)) and restricted_ones[..., 4].eq(0).all()
    restricted(ids)[..., allowed].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("token_ids", [[], [-1], [3, 41]])
def test_a_restricted_vocabulary_must_be_part_of_the_models(token_ids):
    with pytest.raises(ValueError, match="from 0 to 40"):
        RestrictedVocabulary(llama(), token_ids)


# --------------------------------------------------------------------------- configuration, device, precision


def test_auto_is_a_gpu_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cuda:99", "meta", ""])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match="use 'auto'"):
        resolve_device(device)


def test_autocast_is_nothing_on_a_cpu():
    with autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "odd"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(SHAPE | changes))


def test_a_configuration_survives_its_json():
    config = ModelConfig(**SHAPE, num_key_value_heads=2, rope_theta=123.0, rms_norm_eps=1e-4)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_old_configuration_with_rope_theta_alone_is_read():
    old = {k: v for k, v in ModelConfig(**SHAPE, rope_theta=77.0).to_dict().items() if k != "rope_parameters"}
    assert ModelConfig.from_dict(old | {"rope_scaling": None}).rope_theta == 77.0


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_a_configuration_our_llama_does_not_compute_is_left_to_transformers(changes):
    assert ModelConfig.from_dict(ModelConfig(**SHAPE).to_dict() | changes) is None


# ------------------------------------------------------------------------------------------------------ files


def tokenizer(size: int = 41, eos: str | None = "<eos>", pad_token: str | None = "<pad>"):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, size))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token=eos, pad_token=pad_token)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_llama_is_read_by_us_and_by_transformers(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    model = llama(tie_word_embeddings=tied, num_key_value_heads=2, rope_theta=321.0)
    save_model(model, tokenizer(), tmp_path)
    ids = torch.randint(0, 41, (2, 9))
    ours, words = load_model(tmp_path, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(ours, Llama) and ours.config == model.config and not ours.training
    assert torch.equal(ours(ids), model(ids))
    assert close(theirs(ids).logits, model(ids))
    assert theirs.config.eos_token_id == words.eos_token_id == 1
    assert words.encode("w7 w9", add_special_tokens=False) == [7, 9]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}])
def test_a_folder_of_transformers_is_read_with_the_same_logits(tmp_path, changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = llama(rope_theta=321.0).config.to_dict() | changes
    theirs = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cpu")
    assert type(model) is (HFCausalLM if changes else Llama)
    ids = torch.randint(0, 41, (2, 9))
    assert close(model(ids), theirs(ids).logits)


def test_a_wrapped_model_is_saved_and_read_again(tmp_path):
    model = HFCausalLM(family("gpt2"))
    save_model(model, tokenizer(pad_token=None), tmp_path)
    again, words = load_model(tmp_path, device="cpu")
    ids = torch.randint(0, 41, (2, 9))
    assert isinstance(again, HFCausalLM) and torch.equal(again(ids), model(ids))
    assert words.pad_token_id == words.eos_token_id == 1  # it had no padding token


def test_only_a_language_model_is_saved_as_one(tmp_path):
    with pytest.raises(ValueError, match="not a RewardModel"):
        save_model(RewardModel(llama()), None, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="is not a folder"):
        load_model(name)


def test_a_hub_id_without_a_network_is_refused():
    with pytest.raises(ValueError, match="no local folder and cannot be fetched"):
        load_model("cs336-nobody/no-such-model")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    save_model(llama(), tokenizer(size=42), tmp_path)
    with pytest.raises(ValueError, match="42 tokens and the model 41"):
        load_model(tmp_path)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    save_model(llama(), tokenizer(eos=None), tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    save_model(llama(), None, tmp_path)
    with pytest.raises(ValueError, match="(?i)tokenizer"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save_model(llama(), tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_model(tmp_path)


# -------------------------------------------------------------------------------------------- kill and resume


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 41, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_run_resumed_from_its_progress_is_the_run_that_was_not_interrupted(tmp_path):
    path = tmp_path / "new folder" / "run.pt"
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, range(3))
    save_progress(path, step=3, model=model, optimizer=optimizer, log=[{"loss": loss} for loss in losses])
    losses = train(model, optimizer, range(3, 6))

    again = llama(seed=5)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    state = load_progress(path)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert len(state["log"]) == state["step"] == 3
    assert train(again, optimizer, range(state["step"], 6)) == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_killed_save_leaves_the_last_progress_whole(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_progress(path, step=1)

    def die_half_way(state, file):
        file.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(models.torch, "save", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        save_progress(path, step=2)
    assert load_progress(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["run.pt"]


def test_no_progress_yet_is_none_and_a_broken_file_is_an_error(tmp_path):
    path = tmp_path / "run.pt"
    assert load_progress(path) is None
    save_progress(path, step=1, weights=torch.zeros(1000))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="delete it to start that run again"):
            load_progress(path)


# --------------------------------------------------------------------------------------------------- on a GPU

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; torch sees none")


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("side", [None, "left", "right"])
@torch.no_grad()
def test_a_gpu_gives_the_logits_of_the_cpu(side):
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default: products of float32 are float32
    ids, mask = pad(PROMPTS, side or "right")
    for model in both_kinds():
        expected = model(ids, mask)
        model.cuda()
        given = None if side is None else mask.cuda()
        logits = model(ids.cuda(), given)
        assert close(logits.cpu()[mask], expected[mask], atol=1e-4)
        with autocast("cuda"):
            half = model(ids.cuda(), given)
        assert half.dtype == torch.bfloat16
        assert (half.cpu().float() - expected)[mask].abs().mean() < 0.02 * expected[mask].abs().mean()


@pytest.mark.gpu
@no_gpu
@torch.no_grad()
def test_a_cache_on_a_gpu_gives_the_logits_of_the_whole():
    model = llama(num_key_value_heads=2).cuda()
    ids = torch.randint(0, 41, (3, 10)).cuda()
    with autocast("cuda"):
        cache = model.new_cache(3, 10)
        assert cache.keys[0].dtype == torch.bfloat16
        parts = [model(ids[:, :6], cache=cache)] + [model(ids[:, t : t + 1], cache=cache) for t in range(6, 10)]
        whole = model(ids)
    assert (torch.cat(parts, dim=1) - whole).abs().mean() < 0.02 * whole.abs().mean()


@pytest.mark.parametrize("kind", [0, 1], ids=["Llama", "HFCausalLM"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_can_count_how_probable_the_response_is(side, kind):
    """The score is the read-out plus c times the log-probability of the response's tokens, whatever the padding."""
    backbone = both_kinds()[kind]
    plain, model = with_random_head(RewardModel(backbone)), with_random_head(RewardModel(backbone, likelihood=0.7))
    ids, mask = pad(PROMPTS, side)
    starts = [1, 2, 1, 2, 1, 2][: len(PROMPTS)]
    response_mask, expected = torch.zeros_like(mask), []
    for i, (prompt, start) in enumerate(zip(PROMPTS, starts, strict=True)):
        columns = mask[i].nonzero().flatten()
        response_mask[i, columns[start:]] = True
        row = torch.tensor([prompt])
        log_probs = backbone(row[:, :-1]).log_softmax(-1).gather(-1, row[:, 1:, None])[0, start - 1 :].sum()
        expected.append(plain(row)[0] + 0.7 * log_probs)
    assert close(model(ids, mask, response_mask), torch.stack(expected))
    with pytest.raises(ValueError, match="needs response_mask"):
        model(ids, mask)
