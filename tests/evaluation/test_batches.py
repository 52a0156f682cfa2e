import pytest
import torch

from ldm.evaluation.batches import RowBuffer


def batches(sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield torch.randint(0, 99, (size,), generator=generator), torch.randn(size, 3, 2, generator=generator)


def joined(sizes):
    return [torch.cat(parts) for parts in zip(*batches(sizes), strict=True)]


def test_rows_are_what_cat_makes():
    for sizes, expected in (([4, 4, 3], 11), ([4, 4, 3], 1), ([4, 4, 3], 100), ([5], 5), ([1] * 40, 3)):
        rows = RowBuffer(expected)
        for batch in batches(sizes):
            rows.add(*batch)
        assert rows.count == sum(sizes)
        for found, wanted in zip(rows.tensors(), joined(sizes), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_rows_keep_no_tensor_of_a_batch():
    rows = RowBuffer(12)
    places = set()
    for batch in batches([4, 4, 4]):
        rows.add(*batch)
        places.add(tuple(one.data_ptr() for one in rows.tensors()))
    assert len(places) == 1  # set aside once; nothing is moved


def test_rows_take_empty_batches_and_inference_tensors():
    rows = RowBuffer(0)
    with torch.inference_mode():
        rows.add(torch.empty(0, 1))
        rows.add(torch.tensor([[1.0], [2.0]]))
    rows.add(torch.tensor([[3.0]]))
    assert rows.tensors()[0].flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("other", [torch.ones(1, 2), torch.ones(3, 1), torch.ones(3, 2, dtype=torch.float64)])
def test_rows_refuse_what_does_not_fit(other):
    """What torch would stretch or cast without a word."""
    rows = RowBuffer(6)
    rows.add(torch.arange(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"expected \(3, 2\) of torch.float32"):
        rows.add(torch.arange(3), other)
