"""Chunks change where arithmetic is done and not one bit of it."""

import pytest
import torch

from ds_zoadamu.rules import Elements, Evaluation, Update, ZOAdaMU
from ds_zoadamu.zero3.chunks import CHUNK_ON_CPU, CHUNK_ON_GPU, chunks_on

CPU = torch.device("cpu")


def test_chunks_are_even():
    assert CHUNK_ON_CPU % 2 == CHUNK_ON_GPU % 2 == 0  # the kernels make noise for pairs


def test_without_a_reason_nothing_is_copied_or_cut():
    tensor = torch.arange(10.0)
    ((part, (same,)),) = chunks_on(CPU, (tensor,), writing=True)
    assert part == slice(0, 10) and same.data_ptr() == tensor.data_ptr()
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
    rule = ZOAdaMU(lr=1e-2, total_steps=6, momentum=storage)
    elements = Elements("w", (2000,), rule.keys(["w"])["w"], start, start + 1001)
    runs = []
    for settings in ({}, {"chunk": 64, "copy": True}, {"chunk": 1000, "copy": True}):
        weight = torch.linspace(-1, 1, 1001).to(dtype)
        state = rule.new_state(1001, dtype, CPU)
        out = torch.empty_like(weight)
        for step in range(1, 5):
            update = Update(step, rule.direction(step), 1e-2, 0.1, (0.7,))
            for part, (w, *m) in chunks_on(CPU, (weight, *state.values()), writing=True, **settings):
                rule.update_(w, dict(zip(state, m, strict=True)), elements.part(part), update)
        for part, (w, *m) in chunks_on(CPU, (weight, *state.values()), writing=False, **settings):
            here = dict(zip(state, m, strict=True))
            rule.perturb_(out[part], w, here, elements.part(part), rule.direction(5), Evaluation(0, -1.0))
        runs.append([t.view(torch.uint8).tolist() for t in (weight, out, *state.values())])
    assert runs[0] == runs[1] == runs[2]
