import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvrag import reader
from kvrag.reader import autograd, start, tokenizer
from kvrag.reader.muon import Muon, orthogonalised


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


def gradients(model, logits):
    model.zero_grad()
    logits.logsumexp(-1).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_fast_forward_and_backward_agree_with_transformers():
    model = tiny()
    ids = torch.randint(0, 300, (2, 300))
    expected = model(ids).logits
    hidden = autograd.hidden_states(model, ids)
    got = autograd.logits(model, hidden.view(-1, 64)).view(2, 300, -1)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    for ours, theirs in zip(gradients(model, got), gradients(model, expected), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_orthogonalised_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(2, 16, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_goes_downhill():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 8))
    goal = torch.randn(12, 8)
    optimiser = Muon([weight], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (weight - goal).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_structured_start_copies_a_repeated_text_better_than_chance():
    made = tokenizer.build()
    model = start.structured(made)
    torch.manual_seed(0)
    chunk = torch.randint(500, len(made), (8, 40))
    ids = torch.cat([chunk, chunk], 1)
    with torch.no_grad():
        predicted = model(ids).logits[:, 40:-1]
    rank = (predicted > predicted.gather(-1, ids[:, 41:, None])).sum(-1)
    assert rank.float().median() < 0.45 * len(made)


def test_extra_layers_change_nothing_at_first(tmp_path):
    made = tokenizer.build()
    earlier = start.structured(made)
    config = start.config(made)
    config.num_hidden_layers = 4
    smaller = LlamaForCausalLM(config)
    kept = earlier.state_dict()
    smaller.load_state_dict({name: kept[name] for name in smaller.state_dict()})
    smaller.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    grown = start.from_earlier(tmp_path, made)
    ids = torch.tensor([made("The grass is green.", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        hidden = [m.model(inputs_embeds=smaller.model.embed_tokens(ids))[0] for m in (smaller, grown)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-4, rtol=1e-4)


def test_training_goes_on_from_the_shipped_reader():
    shipped = LlamaForCausalLM.from_pretrained(reader.path())
    again = start.from_earlier(reader.path(), tokenizer.build())
    ids = torch.arange(10, 40)[None]
    torch.testing.assert_close(again(ids).logits, shipped(ids).logits)
