"""Values travel between the student's kernel and the judge unchanged."""

import subprocess
import sys

import pytest
import torch

from cs336_alignment.grading.compare import coordinates, difference
from cs336_alignment.grading.probe import SGD, PlainSGD, ToyModel, ToyTokenizer, copied, decode, encode, run_calls


@pytest.mark.parametrize("kind", ["float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"])
def test_every_type_of_numbers_that_a_function_may_return_travels(kind):
    """`mask.int().argmax(1).int()` is as good an index as any."""
    x = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, kind))
    back = decode(encode(x))
    assert back.dtype == x.dtype and torch.equal(back, x)


def test_a_tuple_travels_as_a_list_and_counts_as_one():
    pair = (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    travelled = decode(encode(pair))
    for got, wanted in ((travelled, pair), (pair, travelled), (pair, pair)):
        assert difference({"value": got}, {"value": wanted}, 0, 0, ()) is None
    told = difference({"value": torch.stack(pair)}, {"value": pair}, 0, 0, ())
    assert told.text == "the result is a tensor of shape (2, 2); it should be 2 values"
    told = difference({"value": pair[::-1]}, {"value": pair}, 0, 0, ())
    assert "the result[0] at [0] is 3; it should be 1" in told.text


def test_a_function_gets_copies_and_may_spoil_them():
    """The same inputs serve every implementation that is compared."""
    call = (torch.ones(2), {"ids": [torch.arange(3)]}, ToyModel(torch.eye(2), 1), SGD(0.5, of=2), "text", None)
    before = encode(call)
    assert encode([copied(x) for x in call]) == before == encode(decode(before))

    def spoil(x, batch, model, optimizer, *_):
        optimizer.step()
        model.most_rows = None
        batch["ids"][0].zero_()
        batch["ids"].append(x.zero_())

    assert run_calls(spoil, [call])[0]["changed"] == [0, 1, 2]
    assert encode(call) == before


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 1, 2)])
def test_coordinates_are_those_of_the_flat_values(shape):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for index in x.flatten().tolist():
        assert x[tuple(coordinates(index, shape))] == index


WORDS = ("<unk>", "ice", "cream", "ice cream", "hat", "<s>", "<end>", "<pad>")


def test_a_toy_tokenizer_behaves_as_real_ones_do_where_people_stumble():
    """Special tokens unless one asks for none, tokens longer than a word, pad and end possibly the same or none."""
    toy = ToyTokenizer(WORDS)
    assert toy.encode("hat") == [5, 4] and toy.encode("hat", add_special_tokens=False) == [4]
    joined, apart = (
        sum((toy.encode(text, add_special_tokens=False) for text in parts), [])
        for parts in (["hat ice cream hat"], ["hat ice", "cream hat"])
    )
    assert joined == [4, 3, 4] and apart == [4, 1, 2, 4]
    assert toy.encode("icecream shoe", add_special_tokens=False) == [0, 0] and toy.encode("", False) == []
    assert (toy.pad_token_id, toy.eos_token_id) == (7, 6)
    assert ToyTokenizer(WORDS, "<end>").pad_token_id == 6 and ToyTokenizer(WORDS, None).pad_token_id is None
    assert toy.decode(torch.tensor([4, 3])) == "hat ice cream"
    for same in (toy, ToyTokenizer(WORDS, None)):
        assert decode(encode(same)) == same


def test_a_toy_model_that_takes_few_rows_at_once_still_does_after_travelling():
    model = decode(encode(ToyModel(torch.eye(3), most_rows=2)))
    assert model(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 3)
    with pytest.raises(MemoryError, match="3 rows"):
        model(torch.zeros(3, 4, dtype=torch.long))
    assert "most_rows" not in encode(ToyModel(torch.eye(3)))
    assert decode(encode(ToyModel(torch.eye(3))))(torch.zeros(9, 1, dtype=torch.long)).shape == (9, 1, 3)


def test_the_plain_optimizer_does_what_torchs_does():
    def trained(make):
        model = ToyModel(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
        optimizer = make(model.parameters(), lr=0.3)
        model.weight.grad = torch.ones_like(model.weight)
        for zero in (True, False):
            optimizer.zero_grad(set_to_none=zero)
            (model(torch.tensor([[1, 2, 3]])) ** 2).sum().backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.zero_grad()
        optimizer.step()  # no gradient: nothing moves
        return model.weight.detach()

    assert torch.equal(trained(PlainSGD), trained(torch.optim.SGD))
    assert isinstance(SGD(0.1).build([ToyModel(torch.zeros(2, 2))]), torch.optim.Optimizer)


def test_no_check_imports_torchs_compiler():
    """It takes seconds, and a check should take none."""
    code = (
        "import sys; from cs336_alignment.grading.check import load, examine\n"
        "from cs336_alignment.grading.exercise import exercises\n"
        "def again(f): return lambda *a: f(*a)\n"
        "for e in exercises(): assert examine(load(e.name), again(e.reference))[1], e.name\n"
        "print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stdout + done.stderr
