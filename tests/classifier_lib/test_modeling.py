"""The value model: released checkpoints load unchanged, values equal an independent computation, losses their formulas."""

import json
import logging
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import classifier_lib
from classifier_lib import (
    Qwen2ForClassifier,
    bradley_terry_loss,
    resolve_attn_implementation,
    rollout_loss,
    success_probs,
)

IDS = [151 % 264, 7, 31, 200, 5, 5, 99, 42]


# ------------------------------------------------------------------------- an independent computation, formulas only


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, theta):
    """Rotary position embedding of x [heads, seq, dim] (Su et al. 2021), pairs (i, i + dim/2)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


def independent_success_probs(weights, config, ids):
    """The value at every token from a state dict, in float64, without the transformers library."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    causal = torch.full((len(ids), len(ids)), -math.inf).triu(1).double()
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        h = rms_norm(x, w[p + "input_layernorm.weight"], config["rms_norm_eps"])

        def project(name, n, h=h, p=p):
            out = h @ w[f"{p}self_attn.{name}.weight"].T + w[f"{p}self_attn.{name}.bias"]
            return out.view(len(ids), n, -1).transpose(0, 1)

        q, k = (rotate(project(name, n), config["rope_theta"]) for name, n in (("q_proj", heads), ("k_proj", kv_heads)))
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, project("v_proj", kv_heads)))
        attention = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + causal).softmax(-1) @ v
        x = x + attention.transpose(0, 1).reshape(len(ids), -1) @ w[p + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[p + "mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])
    logits = (x @ w["score.0.weight"].T).relu() @ w["score.2.weight"].T
    return logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, 1]


def released_like(folder, dtype, num_labels):
    """A folder as the released one: bare weights, and a config written by an older library."""
    theta = 10000.0
    model = tiny.tiny_value_model(num_labels=num_labels).to(dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["Qwen2ForClassifier"], "attention_dropout": 0.0, "bos_token_id": 259, "eos_token_id": 256,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
        "max_position_embeddings": 2048, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": theta,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.48.0", "use_cache": False, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 264, "id2label": {str(i): f"LABEL_{i}" for i in range(num_labels)},
        "label2id": {f"LABEL_{i}": i for i in range(num_labels)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_released_checkpoint_loads_and_equals_an_independent_computation(tmp_path, dtype, tolerance, num_labels):
    config = released_like(tmp_path, dtype, num_labels)
    assert {"score.0.weight", "score.2.weight", "model.norm.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    model = Qwen2ForClassifier.from_pretrained(tmp_path, torch_dtype=dtype, use_cache=False)
    assert model.dtype == dtype
    assert model.config.num_labels == num_labels
    with torch.no_grad():
        values = model(torch.tensor([IDS])).success_probs
    assert values.shape == (1, len(IDS))
    assert values.dtype == torch.float32
    expected = independent_success_probs(load_file(tmp_path / "model.safetensors"), config, IDS)
    assert (values[0].double() - expected).abs().max() < tolerance
    assert expected.max() - expected.min() > 0.05  # the test could fail


def test_the_head_config_of_a_library_that_says_nothing_means_three_labels(tmp_path):
    config = released_like(tmp_path, torch.float32, 3)
    del config["id2label"], config["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Qwen2ForClassifier.from_pretrained(tmp_path).num_labels == 3


def test_the_released_snippets_run_verbatim(tmp_path, caplog):
    """As on the released model's page, but for the path and the device."""
    released_like(tmp_path, torch.float32, 3)
    path, device = str(tmp_path), torch.device("cpu")
    classifier_lib.attention._warn_once.cache_clear()

    model_loading_kwargs = dict(attn_implementation="flash_attention_2", torch_dtype=torch.bfloat16, use_cache=False)
    with caplog.at_level(logging.WARNING):
        classifier = classifier_lib.Qwen2ForClassifier.from_pretrained(path, **model_loading_kwargs)

    assert classifier.dtype == torch.bfloat16  # not the checkpoint's

    input_ids = torch.tensor(IDS, dtype=torch.long, device=device)
    attention_mask = torch.ones_like(input_ids)
    classifier_outputs = classifier(input_ids.unsqueeze(0), attention_mask=attention_mask.unsqueeze(0))
    scores = classifier_outputs.success_probs.squeeze(0)[-1].item()

    assert 0 < scores < 1
    if classifier.config._attn_implementation == "sdpa":  # no flash-attn here: said loudly
        assert "flash_attention_2 was asked for" in caplog.text


def test_padding_mask_changes_nothing_on_real_tokens():
    model = tiny.tiny_value_model()
    padded = torch.tensor([[*IDS, 0, 0, 0]])
    mask = torch.tensor([[1] * len(IDS) + [0] * 3])
    with torch.no_grad():
        alone = model(torch.tensor([IDS])).success_probs
        beside = model(padded, attention_mask=mask).success_probs[:, : len(IDS)]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=0)


def test_a_checkpoint_without_head_is_refused_for_inference_and_gets_one_for_training(tmp_path, caplog):
    tiny.save_generator(tmp_path)
    with pytest.raises(ValueError, match="not a value model: it has no score.0.weight"):
        Qwen2ForClassifier.from_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = Qwen2ForClassifier.from_backbone(tmp_path, num_labels=1, p_dropout=0.05)
    assert "a fresh one with 1 labels was made" in caplog.text
    assert model.config.attention_dropout == model.config.score_dropout == model.dropout.p == 0.05
    model.save_pretrained(tmp_path / "value")
    assert Qwen2ForClassifier.from_pretrained(tmp_path / "value").num_labels == 1


def test_dtypes_may_be_named_and_keywords_of_the_config_reach_it(tmp_path):
    tiny.save_value_model(tmp_path)
    load = Qwen2ForClassifier.from_pretrained
    assert load(tmp_path, torch_dtype="bfloat16").dtype == load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="auto").dtype == torch.float32
    assert load(tmp_path, use_cache=False, attention_dropout=0.3).config.attention_dropout == 0.3


@pytest.mark.parametrize("num_labels", [2, 4])
def test_other_numbers_of_labels_are_refused(num_labels):
    with pytest.raises(ValueError, match=f"num_labels is {num_labels}"):
        Qwen2ForClassifier(tiny.tiny_config(num_labels=num_labels))


def test_auto_says_what_it_picked(caplog):
    with caplog.at_level(logging.INFO):
        chosen = resolve_attn_implementation("auto", torch.bfloat16)
    assert f"attention: {chosen}" in caplog.text
    assert resolve_attn_implementation("eager") == "eager"


def test_dropout_acts_in_training_only():
    model = tiny.tiny_value_model()
    model.set_dropout(attention=0.5, head=0.5)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_head_dropout_is_of_the_backbones_output():
    """As released: a share of what the backbone gives is zero when the first linear layer reads it, the rest scaled up."""
    model = tiny.tiny_value_model().train()
    model.set_dropout(attention=0.0, head=0.25)
    assert model.config.attention_dropout == 0.0
    seen = {}
    model.model.register_forward_hook(lambda module, args, out: seen.update(backbone=out.last_hidden_state))
    model.score[0].register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    ids = torch.tensor([IDS * 20])
    with torch.no_grad():
        model(ids)
        before = seen["backbone"]
        logits = model(ids).logits
    assert torch.equal(before, seen["backbone"])  # attention dropped nothing
    dropped = seen["read"] == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(seen["read"], seen["backbone"].masked_fill(dropped, 0.0) / 0.75)
    first, second = model.score[0].weight, model.score[2].weight
    torch.testing.assert_close(logits, (seen["read"] @ first.T).relu() @ second.T)


def test_half_a_head_is_refused(tmp_path):
    for lost in ("score.0.weight", "score.2.weight"):
        released_like(tmp_path, torch.float32, 3)
        weights = {key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items() if key != lost}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"not a value model: it has no {lost};"):
            Qwen2ForClassifier.from_pretrained(tmp_path)


def test_from_backbone_sets_labels_and_both_dropouts(tmp_path):
    tiny.save_generator(tmp_path)
    model = Qwen2ForClassifier.from_backbone(tmp_path, num_labels=1, p_dropout=0.125)
    assert model.score[2].weight.shape == (1, 32)
    assert {model.dropout.p, *(layer.self_attn.attention_dropout for layer in model.model.layers)} == {0.125}
    assert (model.config.attention_dropout, model.config.score_dropout) == (0.125, 0.125)


def test_attention_and_head_dropout_are_set_apart_and_saved(tmp_path):
    model = tiny.tiny_value_model()
    model.set_dropout(attention=0.1, head=0.2)
    assert [layer.self_attn.attention_dropout for layer in model.model.layers] == [0.1, 0.1]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["attention_dropout"], config["score_dropout"]) == (0.1, 0.2)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny.tiny_value_model().state_dict())
    loaded = Qwen2ForClassifier.from_pretrained(tmp_path)
    assert (loaded.dropout.p, loaded.model.layers[0].self_attn.attention_dropout) == (0.2, 0.1)


