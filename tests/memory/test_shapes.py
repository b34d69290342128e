"""Results that are remembered by shape: the same as PyTorch's own."""

import pytest
import torch

from lisatune.memory import shapes as module
from lisatune.memory.shapes import KNOWN, Shapes
from lisatune.plan.forecast import plan_memory

aten = torch.ops.aten


def meta(*size, dtype=torch.float32):
    return torch.empty(*size, dtype=dtype, device="meta")


A, B, HALF, WIDE = meta(3, 4), meta(3, 4), meta(3, 4, dtype=torch.bfloat16), meta(4, 3).t()
CALLS = [
    (aten.add.Tensor, (A, B), {}),
    (aten.add.Tensor, (A, B), {"alpha": 2}),
    (aten.mul.Tensor, (A, HALF), {}),
    (aten.mul.Tensor, (HALF, HALF), {}),
    (aten.mul.Tensor, (WIDE, WIDE), {}),
    (aten.mul.Tensor, (A, meta(4)), {}),
    (aten.pow.Tensor_Scalar, (meta(3, dtype=torch.int64), 2), {}),
    (aten.pow.Tensor_Scalar, (meta(3, dtype=torch.int64), 2.0), {}),
    (aten.mean.dim, (A, [-1]), {}),
    (aten.mean.dim, (A, [-1], True), {}),
    (aten.mean.dim, (A, [-1], 1), {}),
    (aten.sum.dim_IntList, (HALF, [0]), {"dtype": torch.float32}),
    (aten.sum.dim_IntList, (HALF, [0]), {}),
    (aten.linalg_vector_norm.default, (A,), {}),
    (aten.cat.default, ([A, B], 1), {}),
    (aten.cat.default, ([A, B, B], 1), {}),
    (aten.mm.default, (A, meta(5, 4).t()), {}),
    (aten.slice_backward.default, (meta(3, 2), [3, 4], 1, 0, 2, 1), {}),
    (aten.view.default, (A, [12]), {}),
]


@pytest.mark.quick
def test_a_remembered_result_is_like_the_first():
    shapes = Shapes()
    for func, args, kwargs in CALLS * 2:
        out, plain = shapes(func, args, kwargs), func(*args, **kwargs)
        assert (out.shape, out.stride(), out.dtype, out.device) == (
            plain.shape,
            plain.stride(),
            plain.dtype,
            plain.device,
        )
    assert shapes.num_known == sum(func in KNOWN for func, _, _ in CALLS)
    assert shapes(aten.view.default, (A, [12]), {}).untyped_storage().data_ptr() == A.untyped_storage().data_ptr()


def test_numbers_on_a_real_device_are_computed():
    shapes, x = Shapes(), torch.tensor([1.0, 2.0])
    shapes(aten.mul.Tensor, (x, x), {})
    assert shapes(aten.mul.Tensor, (x, x), {}).tolist() == [1.0, 4.0]
    assert shapes.num_known == 0


def test_tensors_of_another_kind_are_left_to_pytorch():
    class Marked(torch.Tensor):
        pass

    shapes = Shapes()
    marked = A.as_subclass(Marked)
    for _ in range(2):
        assert type(shapes(aten.mul.Tensor, (marked, marked), {})) is Marked
        assert type(shapes(aten.cat.default, ([A, marked],), {})) is Marked


@pytest.mark.parametrize("settings", [{}, {"method": "full"}, {"method": "lora"}, {"recipe": "paper", "num_active": 1}])
def test_a_forecast_is_the_same_to_the_byte(settings, model_folder, monkeypatch):
    quick = plan_memory(str(model_folder), device="cpu", max_length=32, **settings)
    monkeypatch.setattr(module, "KNOWN", set())
    assert plan_memory(str(model_folder), device="cpu", max_length=32, **settings) == quick
