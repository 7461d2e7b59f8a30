"""Chunks change where arithmetic is done and not one bit of it."""

import pytest
import torch

import ds_zoadamu
from ds_zoadamu.chunks import CHUNK_ON_CPU, CHUNK_ON_GPU, chunks_on

CPU = torch.device("cpu")


def test_chunks_are_even():
    assert CHUNK_ON_CPU % 2 == CHUNK_ON_GPU % 2 == 0  # the kernels make noise for pairs


def test_without_a_reason_nothing_is_copied_or_cut():
    tensor = torch.arange(10.0)
    ((part, (same, nothing)),) = chunks_on(CPU, (tensor, None), writing=True)
    assert part == slice(0, 10) and same.data_ptr() == tensor.data_ptr() and nothing is None
    assert list(chunks_on(CPU, (tensor[:0],), writing=True)) == []


@pytest.mark.parametrize("writing", [True, False])
def test_copies_are_put_back_only_when_writing(writing):
    tensor, other = torch.arange(10.0), torch.arange(10)
    parts = []
    for part, (a, b) in chunks_on(CPU, (tensor, other), writing=writing, chunk=4, copy=True):
        assert a.data_ptr() != tensor[part].data_ptr()
        parts.append((part.start, part.stop, a.tolist(), b.tolist()))
        a.neg_()
    assert [p[:2] for p in parts] == [(0, 4), (4, 8), (8, 10)]
    assert sum((p[2] for p in parts), []) == sum((p[3] for p in parts), []) == list(range(10))
    assert torch.equal(tensor, -torch.arange(10.0) if writing else torch.arange(10.0))


@pytest.mark.parametrize("dtype,momentum", [(torch.float32, "fp32"), (torch.bfloat16, "int8"), (torch.bfloat16, "replay")])
@pytest.mark.parametrize("start", [0, 7])
def test_chunked_arithmetic_is_bit_identical(dtype, momentum, start):
    storage = {"dtype": momentum} | ({"window_tolerance": 0.05} if momentum == "replay" else {})
    optimizer = ds_zoadamu.ZOAdaMU([torch.nn.Parameter(torch.zeros(1))], lr=1e-2, total_steps=6, momentum=storage)
    keys = optimizer.noise_keys(["w"])["w"]
    runs = []
    for settings in ({}, {"chunk": 64, "copy": True}, {"chunk": 1000, "copy": True}):
        weight = torch.linspace(-1, 1, 1001).to(dtype)
        momenta = optimizer.new_momenta(1001, dtype, CPU)
        out = torch.empty_like(weight)
        for step in range(1, 5):
            direction = optimizer.direction(step)
            for part, (w, *m) in chunks_on(CPU, (weight, *momenta), writing=True, **settings):
                where = {"keys": keys, "start": start + part.start}
                optimizer.update_range_(w, m, direction, lr=1e-2, weight_decay=0.1, projected_grads=(0.7,), **where)
        direction = optimizer.direction(5)
        for part, (w, *m) in chunks_on(CPU, (weight, *momenta), writing=False, **settings):
            optimizer.perturb_range_(out[part], w, m[0], direction, key=keys[0], start=start + part.start, sign=-1)
        runs.append([t.view(torch.uint8).tolist() for t in (weight, out, *momenta) if t is not None])
    assert runs[0] == runs[1] == runs[2]
