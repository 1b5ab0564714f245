"""Values travel between the student's kernel and the judge unchanged."""

import pytest
import torch

from cs336_alignment.grading.compare import coordinates, difference
from cs336_alignment.grading.probe import decode, encode


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


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 1, 2)])
def test_coordinates_are_those_of_the_flat_values(shape):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for index in x.flatten().tolist():
        assert x[tuple(coordinates(index, shape))] == index