# --------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("num_labels", [1, 3])
def test_rollout_loss_is_the_mean_over_rollouts_of_means_over_tokens(num_labels):
    torch.manual_seed(0)
    logits = torch.randn(12, num_labels)
    rows = {0: [0, 1, 2], 1: [2, 3], 2: [7], 3: []}  # row 2 serves two roll-outs; the last was cut away whole
    labels, weights = torch.tensor([1, 0, 2, 1]), torch.full((4,), 1 / 4)
    expected = 0.0
    for rollout, tokens in rows.items():
        losses = []
        for t in tokens:
            if num_labels == 1:
                p = torch.sigmoid(logits[t, 0])
                losses.append(-torch.log(p if labels[rollout] == 1 else 1 - p))
            else:
                losses.append(-torch.log_softmax(logits[t], -1)[labels[rollout]])
        expected += (sum(losses) / len(losses) if losses else 0.0) / 4
    token_index = torch.tensor([t for tokens in rows.values() for t in tokens])
    rollout_index = torch.tensor([r for r, tokens in rows.items() for _ in tokens])
    got = rollout_loss(logits, token_index, rollout_index, labels, weights)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bradley_terry_loss():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    expected = (-math.log(1 / (1 + math.exp(-0.5))) - math.log(1 / (1 + math.exp(5.0)))) / 2
    assert bradley_terry_loss(a, b).item() == pytest.approx(expected, rel=1e-5)


def test_success_probs_of_both_heads():
    assert success_probs(torch.tensor([[0.0, math.log(2.0), 0.0]])).item() == pytest.approx(0.5)
    assert success_probs(torch.tensor([[0.0]])).item() == 0.5
