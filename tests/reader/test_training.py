import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvrag import reader
from kvrag.reader import autograd, rows, start, tokenizer, training
from kvrag.reader.about import About
from kvrag.reader.muon import Muon, orthogonalised
from kvrag.reader.world import World


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
    hidden = autograd.hidden_states(model, ids)[-1]
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


def test_a_row_of_documents_is_the_system_message_and_knows_whom_it_is_about():
    world = World(3, held_out=False)
    encoder = tokenizer.Encoder(tokenizer.build())
    documents = world.documents(4)
    plain, marked = rows.Row(encoder), rows.Row(encoder)
    plain.system(rows.system_text(documents))
    marked.documents(documents)
    assert marked.ids == plain.ids
    assert marked.kinds == plain.kinds
    assert len(marked.about) == len(marked.ids)
    for document in documents:
        name = tuple(encoder(f" {document.entity.name}"))
        counted = sum(len(encoder(part)) for part in document.parts) - len(name)
        assert marked.about.count(name) == counted  # every word but the title's


def test_whom_a_word_is_about_can_be_learned():
    torch.manual_seed(0)
    embeddings = torch.randn(30, 16)
    names = torch.randint(0, 30, (1, 40, 2))
    about = torch.where(torch.rand(1, 40, 1) < 0.3, -1, names)
    after = [torch.cat([embeddings[names[..., 0]], embeddings[names[..., 1]]], -1)] * 4
    task = About(32)
    task.projections = torch.nn.Parameter(torch.randn(len(task.projections), 2, 32, 16) / 6)
    optimiser = torch.optim.Adam(task.parameters(), lr=0.02)
    first = task(after, about, embeddings)[0].item()
    for _ in range(60):
        optimiser.zero_grad()
        loss, right = task(after, about, embeddings)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.3 * first
    assert right > 0.9
    assert task(after, torch.full_like(about, -1), embeddings) == (0.0, 0.0)


def test_the_mean_of_readers_is_a_reader(tmp_path):
    made = tokenizer.build()
    folders = []
    for seed in range(2):
        model = start.structured(made, seed)
        training.export(model, made, tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    mean = start.averaged(folders)
    both = [LlamaForCausalLM.from_pretrained(folder) for folder in folders]
    for found, *parts in zip(mean.parameters(), *(m.parameters() for m in both), strict=True):
        torch.testing.assert_close(found, sum(parts) / 2)


def test_the_mean_over_steps_is_put_in_place_and_taken_out_again():
    model = tiny()
    mean = training._Mean(model)
    first = next(model.parameters())
    with torch.no_grad():
        for step, value in enumerate((1.0, 2.0, 6.0), 1):
            first.fill_(value)
            mean.add(step)
    with mean.in_place():
        torch.testing.assert_close(first, torch.full_like(first, 3.0))
    assert (first == 6).all()
