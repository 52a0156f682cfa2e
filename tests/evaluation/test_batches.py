import torch

from ldm.evaluation.batches import Rows


def batches(sizes):
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        yield torch.randint(0, 99, (size,), generator=generator), torch.randn(size, 3, 2, generator=generator)


def joined(sizes):
    return [torch.cat(parts) for parts in zip(*batches(sizes), strict=True)]


def test_rows_are_what_cat_makes():
    for sizes, expected in (([4, 4, 3], 11), ([4, 4, 3], 1), ([4, 4, 3], 100), ([5], 5), ([1] * 40, 3)):
        rows = Rows(expected)
        for batch in batches(sizes):
            rows.add(*batch)
        assert rows.count == sum(sizes)
        for found, wanted in zip(rows.tensors(), joined(sizes), strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_rows_keep_no_tensor_of_a_batch():
    rows = Rows(12)
    places = set()
    for batch in batches([4, 4, 4]):
        rows.add(*batch)
        places.add(tuple(one.data_ptr() for one in rows.tensors()))
    assert len(places) == 1  # set aside once; nothing is moved


def test_rows_take_tensors_from_inference():
    rows = Rows(4)
    for start in (0, 2):
        with torch.inference_mode():
            scalars = torch.arange(start, start + 2.0)[:, None]
        rows.add(scalars)
    assert rows.tensors()[0].flatten().tolist() == [0, 1, 2, 3]
